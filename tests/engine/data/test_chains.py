"""The published chains: their operations, what they draw, and a batch of them."""

import itertools

import numpy as np
import pytest
import torch

from vitrail.engine.data import (
    ColorJitter,
    DataConfig,
    GaussianBlur,
    HorizontalFlip,
    RandomGrayscale,
    RandomResizedCrop,
    Solarize,
    build_loader,
    open_source,
)
from vitrail.engine.data.chains import byol_views, dino_views, moco_v2_views, moco_v3_views, simclr_views
from vitrail.engine.data.order import sample_rng

CHAINS = [moco_v3_views, byol_views, simclr_views, moco_v2_views]
FLIP, GREY = HorizontalFlip(p=0.5), RandomGrayscale(p=0.2)
MILD = ColorJitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)


def blur(p):
    return GaussianBlur(p=p, sigma=(0.1, 2.0))


def crop(low, interpolation):
    return RandomResizedCrop(size=224, scale=(low, 1.0), ratio=(3 / 4, 4 / 3), interpolation=interpolation)


PUBLISHED = {
    moco_v3_views: (
        (crop(0.08, "bilinear"), MILD, GREY, blur(1.0), FLIP),
        (crop(0.08, "bilinear"), MILD, GREY, blur(0.1), Solarize(p=0.2, threshold=128), FLIP),
    ),
    byol_views: (
        (crop(0.08, "bicubic"), FLIP, MILD, GREY, blur(1.0)),
        (crop(0.08, "bicubic"), FLIP, MILD, GREY, blur(0.1), Solarize(p=0.2, threshold=128)),
    ),
    simclr_views: (
        (
            crop(0.08, "bicubic"),
            FLIP,
            ColorJitter(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
            GREY,
            blur(0.5),
        ),
    )
    * 2,
    moco_v2_views: (
        (
            crop(0.2, "bilinear"),
            ColorJitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
            GREY,
            blur(0.5),
            FLIP,
        ),
    )
    * 2,
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chain_is_the_published_one(chain):
    views = chain(224)
    assert [view.name for view in views] == ["first", "second"]
    assert tuple(view.ops for view in views) == PUBLISHED[chain]


@pytest.mark.parametrize("chain", CHAINS)
def test_demo_changes_crops_blur_and_flips(chain):
    for view in chain((32, 48), scale=(0.5, 0.9), flip=0.0, sigma=(0.1, 0.4)):
        assert view.size == (32, 48)
        assert view.ops[0].scale == (0.5, 0.9)
        assert [op.sigma for op in view.ops if isinstance(op, GaussianBlur)] == [(0.1, 0.4)]
        assert not any(isinstance(op, HorizontalFlip) for op in view.ops)  # what never happens costs nothing


@pytest.mark.parametrize("chain", CHAINS)
def test_strengths_of_the_colours_can_be_chosen(chain):
    for view in chain(224, jitter=(0.1, 0.2, 0.3, 0.4)):
        (jitter,) = (op for op in view.ops if isinstance(op, ColorJitter))
        assert (jitter.p, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (
            0.8,
            0.1,
            0.2,
            0.3,
            0.4,
        )


def test_multi_crop_is_the_published_one():
    small = RandomResizedCrop(size=96, scale=(0.05, 0.4), ratio=(3 / 4, 4 / 3), interpolation="bicubic")
    local = (small, FLIP, MILD, GREY, blur(0.5))
    views = dino_views(224, 96)
    assert [view.name for view in views] == ["global 1", "global 2", *(f"local {i}" for i in range(1, 9))]
    assert [view.ops for view in views] == [
        (crop(0.4, "bicubic"), FLIP, MILD, GREY, blur(1.0)),
        (crop(0.4, "bicubic"), FLIP, MILD, GREY, blur(0.1), Solarize(p=0.2, threshold=128)),
        *[local] * 8,
    ]


def test_multi_crop_changes_with_its_arguments():
    options = {"scale": (0.25, 1.0), "local_scale": (0.05, 0.25), "flip": 0.0, "sigma": (0.1, 0.4)}
    views = dino_views((32, 48), 16, locals=10, **options, jitter=(0.1, 0.2, 0.3, 0.4))
    assert [view.size for view in views] == [(32, 48)] * 2 + [(16, 16)] * 10
    assert [view.ops[0].scale for view in views] == [(0.25, 1.0)] * 2 + [(0.05, 0.25)] * 10
    for view in views:
        kinds = {type(op): op for op in view.ops}
        assert HorizontalFlip not in kinds
        assert kinds[GaussianBlur].sigma == (0.1, 0.4)
        jitter = kinds[ColorJitter]
        assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.1, 0.2, 0.3, 0.4)
    assert dino_views((32, 48), 16, locals=0, **options, jitter=(0.1, 0.2, 0.3, 0.4)) == views[:2]


def test_views_of_moco_v3_differ_in_blur_and_solarisation():
    draws = 2000
    first, second = moco_v3_views(224)
    drawn = [
        [view.draw(sample_rng(0, 0, position, number), (300, 400)) for position in range(draws)]
        for number, view in enumerate((first, second))
    ]
    assert all(params[3][0] > 0 for params in drawn[0])
    for place, p in ((3, 0.1), (4, 0.2)):
        share = np.mean([params[place][0] > 0 for params in drawn[1]])
        assert share == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / draws))


def test_drawn_numbers_stay_what_they_were():
    """Runs must be repeatable across versions: these numbers were drawn when the operations were written."""
    params = moco_v3_views(224)[1].draw(sample_rng(7, 3, 1234, 1), (375, 500))
    expected = (
        (34, 4, 209, 257),
        (0, 2, 3, 1, 0.76984906, 1.22238612, 1.13162434, 0.0468938053),
        (0,),
        (1.25864148,),
        (0,),
        (1,),
    )
    assert [len(one) for one in params] == [len(one) for one in expected]
    for one, other in zip(params, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("decoder", ["cpu", "pillow"])
def test_batch_of_the_demo_does_not_depend_on_threads(decoder):
    config = DataConfig(source="demo", decoder=decoder)
    views = moco_v3_views(32, scale=(0.5, 1.0), flip=0.0, sigma=(0.1, 0.5))

    def take(threads):
        loader = build_loader(
            open_source(config),
            views,
            micro_batch=48,
            accumulation=1,
            rank=0,
            world=1,
            seed=0,
            device="cpu",
            config=DataConfig(source="demo", decoder=decoder, threads=threads),
        )
        batches = [batch.views for batch in itertools.islice(loader, 2)]
        loader.close()
        return batches

    one, four = take(1), take(4)
    for views_of_one, views_of_four in zip(one, four, strict=True):
        for a, b in zip(views_of_one, views_of_four, strict=True):
            assert a.shape == (48, 32, 32, 3)
            assert a.dtype == torch.uint8
            assert torch.equal(a, b)
        assert not torch.equal(*views_of_one)
