"""Regions found again in mirror images, of networks whose answer is known, and the pictures of it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.engine.data import DataConfig, open_source
from vitrail.engine.evaluate.correspondence import cell_grid, correspondence
from vitrail.engine.show.matches import compare_correspondence, draw_matches

GRID, SIDE = (3, 5), 8
SIZE = (GRID[0] * SIDE, GRID[1] * SIDE)
CELLS = math.prod(GRID)


class Network:
    """Hands out region vectors computed from the image by a function of its cells' order of brightness."""

    def __init__(self, regions):
        self.regions = regions

    def forward_regions(self, images):
        cells = images.float().mean(-1).unflatten(2, (GRID[1], SIDE)).unflatten(1, (GRID[0], SIDE)).mean((2, 4))
        return None, self.regions(cells.flatten(1).argsort(1).argsort(1))


def content(order):
    """Cells differ by what is there: no change of brightness or contrast changes their order."""
    return torch.nn.functional.one_hot(order, CELLS).float()


def position(order):
    """Cells differ by where they are."""
    return torch.eye(CELLS).expand(len(order), -1, -1)


def bright_alone(order):
    """The five brightest cells differ by what is there; the others by that and, even more, by where they are."""
    bright = (order >= CELLS - 5)[..., None]
    there = torch.where(bright, 0.0, 1.2 * position(order))
    return torch.nn.functional.normalize(torch.cat([content(order), there], dim=-1), dim=-1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven square images that hold, where the evaluation view crops, cells of distinct brightness in no order."""
    folder = tmp_path_factory.mktemp("cells")
    for i in range(11):
        rng = np.random.default_rng(i)
        grey = rng.permutation(np.linspace(30, 150, CELLS)).reshape(GRID)
        border = (SIZE[1] - SIZE[0]) // 2
        pixels = np.pad(np.kron(grey, np.ones((SIDE, SIDE))), ((border, border), (0, 0)), constant_values=20)
        Image.fromarray((pixels[..., None] + (20, 0, -20)).astype(np.uint8)).save(folder / f"{i:02}.png")
    return open_source(DataConfig(path=str(folder)))


@pytest.fixture
def measure(images):
    def run(regions, **options):
        options = {"batch": 4, "device": torch.device("cpu")} | options
        data = DataConfig(decoder="pillow", threads=1)
        return correspondence(Network(regions), images, SIZE, data, **options)

    return run


def test_what_sees_content_finds_everything(measure):
    report = measure(content)
    assert (report.accuracy, report.all_accuracy) == (1.0, 1.0)
    assert (report.distance, report.all_distance) == (0.0, 0.0)
    assert (report.images, report.grid, report.chance) == (11, GRID, 1 / CELLS)
    assert all(pair.right.all() and len(pair.right) == 10 for pair in report.pairs)


def test_what_sees_position_finds_the_middle_column_alone(measure):
    report = measure(position)
    assert report.all_accuracy == pytest.approx(1 / 5)
    assert report.all_distance == pytest.approx((4 + 2 + 0 + 2 + 4) / 5)
    # All pairs are equally similar, so the first ten cells count: two rows.
    assert (report.accuracy, report.distance) == (pytest.approx(1 / 5), pytest.approx(12 / 5))


def test_what_sees_nothing_is_right_by_chance(measure):
    report = measure(lambda order: torch.ones(*order.shape, 4))
    assert report.all_accuracy == pytest.approx(report.chance)


def test_the_most_similar_pairs_count(measure):
    best = measure(bright_alone, top=5)
    assert best.accuracy == 1.0
    assert best.all_accuracy < 1.0
    more = measure(bright_alone, top=CELLS)
    assert more.accuracy == pytest.approx(best.all_accuracy)
    assert more.distance == pytest.approx(best.all_distance)
    for few, many in zip(best.pairs, more.pairs, strict=True):
        assert few.cells.tolist() == many.cells[:5].tolist()
        assert few.matched.tolist() == many.matched[:5].tolist()


def test_the_other_image_is_a_grey_mirror_image_with_other_contrast(measure):
    pairs = measure(content).pairs
    assert len(pairs) == 8
    changed = 0
    for pair in pairs:
        assert (pair.image != pair.image[..., :1]).any()
        assert (pair.mirrored == pair.mirrored[..., :1]).all()
        flipped = np.asarray(Image.fromarray(pair.image).convert("L").convert("RGB"))[:, ::-1]
        order = flipped[..., 0].flatten().argsort(kind="stable"), pair.mirrored[..., 0].flatten().argsort(kind="stable")
        assert (order[0] == order[1]).all()
        changed += (flipped != pair.mirrored).any()
    assert 3 < changed < 8  # with probability 0.8


def test_it_is_the_same_in_every_run_and_for_any_batch_and_ranks(measure, monkeypatch):
    alone = measure(bright_alone, batch=11)
    parts = []

    def gather(into, part):  # what a group of two would do, once both have told
        parts.append(part)
        into[:] = parts if len(parts) == 2 else [part, part]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    measure(bright_alone, rank=1, world=2)
    both = measure(bright_alone, rank=0, world=2, batch=3)
    assert both.numbers() == alone.numbers()
    for ours, theirs in zip(both.pairs, alone.pairs, strict=True):
        assert (ours.image == theirs.image).all()
        assert (ours.mirrored == theirs.mirrored).all()
        assert (ours.matched == theirs.matched).all()


def test_grids():
    assert cell_grid(49, (224, 224)) == (7, 7)
    assert cell_grid(6, (64, 96)) == (2, 3)
    assert cell_grid(1, (8, 200)) == (1, 1)
    with pytest.raises(ValueError, match=r"50 regions cannot be a grid over an image of 224x224.*without class token"):
        cell_grid(50, (224, 224))


def test_no_images_is_an_error(measure):
    with pytest.raises(ValueError, match="there are no images"):
        measure(content, limit=0)


def count(path, colour):
    """Pixels of about a colour in a picture."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (abs(pixels - colour).max(axis=2) < 60).sum()


GREEN, RED = (50, 205, 50), (255, 0, 0)


def test_lines_are_green_where_right_and_red_where_wrong(measure, tmp_path):
    for name, regions in (("right", content), ("mixed", position)):
        draw_matches(measure(regions), tmp_path / f"{name}.png")
    assert count(tmp_path / "right.png", GREEN) > 1000
    assert count(tmp_path / "right.png", RED) == 0
    assert count(tmp_path / "mixed.png", GREEN) > 100
    assert count(tmp_path / "mixed.png", RED) > 4 * count(tmp_path / "mixed.png", GREEN) / 2


def test_networks_are_compared(measure, tmp_path):
    right = measure(content)
    compare_correspondence({"content": right, "content again": right}, tmp_path / "two.png")
    compare_correspondence({"content": right, "position": measure(position)}, tmp_path / "other.png")
    assert count(tmp_path / "two.png", GREEN) > 1.5 * count(tmp_path / "other.png", GREEN)
    assert count(tmp_path / "two.png", RED) == 0
    assert count(tmp_path / "other.png", RED) > 500
