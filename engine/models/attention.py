"""Multi-head attention over tokens, with the backend as an explicit, explained choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitrail.kernels.packed_attention.flops  # noqa: F401 - so that a model's operations can be counted
from vitrail.kernels import packed_attention

from .packing import Packing

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
    return "math", "on CPU packed_attention is faster than scaled_dot_product_attention at ViT sizes"


def attend(
    *packed: Tensor,
    heads: int,
    backend: AttentionBackend = "auto",
    packing: Packing | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention `softmax(q k^T / sqrt(d) + bias) v`, straight from the output of the projection.

    Args:
        packed: `[q | k | v]` as one tensor `[B, N, 3 D]`, or queries `[B, N, D]` and `[k | v]` `[B, M, 2 D]`.
        heads: h; a head is d = D / h wide.
        backend: see `attention_backend`.
        packing: how images lie in the one sequence (B = 1); each attends to itself alone. Queries are those of all
            tokens, or one of each image.
        bias: `[h, N, M]`, the same for all images; images in one sequence and xformers take none.

    Returns:
        `[B, N, D]` in the dtype of the input; the softmax accumulates in float32.

    Raises:
        ValueError: a bias was given with a packing or to xformers.
    """
    chosen, _ = attention_backend(backend, packed[0].device)
    if bias is not None and (packing is not None or chosen == "xformers"):
        where = "images packed into one sequence" if packing is not None else "attention backend xformers"
        raise ValueError(f"{where} cannot take a relative-position bias: use separate calls and backend 'auto'")
    if packing is not None:
        return _attend_packed(packed, heads, chosen, packing)
    if chosen == "math":
        return packed_attention(*packed, num_heads=heads, bias=bias)
    query, key, value = _split(packed, heads)  # [B, N, h, d]
    if chosen == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value).flatten(2)
    mask = None if bias is None else bias.to(query.dtype)[None]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2).flatten(2)


def _attend_packed(packed: Sequence[Tensor], heads: int, backend: str, packing: Packing) -> Tensor:
    """Attention among the tokens of each image of a sequence `[1, N, D]`.

    In one pass with xformers, and with PyTorch's kernel for sequences of any length where it runs: 16 bits on a GPU.
    """
    per_image = packed[0].shape[1] == packing.images != packing.tokens  # queries of one token of each image
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        keys = packing.lengths()
        bias = BlockDiagonalMask.from_seqlens([1] * len(keys) if per_image else keys, keys)
        return memory_efficient_attention(*_split(packed, heads), attn_bias=bias).flatten(2)
    if backend == "sdpa" and packed[0].is_cuda and packed[0].dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (part[0] for part in _split(packed, heads))
        ends = [
            F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(query.device)
            for lengths in ([1] * packing.images if per_image else packing.lengths(), packing.lengths())
        ]
        longest = max(packing.lengths())
        out = varlen_attn(query, key, value, ends[0], ends[1], 1 if per_image else longest, longest)
        assert isinstance(out, Tensor)
        return out.flatten(1)[None]
    parts, places = [], [0] * len(packed)
    for images, tokens in packing.groups:
        group = []
        for i, tensor in enumerate(packed):
            rows = images if per_image and i == 0 else images * tokens
            group.append(tensor[0, places[i] : places[i] + rows].unflatten(0, (images, -1)))
            places[i] += rows
        parts.append(attend(*group, heads=heads, backend="math" if backend == "math" else "sdpa").flatten(0, 1))
    return torch.cat(parts)[None]


def _split(packed: Sequence[Tensor], heads: int) -> list[Tensor]:
    """Views `[B, N, h, d]` of the q, k and v that lie side by side in one or two tensors."""
    width = sum(t.shape[-1] for t in packed) // 3
    return [part.unflatten(-1, (heads, -1)) for t in packed for part in t.split(width, dim=-1)]


class QKVLinear(nn.Linear):
    """The joint projection of a block: rows `[q | k | v]` of one weight, any contiguous part of it on request.

    Parts are computed inside this module's own forward, so that ZeRO-3 always finds the weight gathered.

    Args:
        width: D.
        key_bias: whether keys have a bias; without it there are `q_bias` and `v_bias` in place of `bias`, as in BEiT.
    """

    def __init__(self, width: int, *, key_bias: bool = True) -> None:
        super().__init__(width, 3 * width, bias=key_bias)
        self.key_bias = key_bias
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, part: Literal["qkv", "q", "kv"] = "qkv") -> Tensor:
        """Project `[..., D]` to `[..., 3D]` ("qkv"), `[..., D]` ("q") or `[..., 2D]` ("kv")."""
        width = self.in_features
        rows = {"qkv": slice(None), "q": slice(0, width), "kv": slice(width, None)}[part]
        bias = self.bias if self.key_bias else torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.weight[rows], bias[rows])


class Attention(nn.Module):
    """Multi-head self-attention; parameter names and layouts are those of timm and of the official MAE code."""

    def __init__(self, width: int, heads: int, backend: AttentionBackend = "auto", *, key_bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads: choose a divisor of the width")
        self.heads = heads
        self.backend: AttentionBackend = backend
        self.qkv = QKVLinear(width, key_bias=key_bias)
        self.proj = nn.Linear(width, width)

    def forward(
        self, *packed: Tensor, packing: Packing | None = None, bias: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Attend and project; takes what `attend` takes, returns `[B, N, D]`, or of `rows` `[T]` of all `[T, D]`."""
        out = attend(*packed, heads=self.heads, backend=self.backend, packing=packing, bias=bias)
        return self.proj(out if rows is None else out.flatten(0, 1).index_select(0, rows))


class RelativePositionBias(nn.Module):
    """What attention scores gain by where the key lies as seen from the query (BEiT, arXiv 2106.08254).

    The table has a row for each offset between patches, and three more: from the class token to a patch, from a patch
    to the class token, and from the class token to itself. It starts at zero. Key and layout are the official code's.

    Args:
        grid: patches per (column, row).
        heads: attention heads.
    """

    index: Tensor

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        rows, columns = grid
        offsets = (2 * rows - 1) * (2 * columns - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, heads))
        row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
        index = (row[:, None] - row + rows - 1) * (2 * columns - 1) + (column[:, None] - column + columns - 1)
        index = F.pad(index, (1, 0, 1, 0))
        index[0, 1:], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        """`[heads, 1 + L, 1 + L]`, class token first, float32."""
        return F.embedding(self.index, self.relative_position_bias_table).permute(2, 0, 1).contiguous()
