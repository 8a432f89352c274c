"""LayerNorm of the residual stream as the engine runs it (PyTorch's, in float32), against what could replace it."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures

from vitrail.engine.models.block import NORM_EPS

Tensor = torch.Tensor


def inputs(rows: int, width: int, device: torch.device) -> dict[str, Tensor]:
    sizes = {"x": (rows, width), "weight": (width,), "bias": (width,)}
    return {name: torch.randn(size, device=device) for name, size in sizes.items()}


def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)


def liger() -> Any:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, NORM_EPS)


def case(name: str, tokens: int, width: int, batch: int) -> Case:
    rows = batch * tokens
    return Case(
        op="layer_norm",
        name=name,
        shape={"batch": batch, "tokens": tokens, "width": width},
        dtype=torch.float32,
        inputs=partial(inputs, rows, width),
        truth=torchs,
        implementations={"vitrail": lambda: torchs, "compiled": compiled(torchs), "liger-kernel": liger},
        bytes={"forward": 2 * rows * width * 4, "forward+backward": 5 * rows * width * 4},
        flops={},
        differentiable=("x", "weight", "bias"),
    )


def cases(sizes: Sizes) -> list[Case]:
    return [
        case("ViT-H/14 encoder", 65, 1280, sizes.batch),
        case("ViT-B/16 encoder", 50, 768, sizes.batch),
        case("ViT-H/14 decoder", 257, 512, sizes.batch),
    ]


test_layer_norm = measures(cases)
