"""InfoNCE against the keys of a batch (MoCo v3) and against a queue (MoCo v2), beside the matrix of logits."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures

from vitrail.kernels import info_nce_loss

Tensor = torch.Tensor
TEMPERATURE = 0.2


def inputs(images: int, queue: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    q = torch.randn(images, width, device=device)
    k = F.normalize(q + torch.randn(images, width, device=device), dim=1)
    given = {"q": q.to(dtype), "k": k.to(dtype)}
    if queue:
        given["queue"] = F.normalize(torch.randn(queue, width, device=device), dim=1).to(dtype)
    return given


def eager(q: Tensor, k: Tensor) -> Tensor:
    """MoCo v3's lines, but for their factor."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    return F.cross_entropy(q @ k.T / TEMPERATURE, torch.arange(len(q), device=q.device))


def eager_with_queue(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """MoCo's lines."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def lightly(size: int, width: int) -> Any:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(TEMPERATURE, memory_bank_size=(size, width))

    def call(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        loss.memory_bank.bank = queue.clone()  # it enqueues what it is given
        return loss(q, k)

    return call


def case(name: str, images: int, queue: int, width: int, dtype: torch.dtype) -> Case:
    keys = queue or images
    logits = 2.0 * images * keys * width
    read = (images + (images + queue if queue else keys)) * width * dtype.itemsize
    dense = eager_with_queue if queue else eager
    everyone: dict[str, Any] = {
        "vitrail": lambda: partial(info_nce_loss, temperature=TEMPERATURE),
        "eager": lambda: dense,
        "compiled": compiled(dense),
    }
    if queue:  # without its memory bank lightly's is another loss
        everyone["lightly"] = partial(lightly, queue, width)
    return Case(
        op="info_nce_loss",
        name=name,
        shape={"images": images, "keys": keys, "width": width},
        dtype=dtype,
        inputs=partial(inputs, images, queue, width, dtype),
        truth=dense,
        implementations=everyone,
        bytes={"forward": read, "forward+backward": read + images * width * dtype.itemsize},
        flops={"forward": logits, "forward+backward": 2 * logits},
        differentiable=("q",),
        # In bfloat16 features are rounded for the products, and the loss is a difference of logits.
        tolerance=2**-4 if dtype == torch.bfloat16 else None,
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        dtypes = (torch.float32, torch.bfloat16)
        return [case(f"keys {queue}", 32, queue, 32, dtype) for dtype in dtypes for queue in (0, 64)]
    dtype = torch.float32 if sizes.batch == 16 else torch.bfloat16
    return [
        case("MoCo v3, 4096 keys", 4096, 0, 256, dtype),
        case("MoCo v2, queue of 65536", 256, 65536, 128, dtype),
    ]


test_info_nce_loss = measures(cases)
