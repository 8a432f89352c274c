"""DALI against Pillow, given the same bytes and the same drawn parameters."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.engine.data import CenterCrop, HorizontalFlip, RandomResizedCrop, Resize, View
from vitrail.engine.data.dali import DaliDecoder
from vitrail.engine.data.pillow import PillowDecoder, decode
from vitrail.engine.data.reader import Sample, Slot, image_size

CPU = torch.device("cpu")
SLOT = Slot(0, 0, tuple)
WHOLE = RandomResizedCrop(size=(60, 90), scale=(1.0, 1.0), ratio=(1.5, 1.5))  # the identity for a 60x90 image
SIDEWAYS = RandomResizedCrop(size=(90, 60), scale=(1.0, 1.0), ratio=(2 / 3, 2 / 3))


def both(views, encoded):
    """[views][b, H, W, 3] from each executor."""
    rng = np.random.default_rng(0)
    samples = [Sample(SLOT, i, e, [v.draw(rng, image_size(e)) for v in views]) for i, e in enumerate(encoded)]
    dali = DaliDecoder(views, batch=len(samples), device=CPU, on_gpu=False, threads=2, prefetch=1)
    pillow = PillowDecoder(views, device=CPU, threads=2, prefetch=1)
    (a,), (b,) = list(dali.decode(iter([samples]))), list(pillow.decode(iter([samples])))
    pillow.close()
    return a, b


def difference(a, b):
    assert a.dtype == b.dtype == torch.uint8
    assert a.shape == b.shape
    return (a.int() - b.int()).abs().float()


# Pillow rounds to whole grey levels between the two passes of a resize, DALI does not: errors of up to half a level,
# of a quarter in the mean. Where a filter reaches over the image's edge, Pillow leaves out what lies outside and DALI
# repeats the edge: single pixels of the outermost rows differ by more. Without antialiasing the mean is above 1.
MEAN, INSIDE, EDGE = 0.35, 2, 3  # grey levels, grey levels, pixels


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "make",
    [
        lambda i: (RandomResizedCrop(size=48, scale=(0.2, 1.0), interpolation=i),),
        lambda i: (RandomResizedCrop(size=(32, 96), scale=(0.5, 1.0), interpolation=i), HorizontalFlip()),
        lambda i: (RandomResizedCrop(size=200, scale=(0.05, 0.3), interpolation=i),),  # enlarges
        lambda i: (Resize(size=50, interpolation=i), CenterCrop(size=(48, 40))),
        lambda i: (Resize(size=300, interpolation=i), CenterCrop(size=224), HorizontalFlip(p=1.0)),
    ],
)
def test_resampling_of_lossless_images(make, interpolation, photo, encode):
    encoded = [encode(photo(seed, 120 + 13 * seed, 190 - 9 * seed), "PNG") for seed in range(8)]
    (a,), (b,) = both([View(name="v", ops=make(interpolation))], encoded)
    d = difference(a, b)
    assert d.mean() < MEAN
    assert d[:, EDGE:-EDGE, EDGE:-EDGE].max() <= INSIDE


def test_crop_and_flip_are_exact(photo, encode):
    encoded = [encode(photo(seed, 40, 50), "PNG") for seed in range(8)]
    view = View(name="v", ops=(CenterCrop(size=(31, 33)), HorizontalFlip()))
    (a,), (b,) = both([view], encoded)
    assert torch.equal(a, b)
    assert any((one == np.asarray(decode(e))[4:35, 8:41]).all() for one, e in zip(a.numpy(), encoded, strict=True))
    assert any(
        (one == np.asarray(decode(e))[4:35, 8:41][:, ::-1]).all() for one, e in zip(a.numpy(), encoded, strict=True)
    )


def sixteen_bits(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def transparent(image):
    rgba = np.asarray(image.convert("RGBA")).copy()
    rgba[:20, :, 3] = 0
    return Image.fromarray(rgba)


CASES = {
    "colour JPEG": (lambda i, e: e(i)),
    "progressive JPEG": (lambda i, e: e(i, progressive=True)),
    "JPEG with halved colour": (lambda i, e: e(i, subsampling="4:2:0")),
    "grey JPEG": (lambda i, e: e(i.convert("L"))),
    "CMYK JPEG": (lambda i, e: e(i.convert("CMYK"))),
    "PNG": (lambda i, e: e(i, "PNG")),
    "grey PNG": (lambda i, e: e(i.convert("L"), "PNG")),
    "palette PNG": (lambda i, e: e(i.convert("P"), "PNG")),
    "one-bit PNG": (lambda i, e: e(i.convert("1"), "PNG")),
    "PNG with alpha": (lambda i, e: e(transparent(i), "PNG")),
    "grey PNG with alpha": (lambda i, e: e(i.convert("LA"), "PNG")),
    "16-bit PNG": (lambda i, e: e(sixteen_bits(i), "PNG")),
    "WebP": (lambda i, e: e(i, "WEBP")),
    "BMP": (lambda i, e: e(i, "BMP")),
    "PPM": (lambda i, e: e(i, "PPM")),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_file_becomes_the_same_rgb(name, photo, encode):
    image = photo(5, 60, 90)
    (a,), (b,) = both([View(name="v", ops=(WHOLE,))], [CASES[name](image, encode)])
    # The decoders are other builds of the same libraries; inverse transforms may round differently.
    assert difference(a, b).mean() < 0.5
    expected = torch.from_numpy(np.asarray(image.convert("L").convert("RGB") if "grey" in name else image)[None].copy())
    if name not in ("one-bit PNG", "palette PNG", "16-bit PNG"):
        assert difference(a, expected).mean() < 4  # what JPEG and WebP lose
    if name == "16-bit PNG":
        assert difference(a, torch.from_numpy(np.asarray(image.convert("L").convert("RGB"))[None].copy())).max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation, photo, encode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(1, 60, 90), kind, exif=exif)
    upright = (90, 60) if orientation >= 5 else (60, 90)
    assert image_size(data) == upright
    (a,), (b,) = both([View(name="v", ops=(SIDEWAYS if orientation >= 5 else WHOLE,))], [data])
    assert difference(a, b).mean() < 0.5
    assert a.shape[1:3] == upright


def test_several_views_share_one_decoded_image(photo, encode):
    views = [
        View(name="large", ops=(RandomResizedCrop(size=64, scale=(0.4, 1.0)), HorizontalFlip())),
        View(name="small", ops=(RandomResizedCrop(size=24, scale=(0.05, 0.4)), HorizontalFlip())),
        View(name="whole", ops=(Resize(size=40), CenterCrop(size=(40, 32)))),
    ]
    a, b = both(views, [encode(photo(seed, 90, 100), "PNG") for seed in range(6)])
    assert [tuple(t.shape) for t in a] == [(6, 64, 64, 3), (6, 24, 24, 3), (6, 40, 32, 3)]
    for one, other in zip(a, b, strict=True):
        assert difference(one, other).mean() < MEAN
