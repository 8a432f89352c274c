"""Sinkhorn-Knopp on logits and from features, against the published loop over a matrix in memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures

from vitrail.kernels import sinkhorn_center, sinkhorn_knopp

Tensor = torch.Tensor
TEMPERATURE, ITERATIONS = 0.07, 3


def loop(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the balanced probabilities, and the factor of each prototype in them."""
    matrix = (logits / TEMPERATURE).exp().T
    matrix = matrix / matrix.sum()
    count, batch = matrix.shape
    factor = torch.ones(count, 1, dtype=matrix.dtype, device=matrix.device)
    for _ in range(ITERATIONS):
        total = matrix.sum(1, keepdim=True)
        matrix = matrix / total / count
        factor = factor / total
        matrix = matrix / matrix.sum(0, keepdim=True) / batch
    return (matrix * batch).T, factor[:, 0]


def eager(logits: Tensor) -> Tensor:
    """The loop as it is published, in place."""
    matrix = (logits / TEMPERATURE).exp().T
    matrix /= matrix.sum()
    count, batch = matrix.shape
    for _ in range(ITERATIONS):
        matrix /= matrix.sum(1, keepdim=True)
        matrix /= count
        matrix /= matrix.sum(0, keepdim=True)
        matrix /= batch
    matrix *= batch
    return matrix.T


def eager_center(features: Tensor, prototypes: Tensor) -> Tensor:
    logits = features @ prototypes.T
    _, factor = loop(logits if logits.dtype == torch.float64 else logits.float())
    return -TEMPERATURE * factor.log()


def lightly() -> Callable[..., Any]:
    from lightly.loss.swav_loss import sinkhorn

    return lambda logits: sinkhorn(logits, ITERATIONS, TEMPERATURE)


def unit(rows: int, width: int, device: torch.device) -> Tensor:
    return F.normalize(torch.randn(rows, width, device=device), dim=1)


def logits_inputs(rows: int, count: int, width: int, device: torch.device) -> dict[str, Tensor]:
    return {"logits": unit(rows, width, device) @ unit(count, width, device).T}


def features_inputs(rows: int, count: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {"features": unit(rows, width, device).to(dtype), "prototypes": unit(count, width, device).to(dtype)}


def from_logits(rows: int, count: int, width: int) -> Case:
    return Case(
        op="sinkhorn_knopp",
        name="logits",
        shape={"rows": rows, "prototypes": count},
        dtype=torch.float32,
        inputs=partial(logits_inputs, rows, count, width),
        truth=eager,
        implementations={
            "vitrail": lambda: partial(sinkhorn_knopp, temperature=TEMPERATURE, iterations=ITERATIONS),
            "eager": lambda: eager,
            "compiled": compiled(lambda logits: loop(logits)[0]),
            "lightly": lightly,
        },
        bytes={"forward": 2 * 4 * rows * count},
        flops={},
    )


def from_features(rows: int, count: int, width: int, dtype: torch.dtype) -> Case:
    read = (rows + count) * width * dtype.itemsize
    return Case(
        op="sinkhorn_knopp",
        name="centre from features",
        shape={"rows": rows, "prototypes": count, "width": width},
        dtype=dtype,
        inputs=partial(features_inputs, rows, count, width, dtype),
        truth=eager_center,
        implementations={
            "vitrail": lambda: partial(sinkhorn_center, temperature=TEMPERATURE, iterations=ITERATIONS),
            "eager": lambda: eager_center,
            "compiled": compiled(eager_center),
        },
        bytes={"forward": read + 4 * count},
        flops={"forward": 2.0 * rows * count * width},
        compared=lambda center: center - center.mean(),  # a constant is lost in the softmax
        tolerance=2**-6 if dtype.itemsize == 2 else 1e-4,
    )


def cases(sizes: Sizes) -> list[Case]:
    rows, count, width, dtype = 1_024, 16_384, 256, torch.float32
    if sizes.dry:
        rows, count, width = 24, 80, 16
    elif sizes.batch > 16:
        rows, count, dtype = 4_096, 65_536, torch.bfloat16
    return [from_logits(rows, count, width), from_features(rows, count, width, dtype)]


test_sinkhorn_knopp = measures(cases)
