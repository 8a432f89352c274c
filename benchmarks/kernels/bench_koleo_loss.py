"""The KoLeo loss on class tokens, against DINOv2's lines and lightly."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures

from vitrail.kernels.koleo_loss import koleo_loss

Tensor = torch.Tensor
EPS = 1e-8


def eager(x: Tensor) -> Tensor:
    x = F.normalize(x, eps=EPS, p=2, dim=-1)
    with torch.no_grad():
        similarity = x @ x.T
        similarity.fill_diagonal_(-1)
        nearest = similarity.argmax(1)
    return -(F.pairwise_distance(x, x[nearest], 2, EPS) + EPS).log().mean()


def lightly() -> Any:
    from lightly.loss import KoLeoLoss

    return KoLeoLoss()


def inputs(rows: int, width: int, device: torch.device) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, width, device=device)}


def case(rows: int, width: int) -> Case:
    size = rows * width * 4
    return Case(
        op="koleo_loss",
        name=f"N{rows} D{width}",
        shape={"rows": rows, "width": width},
        dtype=torch.float32,
        inputs=partial(inputs, rows, width),
        truth=eager,
        implementations={
            "vitrail": lambda: koleo_loss,
            "eager": lambda: eager,
            "compiled": compiled(eager),
            "lightly": lightly,
        },
        bytes={"forward": size, "forward+backward": 3 * size},
        flops={"forward": 2.0 * rows * rows * width, "forward+backward": 2.0 * rows * rows * width},
        differentiable=("x",),
    )


def cases(sizes: Sizes) -> list[Case]:
    return [case(64 if sizes.dry else 1024, 768)]


test_koleo_loss = measures(cases)
