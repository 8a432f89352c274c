"""The row pass in Triton: a program holds a tile of queries and goes through the keys with an online softmax."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from ..checks import interpreting
from ..launch import Passes, launch
from ..tiles import (
    LN2,
    LOG2E,
    block,
    diagonals,
    exclude_diagonal,
    load_tile,
    precision_of,
    row_stride,
    split,
    tile,
    touches,
)

MERGED = 1024  # elements of a program's tile when the parts of a split pass are merged


@triton.jit
def row_pass_kernel(
    queries,
    keys,
    values,
    bias,
    scale,
    lse,
    output,
    rows,
    count,
    keys_per_split,
    first_excluded,
    second_excluded,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE_WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXCLUDED: tl.constexpr,
    BOUNDED: tl.constexpr,
    OUTPUT: tl.constexpr,
    SHORT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes the log-sum-exp and the mean value of BLOCK_ROWS rows over one split of the keys.

    The last tile of keys begins so early that it is full, and counts only the keys that the tile before it did not:
    then no load has a mask, except where there are fewer keys than a tile holds (SHORT).
    """
    row_start = tl.program_id(0) * BLOCK_ROWS
    row = row_start + tl.arange(0, BLOCK_ROWS)
    begin = tl.program_id(1) * keys_per_split
    end = min(begin + keys_per_split, count)
    factor = tl.load(scale).to(tl.float32) * LOG2E

    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mean = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_WIDTH], tl.float32)
    held = load_tile(queries, row_start, rows, WIDTH, QUERY_STRIDE, BLOCK_ROWS, BLOCK_WIDTH, True, UPCAST)
    # Values that do not change are better computed again than held in registers, of which there are none to spare.
    for fresh in tl.range(begin, end, BLOCK_KEYS, disable_licm=True):
        start = fresh if SHORT else min(fresh, end - BLOCK_KEYS)
        key = start + tl.arange(0, BLOCK_KEYS)
        tile = load_tile(keys, start, end, WIDTH, KEY_STRIDE, BLOCK_KEYS, BLOCK_WIDTH, SHORT, UPCAST)
        logits = tl.dot(held, tl.trans(tile), input_precision=PRECISION)
        logits *= factor
        if HAS_BIAS:
            if SHORT:
                shift = tl.load(bias + key, mask=key < end, other=0.0)
            else:
                shift = tl.load(bias + key)
            logits += (shift.to(tl.float32) * LOG2E)[None, :]
        # Few tiles are cut off or crossed by a diagonal.
        special = start + BLOCK_KEYS > end if SHORT else start < fresh
        if EXCLUDED > 0:
            special |= touches(row_start, start, first_excluded, BLOCK_ROWS, BLOCK_KEYS)
        if EXCLUDED > 1:
            special |= touches(row_start, start, second_excluded, BLOCK_ROWS, BLOCK_KEYS)
        if special:
            counts = key < end if SHORT else key >= fresh
            logits = tl.where(counts[None, :], logits, float("-inf"))
            if EXCLUDED > 0:
                logits = exclude_diagonal(logits, row[:, None], key[None, :], first_excluded)
            if EXCLUDED > 1:
                logits = exclude_diagonal(logits, row[:, None], key[None, :], second_excluded)
        if BOUNDED:
            weight = tl.exp2(logits)
            total += tl.sum(weight, 1)
        else:
            higher = tl.maximum(peak, tl.max(logits, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has met no key yet
            rescale = tl.exp2(peak - base)
            peak = higher
            weight = tl.exp2(logits - base[:, None])
            total = total * rescale + tl.sum(weight, 1)
            if OUTPUT:
                mean *= rescale[:, None]
        if OUTPUT:
            if SHARED:
                value = tile
            else:
                value = load_tile(
                    values, start, end, VALUE_WIDTH, VALUE_STRIDE, BLOCK_KEYS, BLOCK_VALUE_WIDTH, SHORT, UPCAST
                )
            mean = tl.dot(weight.to(value.dtype), value, mean, input_precision=PRECISION)

    log = tl.log2(total)
    if not BOUNDED:
        log += tl.where(peak == float("-inf"), 0.0, peak)
    place = tl.program_id(1).to(tl.int64) * rows + row_start
    local = tl.arange(0, BLOCK_ROWS)
    tl.store(lse + place + local, log * LN2, mask=row < rows)
    if OUTPUT:
        column = tl.arange(0, BLOCK_VALUE_WIDTH)
        mean *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]  # a row without a key has mean 0
        target = output + place * VALUE_WIDTH + (local[:, None] * VALUE_WIDTH + column[None, :])
        tl.store(target, mean, mask=(row < rows)[:, None] & (column < VALUE_WIDTH)[None, :])


@triton.jit
def merge_kernel(
    partial_lse,
    partial_output,
    lse,
    output,
    rows,
    parts,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """Merges the parts of a split pass, in their order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for part in range(parts):
        place = tl.cast(part, tl.int64) * rows + row
        peak = tl.maximum(peak, tl.load(partial_lse + place, mask=inside, other=float("-inf")))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mean = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    column = tl.arange(0, BLOCK_WIDTH)
    in_tile = inside[:, None] & (column < WIDTH)[None, :]
    for part in range(parts):
        place = tl.cast(part, tl.int64) * rows + row
        share = tl.exp(tl.load(partial_lse + place, mask=inside, other=float("-inf")) - base)
        total += share
        if OUTPUT:
            value = tl.load(partial_output + place[:, None] * WIDTH + column[None, :], mask=in_tile, other=0.0)
            mean += share[:, None] * value
    tl.store(lse + row, tl.log(total) + base, mask=inside)
    if OUTPUT:
        mean *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]  # a row without a key has mean 0
        tl.store(output + row[:, None] * WIDTH + column[None, :], mean, mask=in_tile)


def forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    exclude: Sequence[int],
    bounded: bool,
    need_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the pass and, where the keys are split, the merge. Arguments and results as in the reference."""
    return forward_in(precision_of(queries.dtype), queries, keys, values, bias, scale, exclude, bounded, need_output)


def forward_in(
    precision: str,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    exclude: Sequence[int],
    bounded: bool,
    need_output: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does so with float32 operands in a given precision, `ieee` or `tf32`."""
    rows, width = queries.shape
    count = keys.shape[0]
    shared = values is None
    values = keys if values is None else values
    value_width = values.shape[1] if need_output else 1
    excluded, first, second = diagonals(exclude, rows, count)
    # The largest tiles, of keys that are also values, leave no register to compare with a diagonal, or for the
    # addresses of rows that are not loaded 16 bytes at a time.
    vectors = all(size * queries.itemsize % 16 == 0 for size in (width, row_stride(queries), row_stride(keys)))
    largest = (shared or not need_output) and not excluded and vectors
    layout = tile("row", queries, max(width, value_width), largest, precision, count)
    parts, keys_per_split = split(rows, count, layout)

    def results(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        lse = torch.empty(shape, dtype=torch.float32, device=queries.device)
        size = (*shape, values.shape[1]) if need_output else (0, values.shape[1])
        return lse, torch.empty(size, dtype=torch.float32, device=queries.device)

    lse, output = results(rows)
    partial_lse, partial_output = results(parts, rows) if parts > 1 else (lse, output)
    launch(
        row_pass_kernel,
        (triton.cdiv(rows, layout.held), parts),
        queries,
        keys,
        values,
        bias,
        scale,
        partial_lse,
        partial_output,
        rows,
        count,
        keys_per_split,
        first,
        second,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        QUERY_STRIDE=row_stride(queries),
        KEY_STRIDE=row_stride(keys),
        VALUE_STRIDE=row_stride(values),
        BLOCK_ROWS=layout.held,
        BLOCK_KEYS=layout.streamed,
        BLOCK_WIDTH=block(width),
        BLOCK_VALUE_WIDTH=block(value_width),
        SHARED=shared,
        HAS_BIAS=bias is not None,
        EXCLUDED=excluded,
        # Without a maximum subtracted, weights reach e^60, which float16 cannot hold.
        BOUNDED=bounded and queries.dtype != torch.float16,
        OUTPUT=need_output,
        SHORT=count < layout.streamed,
        PRECISION=precision,
        UPCAST=interpreting(),
        num_warps=layout.warps,
        num_stages=layout.stages,
    )
    if parts > 1:
        block_width = block(value_width)
        block_rows = max(MERGED // block_width, 1)
        launch(
            merge_kernel,
            (triton.cdiv(rows, block_rows),),
            partial_lse,
            partial_output,
            lse,
            output,
            rows,
            parts,
            WIDTH=value_width,
            BLOCK_ROWS=block_rows,
            BLOCK_WIDTH=block_width,
            OUTPUT=need_output,
            num_warps=4,
        )
    return lse, output


def _example(
    rows: int,
    count: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    value_width: int = 0,
    bias: bool = False,
    exclude: Sequence[int] = (),
    bounded: bool = False,
    output: bool = True,
    precision: str = "ieee",
    device: torch.device | str,
) -> Passes:
    """Returns arguments of the pass; 0 as the width of the values shares the keys."""
    randn = partial(torch.randn, dtype=dtype, device=device)
    values = randn(count, value_width) if value_width else None
    biases = torch.randn(count, device=device) if bias else None
    scale = torch.ones((), device=device)
    arguments = (randn(rows, width), randn(count, width), values, biases, scale, exclude, bounded, output)
    return {"forward_in": (precision, *arguments)}


def representative_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of arguments whose launches cover the compiled variants, for the resource table."""
    contrastive = partial(_example, 4096, 32768)
    views = partial(_example, 8192, 8192, exclude=(0,))
    prototypes = partial(_example, 6272, 65536)
    return {
        "bf16 D256": partial(contrastive, 256),
        "bf16 D256 bounded": partial(contrastive, 256, bounded=True),
        "bf16 D256 lse only": partial(contrastive, 256, output=False),
        "bf16 D256 values and bias": partial(prototypes, 256, value_width=256, bias=True),
        "bf16 D256 two diagonals": partial(views, 256, exclude=(0, 4096)),
        "bf16 D128 diagonal": partial(views, 128, bounded=True),
        "bf16 D128 values and bias": partial(prototypes, 128, value_width=128, bias=True),
        "bf16 D64": partial(contrastive, 64),
        "bf16 D512": partial(contrastive, 512),
        "bf16 D384 values and bias": partial(prototypes, 384, value_width=384, bias=True),
        "fp16 D96": partial(contrastive, 96, torch.float16),
        "fp32 D128": partial(contrastive, 128, torch.float32),
        "fp32 D256": partial(contrastive, 256, torch.float32),
        "fp32 D512": partial(contrastive, 512, torch.float32),
        "tf32 D256": partial(contrastive, 256, torch.float32, precision="tf32"),
        "tf32 D256 values and bias": partial(
            prototypes, 256, torch.float32, value_width=256, bias=True, precision="tf32"
        ),
    }
