"""Group masked model learning: rectangles of an image are hidden until a share of it is gone (SiT, arXiv 2104.03602).

All on the device that trains and for all images at once: a fixed number of rectangles is drawn for each image, and a
search finds after how many of them enough is covered. Described in `docs/methods/sit.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Fill = Literal["zeros", "noise", "copy"]

LONGEST = 0.3  # sides of rectangles stay below this share of the image's (released code)
# Rectangles cover a share f after about -60 ln(1 - f) of them, and three times as many are drawn. At f = 0.5 these are
# 128, where 40 are needed on average and the logarithm of their number has a deviation of 0.17: about one image in
# 10^11 would need more, and is then hidden a little less.
RATE = 184
CHOICES = 5  # random numbers of a view that belong to none of its rectangles
BITS = 24  # powers of two whose sums a float32 holds exactly


@dataclass(kw_only=True)
class Corruption:
    """What is done to the student's views."""

    drop: float = 0.5
    """Largest share of a view that is hidden; the smallest is a half, or this where it is less."""
    replace: float = 0.3
    """The same where pieces of another image take its place."""
    replaced: float = 0.5
    """Probability that a view gets pieces of another image of the micro-batch, in place of `fills`."""
    align: int = 1
    """Rectangles begin and end at multiples of so many pixels: 1 for any place, or the patch size."""
    fills: tuple[Fill, ...] = ("zeros",)
    """What hidden parts become, drawn for each view: the mean colour, noise, or other parts of the same image."""

    @property
    def blocks(self) -> int:
        """Rectangles drawn for each view."""
        return math.ceil(-RATE * math.log1p(-max(self.drop, self.replace)))

    @property
    def columns(self) -> int:
        """Random numbers that a view needs."""
        return CHOICES + self.blocks * (6 if "copy" in self.fills else 4)

    def check(self, size: tuple[int, int]) -> None:
        """Raise unless views of (height, width) pixels can be corrupted so.

        Raises:
            ValueError: a field is out of range, or the alignment does not suit the size.
        """
        if not (0 < self.drop < 1 and 0 < self.replace < 1 and 0 <= self.replaced <= 1):
            raise ValueError(
                "corruption.drop and .replace must lie strictly between 0 and 1, and .replaced be a probability; got "
                f"{self.drop}, {self.replace} and {self.replaced}"
            )
        if not self.fills or len(set(self.fills)) < len(self.fills):
            raise ValueError(f"corruption.fills is {self.fills}: name each of zeros, noise, copy once at most, and one")
        for side in size:
            if self.align < 1 or side % self.align or int(LONGEST * side) <= self.align:
                raise ValueError(
                    f"corruption.align is {self.align}, but must divide the side {side} of the views and be below "
                    f"{LONGEST:g} of it: pass a smaller one, 1 for none"
                )


class Corrupted(NamedTuple):
    """Views as the student sees them."""

    images: Tensor
    """Normalised pixels `[N, H, W, 3]`, floating."""
    mask: Tensor
    """Which pixels are corrupted, bool `[N, H, W]`."""


class Blocks(NamedTuple):
    """Rectangles in cells of `align` pixels, each `[N, K]`."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    source_top: Tensor | None
    """Where a copy comes from, None where nothing is copied."""
    source_left: Tensor | None

    def spans(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Whether a rectangle spans a row `[N, K, rows]` and a column `[N, K, columns]`: 0 or 1, float32."""
        rows, columns = (torch.arange(count, device=self.top.device) for count in grid)
        return _span(rows, self.top, self.height), _span(columns, self.left, self.width)


def _span(places: Tensor, start: Tensor, length: Tensor) -> Tensor:
    offset = places - start[..., None]
    return ((offset >= 0) & (offset < length[..., None])).float()


def corrupt(
    images: Tensor,
    noise: Tensor,
    config: Corruption,
    normalise: Callable[[Tensor], Tensor],
    *,
    batch: int,
    dtype: torch.dtype,
) -> Corrupted:
    """Hide rectangles of views, or put pieces of other images there.

    Args:
        images: one or several views of `batch` images, view by view: uint8 `[N, H, W, 3]`, or floating in 0-1 units.
        noise: U[0, 1), `[N, config.columns]`.
        config: what is done.
        normalise: brings raw pixels to zero mean and unit deviation, `[N, H, W, 3]`.
        batch: images among which pieces are exchanged, each view's with the same view of another or with itself.
        dtype: of the pixels returned.

    Returns:
        Normalised pixels, exactly 0 where they are hidden behind the mean colour, and the mask.
    """
    _, H, W, _ = images.shape
    replaced, share, fill, donor, seed = _choices(noise[:, :CHOICES], config, batch)
    with torch.autocast(images.device.type, enabled=False):  # sums of powers of two are to be exact
        blocks = draw_blocks(noise[:, CHOICES:].unflatten(1, (config.blocks, -1)), (H, W), config.align)
        rows, columns = blocks.spans((H // config.align, W // config.align))
        rows = rows * _needed(rows, columns, share)[..., None]
        mask = _enlarged(_covers(rows, columns) > 0, config.align)
        raw = torch.where((mask & replaced[:, None, None])[..., None], images[donor], images)
        hidden = {
            kind: (mask & (~replaced & (fill == i))[:, None, None])[..., None] for i, kind in enumerate(config.fills)
        }
        if "copy" in hidden:
            raw = torch.where(
                hidden["copy"], images.flatten(0, 2)[_sources(blocks, rows, columns, (H, W), config.align)], raw
            )
    pixels = normalise(raw).to(dtype)
    if "noise" in hidden:
        pixels = torch.where(hidden["noise"], gaussian(seed, 3 * H * W).to(dtype).view_as(pixels), pixels)
    if "zeros" in hidden:
        pixels = pixels.masked_fill_(hidden["zeros"], 0)
    return Corrupted(pixels, mask)


def _choices(noise: Tensor, config: Corruption, batch: int) -> tuple[Tensor, ...]:
    """For each view: whether pieces are replaced, the share to cover, number of the fill, row of the donor, a seed."""
    which, extent, fill, donor, seed = noise.unbind(1)
    replaced = which < config.replaced
    low, high = (torch.where(replaced, min(bound, config.replace), min(bound, config.drop)) for bound in (0.5, 1.0))
    first = torch.arange(len(noise), device=noise.device) // batch * batch
    return replaced, low + extent * (high - low), below(len(config.fills), fill), first + below(batch, donor), seed


def below(bound: int | Tensor, noise: Tensor) -> Tensor:
    """Whole numbers, int64, evenly from 0 to below `bound`, of noise in [0, 1)."""
    return (noise * bound).long().minimum(torch.as_tensor(bound - 1, device=noise.device))


def draw_blocks(noise: Tensor, size: tuple[int, int], align: int) -> Blocks:
    """Rectangles as the released code draws them, in cells of `align` pixels.

    A side begins at a pixel below the image's side less `align`, rounded down to a cell: never at the last cell. Its
    length is one of `align` to below 0.3 of the side, cut off at the border, and rounded to whole cells, half to even.

    Args:
        noise: U[0, 1), `[N, K, 4]`, or `[N, K, 6]` where copies are to come from other places, which are all that a
            rectangle fits into.
        size: (height, width) of the image in pixels.
        align: pixels of a cell, a divisor of both.
    """
    starts, lengths, sources = [], [], []
    for i, side in enumerate(size):
        start = below(side - align, noise[..., i]) // align
        length = (align + below(int(LONGEST * side) - align, noise[..., 2 + i])).minimum(side - start * align)
        starts.append(start)
        lengths.append((length / align).round().long())
        if noise.shape[-1] > 4:
            sources.append(below(side // align + 1 - lengths[i], noise[..., 4 + i]))
    return Blocks(*starts, *lengths, *(sources or (None, None)))


def _covers(rows: Tensor, columns: Tensor) -> Tensor:
    """How many rectangles cover each cell, `[N, rows, columns]`, or the sum of their weights."""
    return rows.transpose(1, 2) @ columns


def _needed(rows: Tensor, columns: Tensor, share: Tensor) -> Tensor:
    """Whether a rectangle is needed for the first ones to cover a share `[N]` of all cells, `[N, K]`.

    The area that the first k cover rises with k: the smallest k that is enough is found by halving.
    """
    count = rows.shape[1]
    place = torch.arange(count, device=rows.device)
    cells = share * (rows.shape[2] * columns.shape[2])
    low = torch.zeros_like(share, dtype=torch.int64)  # too few, or none
    high = torch.full_like(low, count)  # enough, or all there are
    for _ in range((count - 1).bit_length()):
        middle = (low + high) // 2
        first = rows * (place < middle[:, None])[..., None]
        enough = _covers(first, columns).clamp_(max=1).sum((1, 2)) >= cells  # exact, and faster than to count bools
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return place < high[:, None]


def _enlarged(cells: Tensor, align: int) -> Tensor:
    """`[N, rows, columns]` of cells to pixels."""
    return cells if align == 1 else cells.repeat_interleave(align, 1).repeat_interleave(align, 2)


def _sources(blocks: Blocks, rows: Tensor, columns: Tensor, size: tuple[int, int], align: int) -> Tensor:
    """Number of the pixel, counted through all images, that each pixel is copied from: `[N, H, W]`.

    Of several rectangles on a pixel the last counts, since each is painted over the ones before. It is the highest bit
    of a sum of powers of two.
    """
    assert blocks.source_top is not None
    assert blocks.source_left is not None
    last = torch.zeros(len(rows), rows.shape[2], columns.shape[2], dtype=torch.int64, device=rows.device)
    for start in range(0, rows.shape[1], BITS):
        some = slice(start, start + BITS)
        powers = 2.0 ** torch.arange(rows[:, some].shape[1], device=rows.device)
        bits = _covers(rows[:, some] * powers[:, None], columns[:, some])
        last = torch.where(bits > 0, start - 1 + bits.frexp().exponent, last)
    down, right = blocks.source_top - blocks.top, blocks.source_left - blocks.left
    offset = align * (size[1] * down + right).gather(1, last.flatten(1)).view_as(last)
    covered = _covers(rows, columns) > 0
    place = torch.arange(len(rows) * size[0] * size[1], device=rows.device).view(-1, *size)
    return place + _enlarged(torch.where(covered, offset, 0), align)


def gaussian(seed: Tensor, count: int) -> Tensor:
    """N(0, 1) numbers that depend on a seed alone, `[N, count]`, float32.

    Drawing them by a generator would take the numbers of all ranks' images to have the same on any number of ranks.
    They are the Box-Muller transform of two halves of a hash: the finaliser of SplitMix64 of seed and place.

    Args:
        seed: `[N]`, in [0, 1), of which 24 bits count.
        count: numbers per seed.
    """
    x = (seed * 2**24).long()[:, None] * 2**32 + torch.arange(count, device=seed.device)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift & (1 << (64 - shift)) - 1)) * factor
    radius, angle = ((part & 2**24 - 1).float() / 2**24 for part in (x, x >> 32))
    return (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()
