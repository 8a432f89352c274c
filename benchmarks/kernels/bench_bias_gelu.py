"""A bias and GELU behind a product without one, against the usual product with a bias and GELU behind it.

The product is part of what is timed: where its bias is added is the difference.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures

from vitrail.kernels import bias_gelu

Tensor = torch.Tensor


@dataclass(frozen=True)
class Layer:
    """The first layer of an MLP."""

    name: str
    tokens: int
    width: int


LAYERS = (Layer("ViT-S/16", 197, 384), Layer("ViT-B/16 encoder of MAE", 50, 768))


def inputs(layer: Layer, batch: int, device: torch.device) -> dict[str, Tensor]:
    sizes = {
        "tokens": (batch, layer.tokens, layer.width),
        "weight": (4 * layer.width, layer.width),
        "bias": (4 * layer.width,),
    }
    drawn = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    drawn["weight"] /= layer.width**0.5
    return {name: tensor.bfloat16() for name, tensor in drawn.items()}


def ours(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu(F.linear(tokens, weight), bias)


def eager(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(tokens, weight, bias))


def case(layer: Layer, batch: int) -> Case:
    rows, hidden = batch * layer.tokens, 4 * layer.width
    weight, product = 2 * hidden * layer.width, 2.0 * rows * hidden * layer.width
    read, written = 2 * rows * layer.width + weight, 2 * rows * hidden
    return Case(
        op="bias_gelu",
        name=layer.name,
        shape={"batch": batch, "tokens": layer.tokens, "width": layer.width, "hidden": hidden},
        dtype=torch.bfloat16,
        inputs=partial(inputs, layer, batch),
        truth=eager,
        implementations={"vitrail": lambda: ours, "eager": lambda: eager, "compiled": compiled(eager)},
        # The product, which is kept, and the result; backward both gradients of them, and of what was read.
        bytes={"forward": read + 2 * written, "forward+backward": 3 * read + 6 * written},
        flops={"forward": product, "forward+backward": 3 * product},
        differentiable=("tokens", "weight", "bias"),
    )


def cases(sizes: Sizes) -> list[Case]:
    return [case(layer, sizes.batch) for layer in LAYERS]


test_bias_gelu = measures(cases)
