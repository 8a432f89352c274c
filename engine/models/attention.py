"""Multi-head attention over tokens, with the backend as an explicit, explained choice."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AttentionBackend = Literal["auto", "sdpa", "xformers", "math"]


def attention_backend(requested: AttentionBackend, device: torch.device) -> tuple[str, str]:
    """Choose how attention is computed on `device`.

    Returns:
        The backend and the reason for it, one line for a log.

    Raises:
        RuntimeError: xformers was asked for and cannot run here.
    """
    if requested == "xformers":
        if device.type != "cuda":
            raise RuntimeError(f"attention backend xformers runs on CUDA only, the model is on {device}: use 'auto'")
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                "attention backend xformers is not installed: pip install 'vitrail[xformers]'"
            ) from error
        return "xformers", "asked for"
    if requested != "auto":
        return requested, "asked for"
    if device.type == "cuda":
        return "sdpa", "fused kernels of scaled_dot_product_attention"
    # At ViT sizes (50 to 260 tokens) the CPU flash path in bf16 is several times slower than two matrix products.
    return "math", "on CPU explicit matrix products are faster than scaled_dot_product_attention at ViT sizes"


def attend(query: Tensor, key: Tensor, value: Tensor, backend: AttentionBackend = "auto") -> Tensor:
    """Softmax attention `softmax(q k^T / sqrt(d)) v`.

    Args:
        query: `[B, h, N, d]`, any strides with the last dimension contiguous.
        key: `[B, h, M, d]`.
        value: `[B, h, M, d]`.
        backend: see `attention_backend`.

    Returns:
        `[B, h, N, d]` in the dtype of the query; the softmax accumulates in float32.
    """
    chosen, _ = attention_backend(backend, query.device)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(query, key, value)
    if chosen == "xformers":
        from xformers.ops import memory_efficient_attention

        out = memory_efficient_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return out.transpose(1, 2)
    with torch.autocast(query.device.type, enabled=False):
        return _CacheBlockedAttention.apply(query, key, value)


# Size that the scores of a block should have: about a core's share of the second- and third-level cache.
BLOCK_BYTES = 2 << 20


def _blocks(query: Tensor, key: Tensor) -> range:
    """First image of each block of `[B, h, N, d]` against `[B, h, M, d]`."""
    per_image = query.shape[1] * query.shape[2] * key.shape[2] * query.element_size()
    return range(0, query.shape[0], max(1, BLOCK_BYTES // max(1, per_image)))


class _CacheBlockedAttention(torch.autograd.Function):
    """Explicit attention over a few images at a time, so that the scores stay in the processor's cache.

    Scores are recomputed in the backward pass: nothing of size N x M outlives a block, and the extra product costs
    less than writing the probabilities to memory and reading them back.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        B, heads, N, d = query.shape
        out = query.new_empty(B, N, heads, d).transpose(1, 2)  # the layout that the output projection reads
        blocks = _blocks(query, key)
        for i in blocks:
            part = slice(i, i + blocks.step)
            scores = (query[part] * d**-0.5) @ key[part].transpose(-2, -1)
            out[part] = scores.softmax(dim=-1) @ value[part]
        ctx.save_for_backward(query, key, value)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        blocks = _blocks(query, key)
        for i in blocks:
            part = slice(i, i + blocks.step)
            q, k, v, g = (
                (query[part] * scale).contiguous(),
                key[part].contiguous(),
                value[part],
                grad[part].contiguous(),
            )
            probabilities = (q @ k.transpose(-2, -1)).softmax(dim=-1)
            grads[2][part] = probabilities.transpose(-2, -1) @ g
            grad_scores = torch.ops.aten._softmax_backward_data(
                g @ v.transpose(-2, -1), probabilities, -1, probabilities.dtype
            )
            grads[0][part] = (grad_scores @ k) * scale
            grads[1][part] = grad_scores.transpose(-2, -1) @ q
        return grads


class QKVLinear(nn.Linear):
    """The joint projection of a block: rows `[q | k | v]` of one weight, any contiguous part of it on request.

    Parts are computed inside this module's own forward, so that ZeRO-3 always finds the weight gathered.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(self, x: Tensor, part: Literal["qkv", "q", "kv"] = "qkv") -> Tensor:
        """Project `[..., D]` to `[..., 3D]` ("qkv"), `[..., D]` ("q") or `[..., 2D]` ("kv")."""
        width = self.in_features
        rows = {"qkv": slice(None), "q": slice(0, width), "kv": slice(width, None)}[part]
        return F.linear(x, self.weight[rows], self.bias[rows])


class Attention(nn.Module):
    """Multi-head self-attention; parameter names and layouts are those of timm and of the official MAE code."""

    def __init__(self, width: int, heads: int, backend: AttentionBackend = "auto") -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads: choose a divisor of the width")
        self.heads = heads
        self.backend: AttentionBackend = backend
        self.qkv = QKVLinear(width)
        self.proj = nn.Linear(width, width)

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """`[B, N, n * D]` to `n` tensors `[B, h, N, D / h]` (views)."""
        B, N, _ = packed.shape
        return packed.view(B, N, -1, self.heads, self.qkv.in_features // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend and project: three tensors of `split` to `[B, N, D]`."""
        out = attend(query, key, value, self.backend)
        return self.proj(out.transpose(1, 2).flatten(2))
