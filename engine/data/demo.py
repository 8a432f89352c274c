"""The bundled demo set: handwritten digits over photographs, made on this machine from what scikit-learn ships.

Digits cover most of a 32-pixel image and stand out from a dimmed background: what a masked autoencoder has to guess is
then mostly strokes, and a few minutes on a CPU are enough to see a linear probe rise. The digits of the two splits are
different handwriting samples.
"""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from .cache import cache_dir, locked, replacing_folder
from .shards import Member, write_shards

logger = logging.getLogger("vitrail.data")

_VERSION = 1
_SIDE = 32  # pixels
_DIGIT_SIDES = (26, 32)  # pixels, inclusive
_BACKGROUND = (0.15, 0.45)  # brightness kept of the photographs
_INK = (150, 255)  # range of each colour channel of a digit
_QUALITY = 92  # JPEG
_COUNTS = {"train": 12_000, "val": 2_000}
_VAL_SHARE = 0.2  # of the handwriting samples


def demo_folder() -> Path:
    """The folder that holds the demo set's `train` and `val` shards; made where missing.

    Several processes may ask at once: one makes it, the others wait.
    """
    folder = cache_dir() / f"demo-v{_VERSION}"
    if folder.is_dir():
        return folder
    with locked(folder.name):
        if not folder.is_dir():
            logger.info("making the demo set in %s", folder)
            make_demo(folder)
    return folder


def make_demo(folder: Path, *, seed: int = 0) -> None:
    """Write the demo set: 12,000 training and 2,000 validation JPEGs of 32x32 pixels in ten balanced classes.

    Args:
        folder: Where to write; must not exist.
        seed: Of all that is random.
    """
    from sklearn.datasets import load_digits, load_sample_image  # slow to import, and used once per machine

    digits = load_digits()
    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(seed)
    pools: dict[str, list[npt.NDArray[np.uint8]]] = {split: [] for split in _COUNTS}
    for digit in range(10):
        strokes = (digits.images[digits.target == digit] * (255 / 16)).round().astype(np.uint8)
        strokes = strokes[np.argsort(rng.random(len(strokes)))]
        held_out = round(len(strokes) * _VAL_SHARE)
        pools["val"].append(strokes[:held_out])
        pools["train"].append(strokes[held_out:])
    names = tuple(map(str, range(10)))
    with replacing_folder(folder) as temporary:
        for split, count in _COUNTS.items():
            write_shards(_members(rng, pools[split], photographs, count), temporary / split, classes=names)


def _members(
    rng: np.random.Generator,
    pools: list[npt.NDArray[np.uint8]],
    photographs: list[npt.NDArray[np.uint8]],
    count: int,
) -> Iterator[Member]:
    for number, label in enumerate(np.argsort(rng.random(count)) % len(pools)):
        pool = pools[label]
        digit = pool[int(rng.random() * len(pool))]
        encoded = io.BytesIO()
        compose(rng, digit, photographs).save(encoded, "JPEG", quality=_QUALITY)
        yield Member(f"{number:05d}.jpg", encoded.getvalue(), int(label))


def compose(
    rng: np.random.Generator, digit: npt.NDArray[np.uint8], photographs: list[npt.NDArray[np.uint8]]
) -> Image.Image:
    """One image: a digit [8, 8] of random size, place and colour over a dimmed crop of one of the photographs."""
    photograph = photographs[int(rng.random() * len(photographs))]
    height, width = photograph.shape[:2]
    top, left = int(rng.random() * (height - _SIDE + 1)), int(rng.random() * (width - _SIDE + 1))
    dim = _BACKGROUND[0] + rng.random() * (_BACKGROUND[1] - _BACKGROUND[0])
    background = (photograph[top : top + _SIDE, left : left + _SIDE] * dim).astype(np.uint8)

    side = _DIGIT_SIDES[0] + int(rng.random() * (_DIGIT_SIDES[1] - _DIGIT_SIDES[0] + 1))
    down, right = (int(value * (_SIDE - side + 1)) for value in rng.random(2))
    red, green, blue = (int(_INK[0] + value * (_INK[1] - _INK[0])) for value in rng.random(3))

    image = Image.fromarray(background)
    ink = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    image.paste((red, green, blue), (right, down, right + side, down + side), mask=ink)
    return image
