"""What the kernels of the two softmax passes share: loads of tiles, excluded diagonals, and how work is laid out."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import capability_of

MULTIPROCESSORS = 132  # of an H200. A fixed number, so that all GPUs of a generation add the same parts
MAX_SPLITS = 16
OVERHEAD = 2.0  # tiles' time that a program takes to load what it holds, to fill its pipeline and to write its result
PARTIAL = 1 / 32  # tiles' time that one program's partial result takes to be written and read again
MIN_BLOCK = 16  # what a matrix instruction takes

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INT32_ELEMENTS = tl.constexpr(2**31 - 1)


@triton.jit
def load_tile(
    matrix,
    start,
    end,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Loads ROWS rows from `start` of a matrix of WIDTH columns, padded to BLOCK columns.

    The padding is zero. So are rows from `end` on if MASKED; else there must be none of them.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    # The address of the tile's first row is a 64-bit scalar. Offsets inside the tile are constants, for which the
    # stride is one: they become immediates, where 16 registers would hold them otherwise.
    origin = matrix + start.to(tl.int64) * STRIDE
    offset = (row.to(tl.int64) if ROWS * STRIDE > INT32_ELEMENTS else row)[:, None] * STRIDE + column[None, :]
    if MASKED and WIDTH != BLOCK:
        tile = tl.load(origin + offset, mask=(row < end - start)[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(origin + offset, mask=(row < end - start)[:, None], other=0.0)
    elif WIDTH != BLOCK:
        tile = tl.load(origin + offset, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(origin + offset)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def touches(row, key, offset, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Whether the diagonal `key = row + offset` crosses the tile of ROWS rows from `row` and KEYS keys from `key`."""
    return (row + offset < key + KEYS) & (key < row + offset + ROWS)


@triton.jit
def exclude_diagonal(logits, row, key, offset):
    """Returns the tile of logits with -inf on the diagonal `key = row + offset`; `row` and `key` are broadcast."""
    return tl.where(key == row + offset, float("-inf"), logits)


@dataclass(frozen=True)
class Tile:
    """How a program of a pass is laid out.

    Attributes:
        held: Rows of the matrix of which a program holds a tile: queries in the row pass, keys in the column pass.
        streamed: Rows of a tile of the other matrix, which the program goes through.
        warps: Of the program.
        stages: Of the pipeline that loads tiles ahead of their use.
    """

    held: int
    streamed: int
    warps: int
    stages: int


# By the widest row in columns. What fits was found by compiling for the three targets: tiles spill or exceed the shared
# memory soon beyond these. Those for 8.0 also fit the 101,376 bytes of 8.6, 8.9 and 12.0.
_SMALL = {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2), 512: Tile(32, 32, 8, 2)}
_SMALL_SHARED = _SMALL | {256: Tile(64, 64, 8, 2)}
_LARGE = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2), 512: Tile(64, 32, 8, 2)}
_TABLES = {
    "row 80": _SMALL,
    "row 80 shared": _SMALL_SHARED,
    "row 90": _LARGE,
    "row 90 shared": _LARGE | {128: Tile(128, 128, 8, 2), 256: Tile(128, 128, 8, 2), 512: Tile(64, 64, 8, 2)},
    "row 100": _LARGE,
    "row 100 shared": _LARGE | {128: Tile(128, 128, 8, 2)},
    "col 80": _SMALL,
    "col 80 shared": _SMALL_SHARED,
    "col 90": _LARGE,
    "col 90 shared": _LARGE | {256: Tile(128, 64, 8, 3), 512: Tile(64, 64, 8, 2)},
    "col 100": _LARGE | {256: Tile(128, 32, 8, 2)},
    "col 100 shared": _LARGE,
}
# float32 on the cores that multiply one by one, and rounded to TF32 on the tensor cores.
_IEEE = {64: Tile(64, 32, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(32, 16, 8, 2), 512: Tile(16, 16, 8, 1)}
_TF32_SMALL = {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 4, 2), 256: Tile(32, 16, 8, 2), 512: Tile(16, 16, 8, 1)}
_TF32_LARGE = _TF32_SMALL | {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(64, 32, 8, 2)}


def block(width: int) -> int:
    """Returns the power of two that rows of `width` columns are padded to."""
    return max(int(triton.next_power_of_2(width)), MIN_BLOCK)


def precision_of(dtype: torch.dtype) -> str:
    """Returns how operands are multiplied: float32 in TF32 where torch.set_float32_matmul_precision allows it."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def tile(kind: str, queries: torch.Tensor, width: int, shared: bool, precision: str, streamed: int) -> Tile:
    """Returns the layout of a pass's programs.

    Args:
        kind: `row` or `col`.
        queries: For their dtype and device.
        width: Of the widest of the rows involved.
        shared: Whether one tile serves both products.
        precision: Of `precision_of`.
        streamed: Number of rows to go through; the tile is no larger, so that it can be full.
    """
    capability = capability_of(queries.device)
    generation = 100 if 100 <= capability < 120 else 90 if 90 <= capability < 100 else 80
    key = max(block(width), 64)
    if queries.dtype != torch.float32:
        chosen = _TABLES[f"{kind} {generation}" + (" shared" if shared else "")][key]
    elif precision == "ieee":
        chosen = _IEEE[key]
    else:
        chosen = (_TF32_SMALL if generation == 80 else _TF32_LARGE)[key]
    full = max(1 << max(streamed, 1).bit_length() - 1, MIN_BLOCK)
    return Tile(chosen.held, min(chosen.streamed, full), chosen.warps, chosen.stages)


def split(rows: int, streamed: int, layout: Tile) -> tuple[int, int]:
    """Divides the rows that programs go through, where the held ones alone would not occupy a large GPU.

    Returns:
        The number of parts, and the rows of each but the last, a multiple of the tile.
    """
    programs, tiles = triton.cdiv(rows, layout.held), triton.cdiv(streamed, layout.streamed)

    def cost(parts: int) -> float:
        waves = triton.cdiv(programs * parts, MULTIPROCESSORS)
        return waves * (triton.cdiv(tiles, parts) + OVERHEAD) + (programs * parts * PARTIAL if parts > 1 else 0.0)

    parts = min(range(1, MAX_SPLITS + 1), key=cost)
    each = max(triton.cdiv(tiles, parts), 1) * layout.streamed
    return max(triton.cdiv(streamed, each), 1), each


def diagonals(exclude: Iterable[int], rows: int, count: int) -> tuple[int, int, int]:
    """Returns how many excluded diagonals cross the matrix of logits, and two offsets, 0 where there are fewer."""
    crossing = [offset for offset in dict.fromkeys(exclude) if -rows < offset < count]
    first, second = [*crossing, 0, 0][:2]
    return len(crossing), first, second


def row_stride(matrix: torch.Tensor) -> int:
    """Returns the stride of rows. That of a single row is arbitrary, and would only cost a compilation."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]
