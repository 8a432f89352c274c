"""Colour operations: what they draw, and that Pillow's side is torchvision's to the bit."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.stats import chisquare, kstest
from torchvision.transforms import functional as F

from vitrail.engine.data import ColorJitter, GaussianBlur, RandomGrayscale, Solarize
from vitrail.engine.data.pillow import apply
from vitrail.engine.data.views import ADJUSTMENTS

DRAWS = 6000
SIZE = (40, 50)
THEIRS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def draws(op):
    rng = np.random.default_rng(0)
    drawn = np.stack([op.draw(rng, SIZE) for _ in range(DRAWS)])
    assert drawn.dtype == np.float32
    return drawn


def has_share(chosen, p):
    return chosen.mean() == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / DRAWS))


# As for crops: seeds are fixed, and 1e-3 is the share of seeds that would fail a right distribution.
def is_uniform(values, low, high):
    return kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


def test_jitter_draws_every_order_alike_and_factors_as_torchvision_does():
    drawn = draws(ColorJitter(p=0.7, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1))
    assert has_share(drawn[:, 0] >= 0, 0.7)
    assert (drawn[drawn[:, 0] < 0] == [-1, -1, -1, -1, 1, 1, 1, 0]).all()
    applied = drawn[drawn[:, 0] >= 0]
    orders = [tuple(row) for row in applied[:, :4].astype(int)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == len(orders)
    assert chisquare(counts).pvalue > 1e-3
    for which, (low, high) in enumerate([(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]):
        factor = applied[:, 4 + which]
        assert is_uniform(factor, low, high), ADJUSTMENTS[which]
        when = (applied[:, :4] == which).argmax(axis=1)
        assert abs(np.corrcoef(factor, when)[0, 1]) < 4 / np.sqrt(len(applied))  # one number must not serve two ends


def test_jitter_of_strength_zero_is_left_out():
    drawn = draws(ColorJitter(p=1.0, contrast=0.0, hue=0.0))[:, :4]
    assert set(drawn.ravel()) == {-1, 0, 2}
    assert ((drawn >= 0).sum(axis=1) == 2).all()


@pytest.mark.parametrize("op", [RandomGrayscale(p=0.2), Solarize(p=0.35)])
def test_choices_have_their_probability(op):
    drawn = draws(op)
    assert drawn.shape == (DRAWS, 1)
    assert set(drawn.ravel()) == {0.0, 1.0}
    assert has_share(drawn, op.p)


def test_blur_has_its_probability_and_widths():
    sigma = draws(GaussianBlur(p=0.6, sigma=(0.1, 2.0)))[:, 0]
    assert has_share(sigma > 0, 0.6)
    assert is_uniform(sigma[sigma > 0], 0.1, 2.0)


@pytest.fixture(scope="module")
def pictures():
    """Smooth images, noise, flat colours, and the corners of the colour cube."""
    rng = np.random.default_rng(1)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize(SIZE[::-1]) for _ in range(20)]
    noise = [Image.fromarray(rng.integers(0, top, (*SIZE, 3)).astype(np.uint8)) for top in (256, 60)]
    corners = np.array(list(itertools.product((0, 255), repeat=3)), np.uint8)
    flat = [Image.fromarray(np.broadcast_to(colour, (*SIZE, 3)).copy()) for colour in corners]
    return coarse + noise + flat + [Image.fromarray(np.tile(corners[None], (SIZE[0], 1, 1)))]


def same(a, b):
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "op", [ColorJitter(p=1.0), ColorJitter(p=1.0, brightness=1.5, contrast=1.5, saturation=1.5, hue=0.5)]
)
def test_jitter_is_torchvisions_in_the_drawn_order(op, pictures):
    rng = np.random.default_rng(2)
    for image in pictures * 5:
        params = op.draw(rng, SIZE)
        expected = image
        for which in params[:4].astype(int):
            expected = THEIRS[which](expected, float(params[4 + which]))
        assert same(apply(op, image, params), expected)
        assert same(apply(op, image, np.array([-1, -1, -1, -1, 0, 0, 0, 0.2], np.float32)), image)


def test_grey_solarisation_and_blur_are_torchvisions_and_pillows(pictures):
    one, none, width = (np.array([value], np.float32) for value in (1.0, 0.0, 1.3))
    for image in pictures:
        assert same(apply(RandomGrayscale(), image, one), F.rgb_to_grayscale(image, 3))
        for threshold in (0, 1, 77, 128, 255, 256):
            assert same(apply(Solarize(threshold=threshold), image, one), F.solarize(image, threshold))
        assert same(apply(GaussianBlur(), image, width), image.filter(ImageFilter.GaussianBlur(float(width[0]))))
        for op in (RandomGrayscale(), Solarize(), GaussianBlur()):
            assert same(apply(op, image, none), image)
