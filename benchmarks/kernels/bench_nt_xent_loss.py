"""NT-Xent on two views of a batch, against the matrix of similarities and lightly."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures
from torch.utils.checkpoint import checkpoint

from vitrail.kernels import nt_xent_loss

Tensor = torch.Tensor
TEMPERATURE = 0.1
TRUTH_ROWS = 1024  # of similarities at a time in float64: all of 16,384 views are 2 GB, and autograd keeps several
EVERYONE = ("vitrail", "eager", "compiled", "lightly")


def inputs(images: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    first = torch.randn(images, width, device=device)
    second = first + torch.randn(images, width, device=device)
    return {"z1": first.to(dtype), "z2": second.to(dtype)}


def losses(rows: Tensor, keys: Tensor, start: int) -> Tensor:
    """The loss of some successive rows against all views."""
    index = torch.arange(start, start + len(rows), device=rows.device)
    own = index[:, None] == torch.arange(len(keys), device=rows.device)
    logits = (rows @ keys.T / TEMPERATURE).masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, (index + len(keys) // 2) % len(keys), reduction="sum")


def units(z1: Tensor, z2: Tensor) -> Tensor:
    return torch.cat([F.normalize(z1, dim=1), F.normalize(z2, dim=1)])


def eager(z1: Tensor, z2: Tensor) -> Tensor:
    z = units(z1, z2)
    return losses(z, z, 0) / len(z)


def truth(z1: Tensor, z2: Tensor) -> Tensor:
    z = units(z1, z2)
    parts = enumerate(z.split(TRUTH_ROWS))
    return sum(checkpoint(losses, part, z, index * TRUTH_ROWS, use_reentrant=False) for index, part in parts) / len(z)


def lightly() -> Any:
    from lightly.loss import NTXentLoss

    loss: Any = NTXentLoss(TEMPERATURE)
    return lambda **views: loss(views["z1"], views["z2"])


def case(images: int, width: int, dtype: torch.dtype, names: tuple[str, ...] = EVERYONE, forward: bool = True) -> Case:
    views = 2 * images
    features, statistics = views * width * dtype.itemsize, views * (width + 1) * 4
    product = 2.0 * views * views * width
    # Forward: log-sum-exps alone. With the backward: a mean row each in the row pass, and the column pass.
    nbytes = {"forward": features, "forward+backward": 2 * features + 2 * statistics}
    flops = {"forward": product, "forward+backward": 4 * product}
    everyone = {
        "vitrail": lambda: partial(nt_xent_loss, temperature=TEMPERATURE),
        "eager": lambda: eager,
        "compiled": compiled(eager),
        "lightly": lightly,
    }
    return Case(
        op="nt_xent_loss",
        name=f"{images} images, {views} views",
        shape={"images": images, "views": views, "width": width},
        dtype=dtype,
        inputs=partial(inputs, images, width, dtype),
        truth=truth,
        implementations={name: everyone[name] for name in names},
        bytes=nbytes if forward else {"forward+backward": nbytes["forward+backward"]},
        flops=flops,
        differentiable=("z1", "z2"),
        # In bfloat16 features are rounded for the products, and the loss is a difference of logits.
        tolerance=2**-4 if dtype == torch.bfloat16 else None,
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case(48, 32, torch.float32), case(48, 32, torch.bfloat16)]
    if sizes.batch == 16:
        # A call on 16,384 views takes seconds: of the dense forms only lightly's is measured there.
        large = case(8192, 128, torch.float32, ("vitrail", "lightly"), forward=False)
        return [case(2048, 128, torch.float32), large]
    return [case(4096, 128, torch.bfloat16), case(8192, 128, torch.bfloat16), case(4096, 256, torch.bfloat16)]


test_nt_xent_loss = measures(cases)
