"""Attention from the packed projection as the networks call it, against the functions that they could call instead.

On a CPU that is `packed_attention`; on a GPU it is one of the others.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench import Case, Sizes, measures

from vitrail.engine.models.attention import attend

Tensor = torch.Tensor


@dataclass(frozen=True)
class Layer:
    """One attention layer of MAE."""

    name: str
    tokens: int
    heads: int
    head_dim: int


LAYERS = (
    Layer("ViT-H/14 encoder", 65, 16, 80),
    Layer("ViT-B/16 encoder", 50, 12, 64),
    Layer("ViT-H/14 decoder", 257, 16, 32),
)


def inputs(layer: Layer, batch: int, device: torch.device) -> dict[str, Tensor]:
    width = layer.heads * layer.head_dim
    return {"qkv": torch.randn(batch, layer.tokens, 3 * width, device=device).bfloat16()}


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three views [B, heads, N, head_dim]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def join(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def ours(qkv: Tensor, heads: int) -> Tensor:
    return attend(qkv, heads=heads)


def eager(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = split(qkv, heads)
    return join(torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v)


def sdpa(qkv: Tensor, heads: int) -> Tensor:
    return join(F.scaled_dot_product_attention(*split(qkv, heads)))


def flex(heads: int) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    kernel = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attention(qkv: Tensor) -> Tensor:
        if qkv.requires_grad and qkv.device.type == "cpu":  # says so itself, but torch.compile rewords it
            raise NotImplementedError("has no backward on CPU")
        return join(kernel(*split(qkv, heads)))

    return attention


def xformers(heads: int) -> Any:
    from xformers.ops import memory_efficient_attention

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        return memory_efficient_attention(q, k, v).flatten(2)

    return attention


def case(layer: Layer, batch: int) -> Case:
    engine, theirs, fused = (partial(function, heads=layer.heads) for function in (ours, eager, sdpa))
    width = layer.heads * layer.head_dim
    one, product = batch * layer.tokens * width * 2, 2.0 * batch * layer.tokens**2 * width
    return Case(
        op="packed_attention",
        name=layer.name,
        shape={"batch": batch, "tokens": layer.tokens, "heads": layer.heads, "head_dim": layer.head_dim},
        dtype=torch.bfloat16,
        inputs=partial(inputs, layer, batch),
        truth=theirs,
        implementations={
            "vitrail": lambda: engine,
            "eager": lambda: theirs,
            "SDPA": lambda: fused,
            "FlexAttention": partial(flex, layer.heads),
            "xformers": partial(xformers, layer.heads),
        },
        # q, k, v in and the output out; backward q, k, v and the output's gradient in, three gradients out.
        bytes={"forward": 4 * one, "forward+backward": 11 * one},
        flops={"forward": 2 * product, "forward+backward": 6 * product},
        differentiable=("qkv",),
    )


def cases(sizes: Sizes) -> list[Case]:
    return [case(layer, sizes.batch) for layer in LAYERS]


test_packed_attention = measures(cases)
