"""CLIP's loss with a learned scale, against the matrix of logits."""

from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures

from vitrail.kernels import clip_loss

Tensor = torch.Tensor


def inputs(pairs: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    a = torch.randn(pairs, width, device=device)
    b = a + torch.randn(pairs, width, device=device)
    return {"a": a.to(dtype), "b": b.to(dtype), "logit_scale": torch.tensor(1 / 0.07, device=device)}


def eager(a: Tensor, b: Tensor, logit_scale: Tensor) -> Tensor:
    """The pseudocode of CLIP's figure 3."""
    logits = logit_scale * (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T)
    own = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def case(pairs: int, width: int, dtype: torch.dtype) -> Case:
    features, statistics = 2 * pairs * width * dtype.itemsize, 2 * pairs * (width + 1) * 4
    product = 2.0 * pairs * pairs * width
    return Case(
        op="clip_loss",
        name=f"{pairs} pairs, d {width}",
        shape={"pairs": pairs, "width": width},
        dtype=dtype,
        inputs=partial(inputs, pairs, width, dtype),
        truth=eager,
        implementations={"vitrail": lambda: clip_loss, "eager": lambda: eager, "compiled": compiled(eager)},
        bytes={"forward": features, "forward+backward": 2 * features + 2 * statistics},
        # A dense form needs one matrix of logits for both directions, and two products for the gradients.
        flops={"forward": product, "forward+backward": 3 * product},
        differentiable=("a", "b", "logit_scale"),
        # In bfloat16 features are rounded for the products, and the loss is a difference of logits.
        tolerance=2**-4 if dtype == torch.bfloat16 else None,
    )


def cases(sizes: Sizes) -> list[Case]:
    if sizes.dry:
        return [case(48, 32, torch.float32), case(48, 32, torch.bfloat16)]
    dtype = torch.float32 if sizes.batch == 16 else torch.bfloat16
    return [case(4096, 512, dtype)]


test_clip_loss = measures(cases)
