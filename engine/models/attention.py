"""Multi-head attention over tokens, with the backend as an explicit, explained choice."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

        out: Tensor = memory_efficient_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return out.transpose(1, 2)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    # The kernel accumulates in float32 whatever its input; autocast would write the probabilities in float32 too.
    with torch.autocast(query.device.type, enabled=False):
        probabilities = scores.softmax(dim=-1)
    return probabilities @ value


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
