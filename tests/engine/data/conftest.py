"""Images to read, in every state of health."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.engine.data import HorizontalFlip, RandomResizedCrop, View


def make_photo(seed: int, height: int = 64, width: int = 80) -> Image.Image:
    """A smooth image with large structures, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


@pytest.fixture
def photo() -> Callable[..., Image.Image]:
    return make_photo


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return make_encoded


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(session_cache))


def write_images(folder: Path, count: int, classes: int = 3) -> Path:
    """`count` JPEGs of different sizes, class by class."""
    for number in range(count):
        path = folder / f"class{number % classes}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_encoded(make_photo(number, 40 + number % 30, 60 + number % 17)))
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 good images in three classes. Not to be changed."""
    return write_images(tmp_path_factory.mktemp("images"), 70)


@pytest.fixture
def write() -> Callable[..., Path]:
    return write_images


@pytest.fixture
def view() -> View:
    """What a masked autoencoder sees, small."""
    return View(name="view", ops=(RandomResizedCrop(size=32, scale=(0.2, 1.0)), HorizontalFlip()))
