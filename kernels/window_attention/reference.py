"""Window attention in plain PyTorch: dense attention within the rectangles that the windows and the mask leave.

A shifted window is a window of the rolled map, and the mask keeps apart what the roll has brought together from
opposite edges. In the map itself, rows (and columns) are therefore cut at 0, s, s + w, s + 2 w...: attention is dense
within each rectangle between the cuts. Nothing is rolled and nothing is masked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the arithmetic and of the log-sum-exp: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Run:
    """Equal segments of an axis that follow each other.

    Attributes:
        start: First token.
        count: Number of segments.
        real: Tokens of each.
        full: Of each with those that padding adds; there are more than `real` only in a last segment.
    """

    start: int
    count: int
    real: int
    full: int


def runs(length: int, window: int, shift: int) -> list[Run]:
    """Returns how the windows and the mask cut an axis: at 0, s, s + w, s + 2 w..., up to the padded length.

    Args:
        length: Of the map along this axis, in tokens.
        window: Side w of a window.
        shift: s, 0 to w - 1.

    Returns:
        The segments that hold tokens, in order.
    """
    canvas = -(-length // window) * window
    edges = [0, *range(shift or window, canvas, window), canvas]
    found: list[Run] = []
    for start, end in zip(edges, edges[1:], strict=False):
        real, full = min(end, length) - start, end - start
        if real <= 0:
            break
        if found and (found[-1].real, found[-1].full) == (real, full):
            found[-1] = Run(found[-1].start, found[-1].count + 1, real, full)
        else:
            found.append(Run(start, 1, real, full))
    return found


@dataclass(frozen=True)
class Tiles:
    """Rectangles of equal size, `rows.count` times `columns.count` of them."""

    rows: Run
    columns: Run

    @property
    def padded(self) -> bool:
        """Whether padded tokens are among the keys."""
        return self.rows.full > self.rows.real or self.columns.full > self.columns.real

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Views [B, H, W, ...] as [B, rows, columns, height, width, ...] of the rectangles."""
        down, across = self.rows, self.columns
        part = tensor.narrow(1, down.start, down.count * down.real)
        part = part.narrow(2, across.start, across.count * across.real)
        part = part.unflatten(1, (down.count, down.real)).unflatten(3, (across.count, across.real))
        return part.transpose(2, 3)

    def heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Views [B, H, W, heads, d] as [B, rows, columns, heads, height, width, d]."""
        return self.view(tensor).movedim(5, 3)

    def index(self, window: int, device: torch.device) -> torch.Tensor:
        """Returns which row of the bias table each pair uses, [queries, keys]: tokens, and keys with padded ones."""

        def deltas(run: Run) -> torch.Tensor:
            query, key = (torch.arange(count, device=device) for count in (run.real, run.full))
            return query[:, None] - key + window - 1

        down, across = deltas(self.rows), deltas(self.columns)
        index = down[:, None, :, None] * (2 * window - 1) + across[None, :, None, :]
        return index.flatten(2).flatten(0, 1)

    def is_pad(self, device: torch.device) -> torch.Tensor:
        """Returns which of the keys of `index` are padded ones, [keys]."""
        down, across = (torch.arange(run.full, device=device) >= run.real for run in (self.rows, self.columns))
        return (down[:, None] | across).flatten()


def tiles(height: int, width: int, window: int, shift: int) -> Iterator[Tiles]:
    """Yields the rectangles of a map."""
    for down, across in product(runs(height, window, shift), runs(width, window, shift)):
        yield Tiles(down, across)


class _Bias:
    """What is added to the scores of some rectangles. All padded keys are one, whose logit is their log-sum-exp."""

    def __init__(self, some: Tiles, table: torch.Tensor, window: int) -> None:
        self.index = some.index(window, table.device)
        logits = table[self.index].permute(2, 0, 1)  # [heads, queries, keys]
        if some.padded:
            pad = some.is_pad(table.device)
            self.real, self.pads = self.index[:, ~pad], self.index[:, pad]
            virtual = torch.logsumexp(logits[..., pad], 2, keepdim=True)
            self.share = torch.exp(logits[..., pad] - virtual)
            logits = torch.cat([logits[..., ~pad], virtual], dim=2)
        self.padded, self.values = some.padded, logits

    def add_gradient(self, grad: torch.Tensor, grad_table: torch.Tensor) -> None:
        """Adds the gradient of `values` to that of the table."""
        if not self.padded:
            _fold(self.index, grad, grad_table)
            return
        _fold(self.real, grad[..., :-1], grad_table)
        _fold(self.pads, grad[..., -1:] * self.share, grad_table)


def _fold(index: torch.Tensor, grad: torch.Tensor, grad_table: torch.Tensor) -> None:
    """Adds [heads, queries, keys] to the rows of the table that `index` names."""
    grad_table.index_add_(0, index.flatten(), grad.permute(1, 2, 0).flatten(0, 1))


def _split(packed: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q, k and v [..., heads, d] of [..., 3 C]."""
    q, k, v = packed.unflatten(-1, (3, heads, -1)).unbind(-3)
    return q, k, v


def _dense(some: Tiles, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copies [B, H, W, heads, d] to [B, tiles, heads, tokens, d]."""
    return some.heads(tensor).to(dtype).flatten(4, 5).flatten(1, 2)


def _with_pad(keys: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    """Appends what a padded token holds, [heads, d], to keys or values [B, tiles, heads, tokens, d]."""
    return torch.cat([keys, pad[:, None].expand(*keys.shape[:3], 1, -1)], dim=3)


def _keys_and_values(
    some: Tiles, qkv: torch.Tensor, qkv_bias: torch.Tensor, heads: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns q, k and v of some rectangles, [B, tiles, heads, tokens, d]; where they are padded, with one key more."""
    q, k, v = (_dense(some, part, dtype) for part in _split(qkv, heads))
    if some.padded:
        bias = qkv_bias if qkv_bias.numel() else qkv.new_zeros(qkv.shape[-1])
        _, pad_k, pad_v = _split(bias.to(dtype), heads)
        k, v = _with_pad(k, pad_k), _with_pad(v, pad_v)
    return q, k, v


def forward(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends within windows.

    Args:
        qkv: [B, H, W, 3 C], any strides; channels in the order (3, heads, d).
        bias_table: [(2 w - 1)², heads].
        qkv_bias: [3 C]: what a padded token holds. Empty: zeros.
        window_size: w.
        shift: Of the windows, 0 to w - 1.
        num_heads: Number of heads.
        scale: Factor of the products of queries and keys.

    Returns:
        [B, H, W, C] in the dtype of `qkv`; log-sum-exp of the biased scores, [B, heads, H, W], float32, or float64
        for float64.
    """
    batch, height, width, channels = qkv.shape
    dtype = compute_dtype(qkv.dtype)
    out = qkv.new_empty((batch, height, width, channels // 3))
    lse = qkv.new_empty((batch, num_heads, height, width), dtype=dtype)
    table = bias_table.to(dtype)
    out_heads, lse_heads = out.unflatten(3, (num_heads, -1)), lse.movedim(1, 3)[..., None]
    for some in tiles(height, width, window_size, shift):
        q, k, v = _keys_and_values(some, qkv, qkv_bias, num_heads, dtype)
        scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale).add_(_Bias(some, table, window_size).values)
        norm = torch.logsumexp(scores, -1, keepdim=True)
        result = torch.matmul(scores.sub_(norm).exp_(), v)
        for target, value in ((out_heads, result), (lse_heads, norm)):
            to = some.heads(target)
            to.copy_(value.view(to.shape))
    return out, lse


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients; the probabilities are computed again from the log-sum-exp.

    Args:
        grad: [B, H, W, C], any strides.
        qkv: As in `forward`, and so are the rest.
        bias_table: Likewise.
        qkv_bias: Likewise.
        out: Result of `forward`.
        lse: Result of `forward`.
        window_size: w.
        shift: Of the windows.
        num_heads: Number of heads.
        scale: Factor of the products of queries and keys.

    Returns:
        The gradients of qkv, contiguous, bias_table and qkv_bias, in their dtypes; that of qkv_bias holds what padded
        tokens contribute as keys and values, and is empty where it is.
    """
    batch, height, width, channels = qkv.shape
    dtype = compute_dtype(qkv.dtype)
    table = bias_table.to(dtype)
    grad_qkv = qkv.new_empty((batch, height, width, channels))
    grad_table = torch.zeros_like(table, memory_format=torch.contiguous_format)
    grad_bias = qkv_bias.new_zeros((3, num_heads, channels // 3 // num_heads), dtype=dtype)
    grad_heads, out_heads = (part.unflatten(3, (num_heads, -1)) for part in (grad, out))
    lse_heads = lse.movedim(1, 3)[..., None]
    for some in tiles(height, width, window_size, shift):
        bias = _Bias(some, table, window_size)
        q, k, v = _keys_and_values(some, qkv, qkv_bias, num_heads, dtype)
        g, o, norm = (_dense(some, part, dtype) for part in (grad_heads, out_heads, lse_heads))
        p = torch.matmul(q, k.transpose(-1, -2)).mul_(scale).add_(bias.values).sub_(norm).exp_()
        grad_v = torch.matmul(p.transpose(-1, -2), g)
        grad_s = torch.matmul(g, v.transpose(-1, -2)).sub_((g * o).sum(-1, keepdim=True)).mul_(p)
        bias.add_gradient(grad_s.sum((0, 1)), grad_table)
        grad_q = torch.matmul(grad_s, k).mul_(scale)
        grad_k = torch.matmul(grad_s.transpose(-1, -2), q).mul_(scale)
        if some.padded:
            grad_bias[1] += grad_k[..., -1, :].sum((0, 1))
            grad_bias[2] += grad_v[..., -1, :].sum((0, 1))
            grad_k, grad_v = grad_k[..., :-1, :], grad_v[..., :-1, :]
        for target, value in zip(_split(grad_qkv, num_heads), (grad_q, grad_k, grad_v), strict=True):
            to = some.heads(target)
            to.copy_(value.reshape(to.shape))
    grad_bias = grad_bias.flatten().to(qkv_bias.dtype) if qkv_bias.numel() else qkv_bias.new_empty(0)
    return grad_qkv, grad_table.to(bias_table.dtype), grad_bias
