"""What the kernels of both directions share: where the tokens of a window lie, and which bias belongs to a pair."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from ..tiles import LOG2E


@triton.jit
def split_window(window, sizes):
    """Returns the image of a window, and the window's place in it, counted in windows down and across."""
    within = window % (sizes[2] * sizes[3])
    return (window // (sizes[2] * sizes[3])).to(tl.int64), within // sizes[3], within % sizes[3]


@triton.jit
def locate(
    position,
    down,
    across,
    sizes,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    INT64: tl.constexpr,
):
    """Returns row and column in the map of a window's positions, whether a token is there, and their regions.

    `sizes` are height and width of the map in tokens, then in windows. The map is read as if it were padded to whole
    windows and rolled by -SHIFT. In the last windows that brings together tokens from opposite edges: they are of
    different regions.
    """
    row = down * WINDOW + position // WINDOW
    column = across * WINDOW + position % WINDOW
    region = tl.zeros_like(position)
    if SHIFT > 0:
        below = row >= sizes[2] * WINDOW - SHIFT
        beside = column >= sizes[3] * WINDOW - SHIFT
        region = below.to(tl.int32) * 2 + beside.to(tl.int32)
        row += tl.where(below, SHIFT - sizes[2] * WINDOW, SHIFT)
        column += tl.where(beside, SHIFT - sizes[3] * WINDOW, SHIFT)
    real = position >= 0
    if PADDED:
        real = (row < sizes[0]) & (column < sizes[1])
    if INT64:
        row = row.to(tl.int64)
    return row, column, real, region


@triton.jit
def slope(position, WINDOW: tl.constexpr):
    """Returns the number by which positions differ as their pair's entry in the table of biases does from another's."""
    return (position // WINDOW) * (2 * WINDOW - 1) + position % WINDOW


@triton.jit
def load_bias(table, difference, stride, WINDOW: tl.constexpr):
    """Returns the biases of pairs, for base 2, by the difference of their slopes, that of the query first."""
    entry = difference + 2 * WINDOW * (WINDOW - 1)
    return tl.load(table + entry * stride).to(tl.float32) * LOG2E


@triton.jit
def load_head(vector, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr):
    """Loads the channels of one head, padded with zeros to BLOCK_HEAD."""
    channel = tl.arange(0, BLOCK_HEAD)
    return tl.load(vector + channel, mask=channel < HEAD, other=0.0)


@triton.jit
def load_tokens(base, offset, real, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, UPCAST: tl.constexpr):
    """Loads the channels of one head of tokens, zero where there is no token and from HEAD to BLOCK_HEAD."""
    channel = tl.arange(0, BLOCK_HEAD)
    mask = real[:, None]
    if HEAD != BLOCK_HEAD:
        mask = mask & (channel < HEAD)[None, :]
    tile = tl.load(base + offset[:, None] + channel[None, :], mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tokens(base, offset, real, tile, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr):
    """Stores the channels of one head where there are tokens."""
    channel = tl.arange(0, BLOCK_HEAD)
    mask = real[:, None]
    if HEAD != BLOCK_HEAD:
        mask = mask & (channel < HEAD)[None, :]
    tl.store(base + offset[:, None] + channel[None, :], tile.to(base.dtype.element_ty), mask=mask)
