"""Read samples: bytes, the image's size from its header, and the drawn parameters of all views."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from PIL import ExifTags, Image, UnidentifiedImageError

from .faults import BadFiles
from .order import sample_rng
from .source import Source
from .views import ImageSize, Params, View, streams

# Only decoders that DALI has as well, and none that would start a helper program on a stranger's file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width

# Registering formats is not safe from several threads at once, so it happens here.
Image.init()


class DecodeError(Exception):
    """An image, or a batch with at least one such image, cannot be decoded."""


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image without decoding it; raises whatever Pillow does."""
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def image_size(data: bytes) -> ImageSize:
    """(height, width) of an encoded image as it will be decoded, from its header alone.

    Raises:
        DecodeError: If the header makes no sense.
    """
    if not data:
        raise DecodeError("the file is empty")
    try:
        image = open_image(data)
        # The base class's method: that of PNG images decodes the whole image to look for metadata behind it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except UnidentifiedImageError:
        raise DecodeError(f"not one of {', '.join(_FORMATS)}") from None
    except Exception as error:  # a parser may raise anything on garbage
        raise DecodeError(f"damaged header ({error})") from error
    return (image.width, image.height) if orientation in _SIDEWAYS else (image.height, image.width)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a batch that wants a sample."""

    epoch: int
    """For drawing parameters."""
    position: int
    """For drawing parameters: the position within the epoch."""
    candidates: Callable[[], Iterable[int]]
    """Gives sample indices in order of preference; the first usable one is taken."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample that has been read but not decoded."""

    slot: Slot
    """What it was read for."""
    index: int
    """Its number in the source."""
    data: bytes
    """The encoded image."""
    params: list[list[Params]]
    """Drawn parameters: one list per view, one vector per operation."""


class Reader:
    """Fills slots with samples. Safe to use from several threads.

    Args:
        source: Where the bytes come from.
        views: What to draw parameters for.
        seed: The run's seed.
        bad: Where unusable files are recorded.
    """

    def __init__(self, source: Source, views: Sequence[View], seed: int, bad: BadFiles) -> None:
        self._source = source
        self._views = list(zip(streams(views), views, strict=True))
        self._seed = seed
        self._bad = bad

    def fill(self, slot: Slot) -> Sample | None:
        """Read the first candidate that is not known to be bad; None if there is none.

        Raises:
            DataError: If too many files are bad.
        """
        for index in slot.candidates():
            if index in self._bad:
                continue
            self._bad.count_read()
            try:
                data = self._source.read(index)
                size = image_size(data)
            except (OSError, DecodeError) as error:
                self.reject(index, str(error))
                continue
            return Sample(slot, index, data, self._draw(slot, size))
        return None

    def reject(self, index: int, reason: str) -> None:
        """Record that a sample cannot be used."""
        self._bad.add(index, self._source.name(index), " ".join(reason.split()))

    def _draw(self, slot: Slot, size: ImageSize) -> list[list[Params]]:
        return [
            view.draw(sample_rng(self._seed, slot.epoch, slot.position, stream), size) for stream, view in self._views
        ]
