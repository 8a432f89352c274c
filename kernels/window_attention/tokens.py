"""What the kernels of both directions share: where a window's tokens lie, their biases, and how work is laid out."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..checks import interpreting
from ..launch import capability_of, needs_int64
from ..tiles import LOG2E, MIN_BLOCK, block, precision_of

LARGEST = 64  # positions of a tile's side: the least that the matrix units of compute capability 9.0 take


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


@dataclass(frozen=True)
class Layout:
    """How the windows of a call are divided.

    Attributes:
        sizes: Height and width of the map in tokens, then in windows.
        windows: Number of windows of all images.
        held: Positions of which a program holds a tile.
        streamed: Positions of a tile that it goes through.
        tiles: Number of tiles of held positions that cover a window.
        together: Whether one program computes all gradients of a window.
        keys: Columns of a matrix of a window's pairs, as partial sums of them are stored.
        constants: Compile-time arguments of every kernel.
    """

    sizes: tuple[int, int, int, int]
    windows: int
    held: int
    streamed: int
    tiles: int
    together: bool
    keys: int
    constants: dict[str, Any]


def layout(
    qkv: torch.Tensor, qkv_bias: torch.Tensor, window_size: int, shift: int, num_heads: int, *tensors: torch.Tensor
) -> Layout:
    """Returns how a call is divided; `tensors` are further maps that its kernels address."""
    batch, height, width, channels = qkv.shape
    down, across = triton.cdiv(height, window_size), triton.cdiv(width, window_size)
    positions = window_size * window_size
    whole = max(int(triton.next_power_of_2(positions)), MIN_BLOCK)
    # Products of float32 hold more registers, in full precision those of both operands.
    held = LARGEST // 2 if qkv.dtype == torch.float32 else LARGEST
    held, streamed = (whole, whole) if whole <= held else (held, LARGEST // 2)
    padded = down * window_size != height or across * window_size != width
    head = channels // (3 * num_heads)
    constants = {
        "WINDOW": window_size,
        "SHIFT": shift,
        "HEAD": head,
        "BLOCK_HEAD": block(head),
        "PADDED": padded,
        "FILL": padded and qkv_bias.numel() > 0,  # else padding holds zeros, as loads yield there
        "PRECISION": precision_of(qkv.dtype),
        "UPCAST": interpreting(),  # whose products in bf16 are wrong
        # Images are addressed in 64 bits anyway; within one, offsets reach so far only in the largest maps.
        "INT64": needs_int64(*(tensor[:1] for tensor in (qkv, *tensors))),
    }
    # What padding adds to the gradients of a window does not fit into the registers on compute capability 8.0.
    together = whole == held and not (constants["FILL"] and capability_of(qkv.device) < 90)
    return Layout(
        sizes=(height, width, down, across),
        windows=batch * down * across,
        held=held,
        streamed=streamed,
        tiles=triton.cdiv(positions, held),
        together=together,
        keys=held if together else triton.cdiv(positions, MIN_BLOCK) * MIN_BLOCK,
        constants=constants,
    )
