"""Views executed with Pillow: the reference for DALI, and the decoder where DALI is not installed."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import singledispatch
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from .batch import apart, by_size
from .reader import DecodeError, Sample, open_image
from .views import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    HorizontalFlip,
    ImageSize,
    Op,
    Params,
    RandomGrayscale,
    RandomResizedCrop,
    Resize,
    Solarize,
    View,
)

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_RAMP = bytes(range(256))


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB: turned upright by its EXIF orientation, alpha dropped, 16 bits scaled to 8.

    Raises:
        DecodeError: If it cannot be decoded.
    """
    try:
        image = open_image(data)
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a decoder may raise anything on garbage
        raise DecodeError(str(error)) from error
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")


@singledispatch
def apply(op: Op, image: Image.Image, params: Params) -> Image.Image:
    """Execute one operation with drawn parameters."""
    raise NotImplementedError(f"{type(op).__name__} has no Pillow form")


def _crop(image: Image.Image, window: Params) -> Image.Image:
    top, left, height, width = (int(value) for value in window)
    return image.crop((left, top, left + width, top + height))


def _resize(image: Image.Image, size: ImageSize, interpolation: str) -> Image.Image:
    return image.resize((size[1], size[0]), FILTERS[interpolation])


@apply.register
def _(op: RandomResizedCrop, image: Image.Image, params: Params) -> Image.Image:
    return _resize(_crop(image, params), op.output_size((0, 0)), op.interpolation)


@apply.register
def _(op: HorizontalFlip, image: Image.Image, params: Params) -> Image.Image:
    return ImageOps.mirror(image) if params[0] else image


@apply.register
def _(op: Resize, image: Image.Image, params: Params) -> Image.Image:
    return _resize(image, (int(params[0]), int(params[1])), op.interpolation)


@apply.register
def _(op: CenterCrop, image: Image.Image, params: Params) -> Image.Image:
    return _crop(image, params)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(Image.new("RGB", image.size), image, factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(_grey(image), image, factor)


def _hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255) % 256  # 255 where it should be 256, and towards zero: torchvision's
    turned = hue.point(_RAMP[shift:] + _RAMP[:shift])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


_ADJUST = (_brightness, _contrast, _saturation, _hue)  # in the order of `ADJUSTMENTS`


@apply.register
def _(op: ColorJitter, image: Image.Image, params: Params) -> Image.Image:
    numbers = params.tolist()
    for which in map(int, numbers[:4]):
        if which >= 0:
            image = _ADJUST[which](image, numbers[4 + which])
    return image


@apply.register
def _(op: RandomGrayscale, image: Image.Image, params: Params) -> Image.Image:
    return _grey(image) if params[0] else image


@apply.register
def _(op: GaussianBlur, image: Image.Image, params: Params) -> Image.Image:
    sigma = float(params[0])
    if not sigma:
        return image
    return _convolved(image, sigma, op.window) if op.window else image.filter(ImageFilter.GaussianBlur(sigma))


def _convolved(image: Image.Image, sigma: float, window: int) -> Image.Image:
    """Blur with a sampled Gaussian of `window` taps, the image mirrored at its edge, as torchvision does."""
    reach = window // 2
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    pixels = np.asarray(image, np.float32)
    for axis in (0, 1):
        length = pixels.shape[axis]
        wide = np.pad(pixels, [(reach, reach) if axis == other else (0, 0) for other in range(3)], mode="reflect")
        pixels = np.zeros_like(pixels)
        for place, tap in enumerate(taps.tolist()):
            pixels += wide.take(range(place, place + length), axis) * np.float32(tap)
    return Image.fromarray(pixels.round().astype(np.uint8))


@apply.register
def _(op: Solarize, image: Image.Image, params: Params) -> Image.Image:
    return image.point((_RAMP[: op.threshold] + _RAMP[: 256 - op.threshold][::-1]) * 3) if params[0] else image


def execute(view: View, image: Image.Image, params: Sequence[Params]) -> npt.NDArray[np.uint8]:
    """Execute a view on a decoded image.

    Args:
        view: The view.
        image: RGB image.
        params: What `view.draw` returned.

    Returns:
        [height, width, 3], uint8.
    """
    for op, values in zip(view.ops, params, strict=True):
        image = apply(op, image, values)
    return np.asarray(image)


_Flying: TypeAlias = tuple[
    list[Tensor], list[Future[None]]
]  # the images of each size, and who is still at work on them


class PillowDecoder:
    """Decodes and augments on a pool of threads (Pillow releases the interpreter lock).

    Args:
        views: The views of every sample.
        device: Where the batches are wanted.
        threads: Size of the pool.
        prefetch: Batches decoded ahead.
    """

    def __init__(self, views: Sequence[View], *, device: torch.device, threads: int, prefetch: int) -> None:
        self._views = views
        self._sizes = by_size(views)
        self._device = device
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vitrail-pillow")

    def _start(self, batch: Sequence[Sample]) -> _Flying:
        """Have a batch made, in memory of its own."""
        images = []
        for numbers in self._sizes:
            height, width = self._views[numbers[0]].size
            images.append(torch.empty((len(numbers) * len(batch), height, width, 3), dtype=torch.uint8))
        views = [view.numpy() for view in apart(images, self._sizes)]
        return images, [self._pool.submit(self._sample, sample, views, place) for place, sample in enumerate(batch)]

    def _sample(self, sample: Sample, views: Sequence[npt.NDArray[np.uint8]], place: int) -> None:
        image = decode(sample.data)
        for view, params, pixels in zip(self._views, sample.params, views, strict=True):
            pixels[place] = execute(view, image, params)

    def decode(self, batches: Iterator[Sequence[Sample]]) -> Iterator[list[Tensor]]:
        """See `vitrail.engine.data.stream.Decoder`."""
        flying: deque[_Flying] = deque()
        more = True
        while more or flying:
            while more and len(flying) <= self._prefetch:
                batch = next(batches, None)
                more = batch is not None
                if batch is not None:
                    flying.append(self._start(batch))
            if flying:
                images, samples = flying.popleft()
                for sample in samples:
                    sample.result()
                yield apart([self._to_device(tensor) for tensor in images], self._sizes)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)
