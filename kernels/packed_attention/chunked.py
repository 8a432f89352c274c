"""Attention over a few images at a time in PyTorch's matrix products, whose scores stay in the processor's cache.

Scores are computed again in the backward pass: nothing of size N x M outlives a block.
"""

from collections.abc import Iterator

import torch

from .reference import split_heads

BLOCK_BYTES = 3 << 20
"""Size that the scores of a block may have: what two cores keep in their second- and third-level caches."""


def _blocks(query: torch.Tensor, key: torch.Tensor) -> Iterator[slice]:
    """Yields as many images at a time as have scores that fit the cache, at least one."""
    per_image = query.shape[1] * query.shape[2] * key.shape[1] * query.element_size()
    step = max(1, BLOCK_BYTES // max(1, per_image))
    return (slice(i, i + step) for i in range(0, query.shape[0], step))


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """Returns `[b, N, h, d]` as a dense `[b * h, N, d]`."""
    return tensor.transpose(1, 2).reshape(-1, tensor.shape[1], tensor.shape[3])


def _write(target: torch.Tensor, result: torch.Tensor) -> None:
    """Stores `[b * h, N, d]` as `[b, N, h, d]`."""
    target.copy_(result.view(target.shape[0], target.shape[2], *result.shape[1:]).transpose(1, 2))


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns `scale * a @ b` for batches of matrices, scaled in float32 before it is rounded."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _probabilities(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Returns the softmax of the scaled scores of a block and their bias `[h, N, M]`, `[b * h, N, M]`."""
    scores = _scaled_product(q, k.transpose(1, 2), scale)
    if bias is not None:
        scores.view(-1, *bias.shape).add_(bias)
    return torch.softmax(scores, dim=-1, out=scores)


def forward(
    qkv: torch.Tensor, kv: torch.Tensor | None, bias: torch.Tensor | None, num_heads: int, scale: float
) -> torch.Tensor:
    """Attends. Arguments and result as in the reference."""
    query, key, value = split_heads(qkv, kv, num_heads)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    bias = None if bias is None else bias.to(qkv.dtype)
    for block in _blocks(query, key):
        q, k, v = (_heads_first(tensor[block]) for tensor in (query, key, value))
        _write(out[block], torch.bmm(_probabilities(q, k, bias, scale), v))
    return out.flatten(2)


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    kv: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_heads: int,
    scale: float,
) -> list[torch.Tensor]:
    """Computes the gradients. Arguments and results as in the reference."""
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (qkv, kv) if tensor is not None
    ]
    query, key, value = split_heads(qkv, kv, num_heads)
    d_query, d_key, d_value = split_heads(grads[0], grads[1] if kv is not None else None, num_heads)
    d_bias = None if bias is None else torch.zeros_like(bias)
    bias = None if bias is None else bias.to(qkv.dtype)
    grad = grad.unflatten(-1, (num_heads, -1))
    for block in _blocks(query, key):
        q, k, v, g = (_heads_first(tensor[block]) for tensor in (query, key, value, grad))
        probabilities = _probabilities(q, k, bias, scale)
        _write(d_value[block], torch.bmm(probabilities.transpose(1, 2), g))
        scores = torch.bmm(g, v.transpose(1, 2))
        scores = torch.ops.aten._softmax_backward_data(scores, probabilities, -1, scores.dtype)
        if d_bias is not None:
            d_bias += scores.view(-1, *d_bias.shape).sum(0, dtype=d_bias.dtype)
        _write(d_query[block], _scaled_product(scores, k, scale))
        _write(d_key[block], _scaled_product(scores.transpose(1, 2), q, scale))
    return grads if d_bias is None else [*grads, d_bias]
