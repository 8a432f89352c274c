"""The column pass in Triton: a program holds a tile of keys, goes through the rows and sums them up."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from ..checks import interpreting
from ..launch import Passes, launch
from ..reduction import sum_partials
from ..tiles import LOG2E, block, diagonals, exclude_diagonal, load_tile, precision_of, row_stride, split, tile, touches

# Powers of two that probabilities in float16 are multiplied by: those below 2^-14 would lose digits, and a softmax over
# many keys has no others. Weights of up to 16 still fit.
FLOAT16_LIFT = 12


@triton.jit
def col_pass_kernel(
    queries,
    keys,
    lse,
    x,
    weight,
    bias,
    scale,
    output,
    rows,
    count,
    rows_per_split,
    first_excluded,
    second_excluded,
    WIDTH: tl.constexpr,
    X_WIDTH: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_X_WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXCLUDED: tl.constexpr,
    SHORT: tl.constexpr,
    LIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes the sum of weighted rows for BLOCK_KEYS keys over one split of the rows.

    The last tile of rows begins early, as that of keys does in the row pass.
    """
    key_start = tl.program_id(0) * BLOCK_KEYS
    key = key_start + tl.arange(0, BLOCK_KEYS)
    begin = tl.program_id(1) * rows_per_split
    end = min(begin + rows_per_split, rows)
    factor = tl.load(scale).to(tl.float32) * LOG2E

    total = tl.zeros([BLOCK_KEYS, BLOCK_X_WIDTH], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + key, mask=key < count, other=0.0).to(tl.float32) * LOG2E
    held = load_tile(keys, key_start, count, WIDTH, KEY_STRIDE, BLOCK_KEYS, BLOCK_WIDTH, True, UPCAST)
    # Values that do not change are better computed again than held in registers, of which there are none to spare.
    for fresh in tl.range(begin, end, BLOCK_ROWS, disable_licm=True):
        start = fresh if SHORT else min(fresh, end - BLOCK_ROWS)
        row = start + tl.arange(0, BLOCK_ROWS)
        counts = (row < end) & (row >= fresh)
        minus = -LOG2E * tl.load(lse + row, mask=counts, other=float("-inf")).to(tl.float32)
        # A row without a key, or one that the tile before counted, gets probability 0.
        minus = tl.where(minus == float("inf"), float("-inf"), minus + LIFT)
        tile = load_tile(queries, start, end, WIDTH, QUERY_STRIDE, BLOCK_ROWS, BLOCK_WIDTH, SHORT, UPCAST)
        logits = tl.dot(held, tl.trans(tile), input_precision=PRECISION)
        logits = logits * factor + minus[None, :]
        if HAS_BIAS:
            logits += shift[:, None]
        if EXCLUDED > 0:
            special = touches(start, key_start, first_excluded, BLOCK_ROWS, BLOCK_KEYS)
            if EXCLUDED > 1:
                special |= touches(start, key_start, second_excluded, BLOCK_ROWS, BLOCK_KEYS)
            if special:
                logits = exclude_diagonal(logits, row[None, :], key[:, None], first_excluded)
                if EXCLUDED > 1:
                    logits = exclude_diagonal(logits, row[None, :], key[:, None], second_excluded)
        probability = tl.exp2(logits)
        if HAS_WEIGHT:
            factors = tl.load(weight + row, mask=counts, other=0.0).to(tl.float32)
            probability *= factors[None, :]
        if SHARED:
            term = tile
        else:
            term = load_tile(x, start, end, X_WIDTH, X_STRIDE, BLOCK_ROWS, BLOCK_X_WIDTH, SHORT, UPCAST)
        total = tl.dot(probability.to(term.dtype), term, total, input_precision=PRECISION)

    if LIFT != 0:
        total *= 1.0 / (1 << LIFT)
    column = tl.arange(0, BLOCK_X_WIDTH)
    place = tl.program_id(1).to(tl.int64) * count + key_start
    local = tl.arange(0, BLOCK_KEYS)
    target = output + place * X_WIDTH + (local[:, None] * X_WIDTH + column[None, :])
    tl.store(target, total, mask=(key < count)[:, None] & (column < X_WIDTH)[None, :])


def forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    exclude: Sequence[int],
) -> torch.Tensor:
    """Launches the pass and, where the rows are split, the sum of the parts. Arguments and result as in reference."""
    return forward_in(precision_of(queries.dtype), queries, keys, lse, x, weight, bias, scale, exclude)


def forward_in(
    precision: str,
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    exclude: Sequence[int],
) -> torch.Tensor:
    """Does so with float32 operands in a given precision, `ieee` or `tf32`."""
    rows, width = queries.shape
    count = keys.shape[0]
    shared = x is None
    x = queries if x is None else x
    x_width = x.shape[1]
    excluded, first, second = diagonals(exclude, rows, count)
    layout = tile("col", queries, max(width, x_width), shared, precision, rows)
    parts, rows_per_split = split(count, rows, layout)
    output = torch.empty((count, x_width), dtype=torch.float32, device=queries.device)
    partials = torch.empty((parts, count, x_width), dtype=torch.float32, device=queries.device) if parts > 1 else output
    launch(
        col_pass_kernel,
        (triton.cdiv(count, layout.held), parts),
        queries,
        keys,
        lse,
        x,
        weight,
        bias,
        scale,
        partials,
        rows,
        count,
        rows_per_split,
        first,
        second,
        WIDTH=width,
        X_WIDTH=x_width,
        QUERY_STRIDE=row_stride(queries),
        KEY_STRIDE=row_stride(keys),
        X_STRIDE=row_stride(x),
        BLOCK_ROWS=layout.streamed,
        BLOCK_KEYS=layout.held,
        BLOCK_WIDTH=block(width),
        BLOCK_X_WIDTH=block(x_width),
        SHARED=shared,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        EXCLUDED=excluded,
        SHORT=rows < layout.streamed,
        LIFT=FLOAT16_LIFT if queries.dtype == torch.float16 else 0,
        PRECISION=precision,
        UPCAST=interpreting(),
        num_warps=layout.warps,
        num_stages=layout.stages,
    )
    if parts > 1:
        sum_partials(partials.view(parts, -1), output.view(-1))
    return output


def _example(
    rows: int,
    count: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    x_width: int = 0,
    weight: bool = False,
    bias: bool = False,
    exclude: Sequence[int] = (),
    precision: str = "ieee",
    device: torch.device | str,
) -> Passes:
    """Returns arguments of the pass; 0 as the width of x shares the queries."""
    randn = partial(torch.randn, dtype=dtype, device=device)
    statistics = partial(torch.randn, device=device)
    arguments = (
        randn(rows, width),
        randn(count, width),
        statistics(rows),
        randn(rows, x_width) if x_width else None,
        statistics(rows) if weight else None,
        statistics(count) if bias else None,
        torch.ones((), device=device),
        exclude,
    )
    return {"forward_in": (precision, *arguments)}


def representative_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of arguments whose launches cover the compiled variants, for the resource table."""
    contrastive = partial(_example, 4096, 32768)
    views = partial(_example, 8192, 8192, exclude=(0,))
    prototypes = partial(_example, 6272, 65536, weight=True, bias=True)
    return {
        "bf16 D256": partial(contrastive, 256),
        "bf16 D256 two diagonals": partial(views, 256, exclude=(0, 4096)),
        "bf16 D256 x, weight and bias": partial(prototypes, 256, x_width=256),
        "bf16 D128 diagonal": partial(views, 128),
        "bf16 D64": partial(contrastive, 64),
        "bf16 D512": partial(contrastive, 512),
        "bf16 D384 x, weight and bias": partial(prototypes, 384, x_width=384),
        "fp16 D96": partial(contrastive, 96, torch.float16),
        "fp32 D128": partial(contrastive, 128, torch.float32),
        "fp32 D256": partial(contrastive, 256, torch.float32),
        "fp32 D512": partial(contrastive, 512, torch.float32),
        "tf32 D256": partial(contrastive, 256, torch.float32, precision="tf32"),
        "tf32 D256 x, weight and bias": partial(prototypes, 256, torch.float32, x_width=256, precision="tf32"),
    }
