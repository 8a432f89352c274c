"""Attention from the packed projection in plain PyTorch: the definition."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of scores and sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split_heads(qkv: torch.Tensor, kv: torch.Tensor | None, num_heads: int) -> list[torch.Tensor]:
    """Returns views [B, N, heads, d] of the queries, keys and values that lie side by side in one or two tensors."""
    packed = (qkv,) if kv is None else (qkv, kv)
    width = sum(tensor.shape[-1] for tensor in packed) // 3
    return [part.unflatten(-1, (num_heads, -1)) for tensor in packed for part in tensor.split(width, dim=-1)]


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """Returns [B, heads, N, d] in the dtype of the arithmetic."""
    return tensor.transpose(1, 2).to(compute_dtype(tensor.dtype))


def _probabilities(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = scale * q @ k.mT
    return torch.softmax(scores if bias is None else scores + bias.to(scores.dtype), dim=-1)


def forward(
    qkv: torch.Tensor, kv: torch.Tensor | None, bias: torch.Tensor | None, num_heads: int, scale: float
) -> torch.Tensor:
    """Attends.

    Args:
        qkv: [B, N, 3 D], or queries alone [B, N, D] where keys and values are in `kv`.
        kv: [B, M, 2 D].
        bias: [heads, N, M], added to the scaled scores of every image.
        num_heads: Number of heads.
        scale: Factor of the products of queries and keys.

    Returns:
        [B, N, D] in the dtype of `qkv`.
    """
    q, k, v = map(_heads_first, split_heads(qkv, kv, num_heads))
    return (_probabilities(q, k, bias, scale) @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    kv: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_heads: int,
    scale: float,
) -> list[torch.Tensor]:
    """Computes the gradients.

    Args:
        grad: [B, N, D], the gradient of the result.
        qkv: As in the forward pass, and so are the others.
        kv: Likewise.
        bias: Likewise.
        num_heads: Likewise.
        scale: Likewise.

    Returns:
        The gradients of those of `qkv`, `kv` and `bias` that there are, in this order.
    """
    q, k, v = map(_heads_first, split_heads(qkv, kv, num_heads))
    g = _heads_first(grad.unflatten(-1, (num_heads, -1)))
    probabilities = _probabilities(q, k, bias, scale)
    products = g @ v.mT
    scores = probabilities * (products - (probabilities * products).sum(dim=-1, keepdim=True))
    parts = [scale * scores @ k, scale * scores.mT @ q, probabilities.mT @ g]
    parts = [part.transpose(1, 2).flatten(2).to(qkv.dtype) for part in parts]
    grads = [torch.cat(parts, dim=-1)] if kv is None else [parts[0], torch.cat(parts[1:], dim=-1)]
    return grads if bias is None else [*grads, scores.sum(dim=0).to(bias.dtype)]
