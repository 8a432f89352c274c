"""The second stage of every split reduction: sums partial results in a fixed order, without atomics."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl

from .launch import launch, needs_int64

TILE = 2048  # elements of a program's tile: 16 for each thread of four warps
MAX_ROWS = 128  # of a tile over a wide matrix, so that it is at least 16 columns (64 bytes) wide


@triton.jit
def sum_partials_kernel(
    partials,
    out,
    rows,
    columns,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INT64: tl.constexpr,
):
    """Sums a block of columns of `partials` [rows, columns] over its rows."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        offset = (row.to(tl.int64) if INT64 else row)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(partials + offset, mask=inside, other=0.0)
    tl.store(out + column, (tl.sum(total, 0) * scale).to(out.dtype.element_ty), mask=column < columns)


def sum_partials(partials: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
    """Writes `partials.sum(0) * scale` to `out`, always adding in the same order.

    Args:
        partials: [rows, columns] float32, contiguous.
        out: [columns], contiguous, any floating dtype.
        scale: Factor of the sum.
    """
    rows, columns = partials.shape
    padded_rows, padded_columns = (triton.next_power_of_2(max(size, 1)) for size in (rows, columns))
    block_columns = min(padded_columns, TILE // min(padded_rows, MAX_ROWS))
    block_rows = min(padded_rows, TILE // block_columns)
    launch(
        sum_partials_kernel,
        (triton.cdiv(columns, block_columns),),
        partials,
        out,
        rows,
        columns,
        scale,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        INT64=needs_int64(partials),
        num_warps=4,
    )
