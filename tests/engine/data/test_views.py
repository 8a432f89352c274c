import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision import transforms as T
from torchvision.transforms.functional import center_crop, resize

from vitrail.engine.data import CenterCrop, DataError, HorizontalFlip, RandomResizedCrop, Resize, View

DRAWS = 4000


def ours(op, size):
    rng = np.random.default_rng(0)
    return np.stack([op.draw(rng, size) for _ in range(DRAWS)]).astype(int)


def theirs(op, size):
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    return np.array([T.RandomResizedCrop.get_params(image, list(op.scale), list(op.ratio)) for _ in range(DRAWS)])


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (64, 64), (100, 350)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.32)])
def test_random_resized_crop_is_distributed_as_torchvisions(size, scale):
    op = RandomResizedCrop(size=224, scale=scale)
    a, b = ours(op, size), theirs(op, size)
    statistics = {
        "area": lambda w: w[:, 2] * w[:, 3],
        "aspect": lambda w: w[:, 3] / w[:, 2],
        "vertical place": lambda w: w[:, 0] / np.maximum(size[0] - w[:, 2], 1),
        "horizontal place": lambda w: w[:, 1] / np.maximum(size[1] - w[:, 3], 1),
    }
    for name, statistic in statistics.items():
        # Seeds are fixed, so this is no lottery: 1e-3 is the share of seeds that would fail an equal distribution.
        assert ks_2samp(statistic(a), statistic(b)).pvalue > 1e-3, name


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (7, 1000)])
def test_random_resized_crop_falls_back_to_the_centre_as_torchvision_does(size):
    op = RandomResizedCrop(size=224, scale=(0.9, 1.0))  # no such window fits into a strip
    assert {tuple(row) for row in ours(op, size)} == {tuple(row) for row in theirs(op, size)}


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 50)])
def test_random_resized_crop_stays_inside_tiny_images(size):
    windows = ours(RandomResizedCrop(size=8), size)
    assert (windows >= [0, 0, 1, 1]).all()
    assert (windows[:, :2] + windows[:, 2:] <= size).all()


def test_horizontal_flip_has_its_probability():
    for p in (0.0, 0.3, 1.0):
        share = ours(HorizontalFlip(p=p), (8, 8)).mean()
        assert share == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / DRAWS))


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (256, 256), (77, 401), (30, 31), (1000, 999)])
def test_resize_and_centre_crop_have_torchvisions_sizes_and_places(size):
    image = torch.arange(size[0] * size[1]).view(1, *size).float()
    scaled = resize(image, 256).shape[1:]
    rng = np.random.default_rng(0)
    assert tuple(Resize(size=256).draw(rng, size)) == Resize(size=256).output_size(size) == tuple(scaled)

    canvas = torch.arange(scaled[0] * scaled[1]).view(1, *scaled)
    top, left, height, width = CenterCrop(size=(224, 221)).draw(rng, tuple(scaled)).astype(int)
    assert torch.equal(center_crop(canvas, [224, 221]), canvas[:, top : top + height, left : left + width])


def test_view_knows_its_size():
    assert View(name="v", ops=(RandomResizedCrop(size=(48, 96)), HorizontalFlip())).size == (48, 96)
    assert View(name="v", ops=(Resize(size=256), CenterCrop(size=224))).size == (224, 224)


@pytest.mark.parametrize("ops", [(), (HorizontalFlip(),), (Resize(size=256),)])
def test_view_without_a_fixed_size(ops):
    with pytest.raises(
        DataError, match="the view 'v' has no fixed output size; expected RandomResizedCrop or CenterCrop"
    ):
        View(name="v", ops=ops)


def test_centre_crop_of_a_smaller_image():
    view = View(name="v", ops=(CenterCrop(size=224),))
    with pytest.raises(DataError, match=r"224x224 was asked of an image of 200x300 .* put Resize before"):
        view.draw(np.random.default_rng(0), (200, 300))


def test_view_draws_each_operation_for_the_size_that_reaches_it():
    resized, window = View(name="v", ops=(Resize(size=32), CenterCrop(size=(30, 40)))).draw(
        np.random.default_rng(0), (64, 128)
    )
    assert resized.tolist() == [32, 64]
    assert window.tolist() == [1, 12, 30, 40]
