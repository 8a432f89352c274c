"""Attention on the CPU in the compiled extension: a head of an image at a time, straight from the projection."""

import torch

from .. import extension
from .reference import split_heads


def forward(
    qkv: torch.Tensor, kv: torch.Tensor | None, bias: torch.Tensor | None, num_heads: int, scale: float
) -> torch.Tensor:
    """Attends. Arguments and result as in the reference; there is no bias."""
    q, k, v = split_heads(qkv, kv, num_heads)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    extension.ops().attention_out(out, q, k, v, scale)
    return out.flatten(2)


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    kv: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_heads: int,
    scale: float,
) -> list[torch.Tensor]:
    """Computes the gradients. Arguments and results as in the reference; there is no bias."""
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (qkv, kv) if tensor is not None
    ]
    parts = split_heads(grads[0], grads[1] if kv is not None else None, num_heads)
    q, k, v = split_heads(qkv, kv, num_heads)
    extension.ops().attention_backward_out(*parts, grad.unflatten(-1, (num_heads, -1)), q, k, v, scale)
    return grads
