"""Views as data: what a method wants to see of each image, apart from who executes it.

An operation is a frozen dataclass that knows how to draw its own parameters from a random generator. Drawing happens in
Python, once per sample; `vitrail.engine.data.dali` and `vitrail.engine.data.pillow` only do arithmetic with the drawn
numbers. So a view is the same for any number of threads and ranks, and either executor can check the other.

A new operation is a dataclass here with `draw`, and one lowering in each of the two executors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from .faults import DataError

ImageSize: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""

Params: TypeAlias = npt.NDArray[np.float32]
"""The numbers that one operation needs for one sample: a float32 vector whose length depends on the operation only."""

Interpolation: TypeAlias = Literal["bilinear", "bicubic", "lanczos"]

_ATTEMPTS = 10  # torchvision.transforms.RandomResizedCrop


class Op(Protocol):
    """One operation of a view."""

    def draw(self, rng: np.random.Generator, size: ImageSize) -> Params:
        """Draw the parameters for an image of `size`."""

    def output_size(self, size: ImageSize) -> ImageSize:
        """Size of the result for an image of `size`, where (0, 0) stands for unknown."""


def _pair(size: int | ImageSize) -> ImageSize:
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """Crop a random window and resize it, as torchvision does.

    Ten attempts are made at a window with an area drawn from `scale` (share of the image) and an aspect drawn
    log-uniformly from `ratio` (width / height); where none fits, the largest central window within `ratio` is taken.
    """

    size: int | ImageSize
    """Output size in pixels; a pair is (height, width)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect, width / height."""
    interpolation: Interpolation = "bicubic"
    """Resampling filter, antialiased."""

    def draw(self, rng: np.random.Generator, size: ImageSize) -> Params:
        """Draw the window (top, left, height, width) in pixels."""
        height, width = size
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        # One call for all attempts: a generator call costs as much as the rest of an attempt.
        for area, aspect, down, right in rng.random((_ATTEMPTS, 4)).tolist():
            target = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            stretch = math.exp(low + aspect * (high - low))
            w = round(math.sqrt(target * stretch))
            h = round(math.sqrt(target / stretch))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
                return np.array((top, left, h, w), np.float32)
        return self._central(size)

    def _central(self, size: ImageSize) -> Params:
        height, width = size
        h, w = height, width
        if width < self.ratio[0] * height:
            h = round(width / self.ratio[0])
        elif width > self.ratio[1] * height:
            w = round(height * self.ratio[1])
        return np.array(((height - h) // 2, (width - w) // 2, h, w), np.float32)

    def output_size(self, size: ImageSize) -> ImageSize:
        """The configured size."""
        return _pair(self.size)


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip:
    """Mirror left and right with probability `p`."""

    p: float = 0.5
    """Probability."""

    def draw(self, rng: np.random.Generator, size: ImageSize) -> Params:
        """Draw one number: 1 to flip, 0 to leave."""
        return np.array((rng.random() < self.p,), np.float32)

    def output_size(self, size: ImageSize) -> ImageSize:
        """Unchanged."""
        return size


ADJUSTMENTS = ("brightness", "contrast", "saturation", "hue")
"""What `ColorJitter` adjusts; a drawn adjustment is the place in this tuple, -1 for none."""


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue in random order with probability `p`.

    torchvision's `RandomApply([ColorJitter(...)], p)` on Pillow images: factors are drawn from [max(0, 1 - x), 1 + x],
    the hue's turn from [-x, x], and the order from all 24. Every adjustment gives uint8, and contrast stretches about
    the mean of the grey image as the adjustments before it have left it. A strength x of 0 leaves its adjustment out.
    """

    p: float = 0.8
    """Probability of any change."""
    brightness: float = 0.4
    """Largest relative change."""
    contrast: float = 0.4
    """Largest relative change of the distance from the mean."""
    saturation: float = 0.2
    """Largest relative change of the distance from grey."""
    hue: float = 0.1
    """Largest turn of the colour wheel in full turns, at most 0.5."""

    def draw(self, rng: np.random.Generator, size: ImageSize) -> Params:
        """Draw the order, four places in `ADJUSTMENTS`, then the four factors in the order of `ADJUSTMENTS`."""
        chance, *numbers = rng.random(9).tolist()
        if chance >= self.p:
            return np.array((-1, -1, -1, -1, 1, 1, 1, 0), np.float32)
        ranges = [(max(0.0, 1 - x), 1 + x) for x in (self.brightness, self.contrast, self.saturation)]
        ranges.append((-self.hue, self.hue))
        order = [
            which if ranges[which][0] < ranges[which][1] else -1 for which in sorted(range(4), key=numbers.__getitem__)
        ]
        factors = [low + number * (high - low) for (low, high), number in zip(ranges, numbers[4:], strict=True)]
        return np.array((*order, *factors), np.float32)

    def output_size(self, size: ImageSize) -> ImageSize:
        """Unchanged."""
        return size


@dataclass(frozen=True, kw_only=True)
class RandomGrayscale:
    """Replace the colours by their luma (ITU-R 601, rounded to uint8) in all three channels with probability `p`."""

    p: float = 0.2
    """Probability."""

    def draw(self, rng: np.random.Generator, size: ImageSize) -> Params:
        """Draw one number: 1 for grey, 0 for colour."""
        return np.array((rng.random() < self.p,), np.float32)

    def output_size(self, size: ImageSize) -> ImageSize:
        """Unchanged."""
        return size


@dataclass(frozen=True, kw_only=True)
class GaussianBlur:
    """Blur with a Gaussian of random width with probability `p`."""

    p: float = 0.5
    """Probability."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation in pixels of the view, drawn uniformly."""
    window: int | None = None
    """Taps of the kernel in each direction, odd, outside which it is cut off; None: as many as it needs."""

    def draw(self, rng: np.random.Generator, size: ImageSize) -> Params:
        """Draw the standard deviation in pixels, 0 for no blur."""
        chance, width = rng.random(2).tolist()
        low, high = self.sigma
        return np.array((low + width * (high - low) if chance < self.p else 0.0,), np.float32)

    def output_size(self, size: ImageSize) -> ImageSize:
        """Unchanged."""
        return size


@dataclass(frozen=True, kw_only=True)
class Solarize:
    """Invert the values from `threshold` upwards with probability `p`: v becomes 255 - v."""

    p: float = 0.2
    """Probability."""
    threshold: int = 128
    """The smallest value that is inverted, 0-255."""

    def draw(self, rng: np.random.Generator, size: ImageSize) -> Params:
        """Draw one number: 1 to solarise, 0 to leave."""
        return np.array((rng.random() < self.p,), np.float32)

    def output_size(self, size: ImageSize) -> ImageSize:
        """Unchanged."""
        return size


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Resize the shorter side to `size` and keep the aspect, as torchvision does."""

    size: int
    """Length of the shorter side in pixels."""
    interpolation: Interpolation = "bicubic"
    """Resampling filter, antialiased."""

    def draw(self, rng: np.random.Generator, size: ImageSize) -> Params:
        """Nothing is random; the parameters are the output's (height, width)."""
        return np.array(self.output_size(size), np.float32)

    def output_size(self, size: ImageSize) -> ImageSize:
        """The shorter side becomes `size`; the longer one is rounded down."""
        short, long = min(size), max(size)
        if short == 0:
            return size
        longer = int(self.size * long / short)
        return (self.size, longer) if size[0] == short else (longer, self.size)


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Crop the central window. The image must be at least as large: put `Resize` before it."""

    size: int | ImageSize
    """Output size in pixels; a pair is (height, width)."""

    def draw(self, rng: np.random.Generator, size: ImageSize) -> Params:
        """Nothing is random; the parameters are the window (top, left, height, width) in pixels.

        Raises:
            DataError: If the image is smaller than the window.
        """
        (height, width), (h, w) = size, _pair(self.size)
        if h > height or w > width:
            raise DataError(
                f"a centre crop of {h}x{w} was asked of an image of {height}x{width} (height x width); "
                "expected an image at least as large: put Resize before CenterCrop"
            )
        return np.array((round((height - h) / 2), round((width - w) / 2), h, w), np.float32)

    def output_size(self, size: ImageSize) -> ImageSize:
        """The configured size."""
        return _pair(self.size)


@dataclass(frozen=True, kw_only=True)
class View:
    """One way of looking at an image: operations in order, ending in a size that is the same for all images."""

    name: str
    """For messages and logs."""
    ops: tuple[Op, ...]
    """Applied from left to right."""
    like: str | None = None
    """Name of the view whose random numbers it takes: with operations alike, the same box of the image."""

    def __post_init__(self) -> None:
        if 0 in self.size:
            raise DataError(
                f"the view {self.name!r} has no fixed output size; expected RandomResizedCrop or CenterCrop "
                "after the last Resize"
            )

    @property
    def size(self) -> ImageSize:
        """(height, width) of the view's images in pixels."""
        size = (0, 0)
        for op in self.ops:
            size = op.output_size(size)
        return size

    def draw(self, rng: np.random.Generator, size: ImageSize) -> list[Params]:
        """Draw the parameters of all operations for an image of `size`, in order."""
        params = []
        for op in self.ops:
            params.append(op.draw(rng, size))
            size = op.output_size(size)
        return params


def streams(views: Sequence[View]) -> list[int]:
    """The stream of random numbers that each view takes: its own number, or that of the view which it is like.

    Raises:
        DataError: If there is no view of that name.
    """
    numbers = {view.name: number for number, view in enumerate(views)}
    for view in views:
        if view.like is not None and view.like not in numbers:
            raise DataError(
                f"the view {view.name!r} takes the random numbers of {view.like!r}, and there are only "
                f"{', '.join(map(repr, numbers))}: name one of them"
            )
    return [number if view.like is None else numbers[view.like] for number, view in enumerate(views)]
