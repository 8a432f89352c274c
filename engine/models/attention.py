"""Multi-head attention over tokens, with the backend as an explicit, explained choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    return "math", "on CPU explicit matrix products are faster than scaled_dot_product_attention at ViT sizes"


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
        with torch.autocast(packed[0].device.type, enabled=False):
            return _CacheBlockedAttention.apply(heads, bias, *packed)
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


# Size that the scores of a block may have: what two cores keep in their second- and third-level caches beside the rest.
BLOCK_BYTES = 3 << 20


class _CacheBlockedAttention(torch.autograd.Function):
    """Explicit attention over a few images at a time, whose scores stay in the processor's cache.

    Scores are recomputed in the backward pass: nothing of size N x M outlives a block, and the extra product costs
    less than writing the probabilities to memory and reading them back. Gradients are written where the projection
    reads them.
    """

    @staticmethod
    def forward(ctx: Any, heads: int, bias: Tensor | None, *packed: Tensor) -> Tensor:
        query, key, value = _split(packed, heads)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        ctx.bias_dtype = None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(query.dtype)
        for block in _blocks(query, key):
            q, k, v = (_heads_first(t[block]) for t in (query, key, value))
            _write(out[block], torch.bmm(_probabilities(q, k, bias), v))
        ctx.heads = heads
        ctx.save_for_backward(*packed, *(() if bias is None else (bias,)))
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, bias, d_bias = ctx.saved_tensors, None, None
        if ctx.bias_dtype is not None:
            *packed, bias = packed
            if ctx.needs_input_grad[1]:
                d_bias = bias.new_zeros(bias.shape, dtype=ctx.bias_dtype)
        grads = [torch.empty_like(t) for t in packed]
        query, key, value = _split(packed, ctx.heads)
        d_query, d_key, d_value = _split(grads, ctx.heads)
        grad, scale = grad.unflatten(-1, (ctx.heads, -1)), query.shape[-1] ** -0.5
        for block in _blocks(query, key):
            q, k, v, g = (_heads_first(t[block]) for t in (query, key, value, grad))
            probabilities = _probabilities(q, k, bias)
            _write(d_value[block], torch.bmm(probabilities.transpose(1, 2), g))
            scores = torch.bmm(g, v.transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(scores, probabilities, -1, scores.dtype)
            if d_bias is not None:
                d_bias += scores.view(-1, *d_bias.shape).sum(0, dtype=d_bias.dtype)
            _write(d_query[block], _scaled_product(scores, k, scale))
            _write(d_key[block], _scaled_product(scores.transpose(1, 2), q, scale))
        return None, d_bias, *grads


def _blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    """As many images at a time as have scores that fit the cache, at least one."""
    per_image = query.shape[1] * query.shape[2] * key.shape[1] * query.element_size()
    step = max(1, BLOCK_BYTES // max(1, per_image))
    return (slice(i, i + step) for i in range(0, query.shape[0], step))


def _heads_first(t: Tensor) -> Tensor:
    """`[b, N, h, d]` to a dense `[b * h, N, d]`."""
    return t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3])


def _write(target: Tensor, result: Tensor) -> None:
    """Store `[b * h, N, d]` as `[b, N, h, d]`."""
    target.copy_(result.view(target.shape[0], target.shape[2], *result.shape[1:]).transpose(1, 2))


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a @ b` for batches of matrices, scaled in float32 before it is rounded."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax of the scaled scores of a block and their bias `[h, N, M]`, `[b * h, N, M]`."""
    scores = _scaled_product(q, k.transpose(1, 2), q.shape[-1] ** -0.5)
    if bias is not None:
        scores.view(-1, *bias.shape).add_(bias)
    return torch.softmax(scores, dim=-1, out=scores)


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

    def forward(self, *packed: Tensor, packing: Packing | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend and project; takes what `attend` takes, returns `[B, N, D]`."""
        return self.proj(attend(*packed, heads=self.heads, backend=self.backend, packing=packing, bias=bias))


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
