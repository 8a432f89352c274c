"""How the windows of a call are divided among programs."""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..checks import interpreting
from ..launch import capability_of, needs_int64
from ..tiles import MIN_BLOCK, Tile, block, precision_of

LARGEST = 64  # positions that are held: the least that the matrix units of compute capability 9.0 take


@dataclass(frozen=True)
class Layout:
    """How a call is divided.

    Attributes:
        sizes: Height and width of the map in tokens, then in windows.
        windows: Number of windows of all images.
        forward: Queries that are held and keys that are streamed.
        gradients: Keys that are held, all of a window's, and queries; None where that would spill.
        queries: Queries and keys in the gradient of queries and biases where there is no `gradients`.
        keys: Keys and queries in that of keys and values.
        columns: Of a matrix of a window's pairs, as partial sums of them are stored.
        constants: Compile-time arguments of every kernel.
    """

    sizes: tuple[int, int, int, int]
    windows: int
    forward: Tile
    gradients: Tile | None
    queries: Tile
    keys: Tile
    columns: int
    constants: dict[str, Any]

    def tiles(self, tile: Tile) -> int:
        """Returns how many tiles of held positions cover a window."""
        return int(triton.cdiv(self.constants["WINDOW"] ** 2, tile.held))


# What does not spill was found by compiling for the three targets. Programs of more than four warps compute some of
# their products twice, and are for what does not fit otherwise. Loops that gather biases are not pipelined, since the
# compiler would copy biases 4 bytes at a time into shared memory.
def _forward(whole: int, tokens: int, width: int, single: bool, fill: bool) -> Tile:
    if single:
        return Tile(32, 16, 8, 1) if width > 64 else Tile(32, 32, 4, 1)
    if whole <= LARGEST:
        return Tile(whole, whole, 4, 2 if width <= 64 else 1)
    if width > 64:
        return Tile(LARGEST, 16, 4, 1)
    # Twice the queries for the same keys, where these are no more tiles.
    twice = not fill and triton.cdiv(tokens, LARGEST) % 2 == 0
    return Tile(2 * LARGEST, 32, 8, 1) if twice else Tile(LARGEST, 32, 4, 1)


def _gradients(whole: int, width: int, single: bool, fill: bool, capability: int) -> Tile | None:
    if whole > (MIN_BLOCK if single else LARGEST) or width > 64 or (capability < 90 and (fill or width > 32)):
        return None
    return Tile(whole, min(whole, 32), 4 if width <= 32 else 8, 1)


def _queries(width: int, single: bool) -> Tile:
    # 16 keys at a time, since the sums of all pairs fill the registers.
    if single:
        return Tile(32, MIN_BLOCK, 4 if width <= 64 else 8, 1)
    return Tile(LARGEST if width <= 64 else MIN_BLOCK, MIN_BLOCK, 4 if width <= 32 else 8, 1)


def _keys(width: int, single: bool, capability: int) -> Tile:
    if single:
        return Tile(32, 32, 8, 1)
    if width > 32:
        return Tile(LARGEST if width <= 64 else LARGEST // 2, 16, 8, 1)
    return Tile(LARGEST, 16 if capability < 90 else 32, 8 if 100 <= capability < 120 else 4, 1)


def layout(
    qkv: torch.Tensor, qkv_bias: torch.Tensor, window_size: int, shift: int, num_heads: int, *tensors: torch.Tensor
) -> Layout:
    """Returns how a call is divided; `tensors` are further maps that its kernels address."""
    batch, height, width, channels = qkv.shape
    down, across = triton.cdiv(height, window_size), triton.cdiv(width, window_size)
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
    tokens, capability = window_size * window_size, capability_of(qkv.device)
    whole, wide, single = block(tokens), block(head), qkv.dtype == torch.float32

    def fit(tile: Tile) -> Tile:
        return Tile(min(tile.held, whole), min(tile.streamed, whole), tile.warps, tile.stages)

    gradients = _gradients(whole, wide, single, constants["FILL"], capability)
    return Layout(
        sizes=(height, width, down, across),
        windows=batch * down * across,
        forward=fit(_forward(whole, tokens, wide, single, constants["FILL"])),
        gradients=gradients,
        queries=fit(_queries(wide, single)),
        keys=fit(_keys(wide, single, capability)),
        columns=triton.cdiv(tokens, MIN_BLOCK) * MIN_BLOCK if gradients is None else whole,
        constants=constants,
    )
