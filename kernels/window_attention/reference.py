"""Window attention in plain PyTorch: dense attention within the rectangles that the windows and the mask leave.

A shifted window is a window of the rolled map, and the mask keeps apart what the roll has brought together from
opposite edges. In the map itself, rows (and columns) are therefore cut at 0, s, s + w, s + 2 w...: attention is dense
within each rectangle between the cuts. Nothing is rolled and nothing is masked. Equal rectangles are one batch of
products, a few images at a time, so that their scores stay in the processor's cache.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import torch

PIECE = 2**19  # scores at a time: 2 MB in float32, which the caches of two cores hold beside the rest


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the softmax and of the log-sum-exp: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the factors of the products."""
    return dtype if dtype == torch.bfloat16 else compute_dtype(dtype)


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
    for start, end in pairwise(edges):
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
    """Rectangles of equal size, `rows.count` times `columns.count` of them in each image."""

    rows: Run
    columns: Run

    @property
    def padded(self) -> bool:
        """Whether padded tokens are among the keys."""
        return self.rows.full > self.rows.real or self.columns.full > self.columns.real

    def pieces(self, batch: int, heads: int) -> Iterator[slice]:
        """Yields images whose scores fit the cache, as many as can be, one at least."""
        scores = heads * self.rows.count * self.columns.count * (self.rows.real * self.columns.real) ** 2
        step = max(1, PIECE // scores)
        return (slice(image, image + step) for image in range(0, batch, step))

    def heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Views [B, H, W, heads, d] as [B, rows, columns, heads, height, width, d] of the rectangles."""
        down, across = self.rows, self.columns
        part = tensor.narrow(1, down.start, down.count * down.real)
        part = part.narrow(2, across.start, across.count * across.real)
        return (
            part.unflatten(1, (down.count, down.real))
            .unflatten(3, (across.count, across.real))
            .permute(0, 1, 3, 5, 2, 4, 6)
        )

    def dense(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Copies [B, H, W, heads, d] to [rectangles, heads, tokens, d]."""
        view = self.heads(tensor)
        copy = torch.empty(view.shape, dtype=dtype, device=view.device).copy_(view)
        return copy.flatten(4, 5).flatten(0, 2)

    def write(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Stores [rectangles, heads, tokens, d] in [B, H, W, heads, d]."""
        view = self.heads(target)
        view.copy_(values.view(view.shape))

    def keys(self, whole: torch.Tensor) -> torch.Tensor:
        """Views what a whole window has for pairs, [heads, w, w, w, w], for tokens and all keys, padded ones too."""
        down, across = self.rows, self.columns
        return whole[:, : down.real, : across.real, : down.full, : across.full]

    def tokens(self, pairs: torch.Tensor) -> torch.Tensor:
        """Views what `keys` returns for tokens and tokens."""
        return pairs[..., : self.rows.real, : self.columns.real]


def tiles(height: int, width: int, window: int, shift: int) -> Iterator[Tiles]:
    """Yields the rectangles of a map."""
    for down, across in product(runs(height, window, shift), runs(width, window, shift)):
        yield Tiles(down, across)


@functools.cache
def relative_index(window: int, device: torch.device) -> torch.Tensor:
    """Returns which row of the bias table each pair of tokens of a window uses, [queries, keys], int64."""
    axis = torch.arange(window, device=device)
    delta = axis[:, None] - axis + window - 1
    index = delta[:, None, :, None] * (2 * window - 1) + delta[None, :, None, :]
    return index.reshape(window**2, window**2)


class _Bias:
    """What is added to the scores of some rectangles. All padded keys are one, whose logit is their log-sum-exp."""

    def __init__(self, some: Tiles, whole: torch.Tensor) -> None:
        self.some = some
        part = some.keys(whole)
        values = some.tokens(part).flatten(3).flatten(1, 2)  # [heads, queries, keys]
        if some.padded:
            pads = part.clone()
            some.tokens(pads).fill_(-torch.inf)
            pads = pads.flatten(3).flatten(1, 2)
            virtual = torch.logsumexp(pads, 2, keepdim=True)
            self.share = pads.sub_(virtual).exp_()
            values = torch.cat([values, virtual], dim=2)
        self.values = values

    def add_gradient(self, grad: torch.Tensor, whole: torch.Tensor) -> None:
        """Adds the gradient of `values` to that of the biases of a whole window."""
        part = self.some.keys(whole)
        if self.some.padded:
            part += (grad[..., -1:] * self.share).view(part.shape)
            grad, part = grad[..., :-1], self.some.tokens(part)
        part += grad.reshape(part.shape)


def _whole_bias(table: torch.Tensor, window: int) -> torch.Tensor:
    """Returns the biases of a whole window, [heads, w, w, w, w]: row, column of the query; of the key."""
    values = table.t().contiguous()[:, relative_index(window, table.device)]
    return values.view(-1, window, window, window, window)


def _fold(grad: torch.Tensor) -> torch.Tensor:
    """Adds the gradient of `_whole_bias` up to that of the table, in a fixed order."""
    heads, window = grad.shape[:2]
    rows = grad.new_zeros((heads, 2 * window - 1, window, window))  # by offset of rows, column of query and of key
    for row in range(window):
        rows[:, row : row + window] += grad[:, row].movedim(2, 1).flip(1)
    table = grad.new_zeros((heads, 2 * window - 1, 2 * window - 1))
    for column in range(window):
        table[..., column : column + window] += rows[:, :, column].flip(2)
    return table.flatten(1).t()


def _split(packed: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views q, k and v [..., heads, d] of [..., 3 C]."""
    q, k, v = packed.unflatten(-1, (3, heads, -1)).unbind(-3)
    return q, k, v


class _Operands:
    """Queries, keys and values of some rectangles, [rectangles heads, tokens, d]; padding is one key more."""

    def __init__(self, some: Tiles, qkv: torch.Tensor, qkv_bias: torch.Tensor, heads: int) -> None:
        dtype = _operand_dtype(qkv.dtype)
        q, k, v = (some.dense(part, dtype) for part in _split(qkv, heads))
        if some.padded:
            bias = qkv_bias if qkv_bias.numel() else qkv.new_zeros(qkv.shape[-1])
            _, pad_k, pad_v = (part[:, None].expand(len(q), heads, 1, -1) for part in _split(bias.to(dtype), heads))
            k, v = torch.cat([k, pad_k], dim=2), torch.cat([v, pad_v], dim=2)
        self.q, self.k, self.v = (part.flatten(0, 1) for part in (q, k, v))

    def scores(self, bias: torch.Tensor, scale: float) -> torch.Tensor:
        """Returns the biased scores, [rectangles, heads, queries, keys], in the dtype of the bias."""
        products = torch.bmm(self.q, self.k.transpose(1, 2))
        return torch.add(bias, products.view(-1, *bias.shape), alpha=scale)


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns `scale * a @ b` for batches of matrices, scaled before it is rounded."""
    return torch.baddbmm(b.new_empty(()), a, b, beta=0, alpha=scale)


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
    out_heads, lse_heads = out.unflatten(3, (num_heads, -1)), lse.movedim(1, 3)[..., None]
    with torch.autocast(qkv.device.type, enabled=False):  # it would take the products in half precision
        whole = _whole_bias(bias_table.to(dtype), window_size)
        for some in tiles(height, width, window_size, shift):
            bias = _Bias(some, whole).values
            for images in some.pieces(batch, num_heads):
                operands = _Operands(some, qkv[images], qkv_bias, num_heads)
                scores = operands.scores(bias, scale)
                top = scores.amax(-1, keepdim=True)
                weights = scores.sub_(top).exp_()
                total = weights.sum(-1, keepdim=True)
                rounded = torch.div(weights, total, out=torch.empty_like(weights, dtype=operands.v.dtype))
                result = torch.bmm(rounded.flatten(0, 1), operands.v)
                some.write(out_heads[images], result.unflatten(0, (-1, num_heads)))
                some.write(lse_heads[images], top.add_(total.log_()))
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
    grad_qkv = qkv.new_empty((batch, height, width, channels))
    grad_bias = qkv_bias.new_zeros((3, num_heads, channels // 3 // num_heads), dtype=dtype)
    grad_heads, out_heads = (part.unflatten(3, (num_heads, -1)) for part in (grad, out))
    lse_heads = lse.movedim(1, 3)[..., None]
    with torch.autocast(qkv.device.type, enabled=False):
        whole = _whole_bias(bias_table.to(dtype), window_size)
        grad_whole = torch.zeros_like(whole)
        for some in tiles(height, width, window_size, shift):
            bias = _Bias(some, whole)
            for images in some.pieces(batch, num_heads):
                operands = _Operands(some, qkv[images], qkv_bias, num_heads)
                parts = grad_heads[images], out_heads[images], lse_heads[images]
                grads, grad_scores = _piece_backward(some, operands, bias.values, scale, *parts)
                bias.add_gradient(grad_scores.sum(0), grad_whole)
                for number, (target, value) in enumerate(zip(_split(grad_qkv[images], num_heads), grads, strict=True)):
                    value = value.unflatten(0, (-1, num_heads))
                    if some.padded and number > 0:
                        grad_bias[number] += value[:, :, -1].sum(0, dtype=dtype)
                        value = value[:, :, :-1]
                    some.write(target, value)
    grad_bias = grad_bias.flatten().to(qkv_bias.dtype) if qkv_bias.numel() else qkv_bias.new_empty(0)
    return grad_qkv, _fold(grad_whole).to(bias_table.dtype).contiguous(), grad_bias


def _piece_backward(
    some: Tiles,
    operands: _Operands,
    bias: torch.Tensor,
    scale: float,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns the gradients of queries, keys and values, as the operands lie, and that of the scores."""
    q, k, v = operands.q, operands.k, operands.v
    dense = some.dense(grad, bias.dtype)
    delta = dense.mul(some.dense(out, bias.dtype)).sum(-1, keepdim=True)
    g = dense.to(v.dtype).flatten(0, 1)
    weights = operands.scores(bias, scale).sub_(some.dense(lse, bias.dtype)).exp_()
    grad_v = torch.bmm(weights.to(v.dtype).flatten(0, 1).transpose(1, 2), g)
    grad_scores = torch.sub(torch.bmm(g, v.transpose(1, 2)).view(weights.shape), delta).mul_(weights)
    rounded = grad_scores.to(v.dtype).flatten(0, 1)
    grad_q, grad_k = _scaled_product(rounded, k, scale), _scaled_product(rounded.transpose(1, 2), q, scale)
    return (grad_q, grad_k, grad_v), grad_scores
