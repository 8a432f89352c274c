"""Masks of whole batches against the same rules applied image by image, in plain Python."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrail.engine.methods import masks
from vitrail.engine.methods.masks import (
    BLOCK_COLUMNS,
    block_masks,
    coarse_columns,
    coarse_masks,
    dinov2_counts,
    ibot_columns,
    ibot_counts,
    masked_rows,
    ranks,
)

Grid = tuple[int, int]
Attempt = tuple[float, float, Callable[[int, int], tuple[int, int]]]


@dataclass(frozen=True)
class Blocks:
    """A method's setting of `block_masks`, and how many tokens it wants: a range of shares, or one number."""

    grid: Grid
    wanted: float | tuple[float, float]
    least_area: float
    most_area: float | None = None
    tries: int = 10
    rounds: int = 20

    def counts(self, images: int, generator: torch.Generator) -> Tensor:
        if isinstance(self.wanted, float):
            return torch.full((images,), self.wanted)
        low, high = self.wanted
        return self.grid[0] * self.grid[1] * (low + (high - low) * torch.rand(images, generator=generator))

    def masks(self, noise: Tensor, counts: Tensor) -> Tensor:
        limits = {"least_area": self.least_area, "most_area": self.most_area}
        return block_masks(noise, self.grid, counts, **limits, tries=self.tries, rounds=self.rounds)

    def one(self, wanted: float, attempts: Iterator[Attempt]) -> list[bool]:
        """The mask of one image, token by token."""
        H, W = self.grid
        masked: set[int] = set()
        for _ in range(self.rounds):
            missing = wanted - len(masked)
            if missing <= 0:
                break
            added = self.block(masked, missing if self.most_area is None else min(missing, self.most_area), attempts)
            if not added:
                break
            masked |= added
        return [token in masked for token in range(H * W)]

    def block(self, masked: set[int], cap: float, attempts: Iterator[Attempt]) -> set[int]:
        """The tokens that the first acceptable of `tries` attempts adds."""
        H, W = self.grid
        for _, (u, v, place) in zip(range(self.tries), attempts, strict=False):
            area = self.least_area + (cap - self.least_area) * u
            ratio = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * v)
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= H or width >= W:
                continue
            top, left = place(H - height + 1, W - width + 1)
            added = {W * y + x for y in range(top, top + height) for x in range(left, left + width)} - masked
            if 0 < len(added) <= cap:
                return added
        return set()


def from_noise(row: list[float]) -> Iterator[Attempt]:
    """Attempts that take the numbers of a row in turn."""
    for u, v, w in zip(row[0::3], row[1::3], row[2::3], strict=True):
        yield u, v, lambda rows, columns, w=w: divmod(int(w * (rows * columns)), columns)


def from_python(source: random.Random) -> Iterator[Attempt]:
    """Attempts without end, as the loaders of the released codes make them: each coordinate of the place on its own."""
    while True:
        yield (
            source.random(),
            source.random(),
            lambda rows, columns: (source.randrange(rows), source.randrange(columns)),
        )


BEIT = Blocks((14, 14), 75.0, 16)
IBOT = Blocks((14, 14), (0.0, 0.5), 16)
DINOV2 = Blocks((14, 14), (0.1, 0.5), 4, 98)
SETTINGS = {
    "BEiT": (BEIT, 600, BLOCK_COLUMNS),
    "iBOT": (IBOT, 600, BLOCK_COLUMNS),
    "DINOv2/16": (DINOV2, 400, BLOCK_COLUMNS),
    "DINOv2/14 at 518": (Blocks((37, 37), (0.1, 0.5), 4, 684, rounds=32), 40, BLOCK_COLUMNS),
    "wide": (Blocks((5, 130), (0.1, 0.5), 9), 100, BLOCK_COLUMNS),
    "tall": (Blocks((20, 3), (0.2, 0.6), 2), 100, BLOCK_COLUMNS),
    "out of noise": (BEIT, 300, 18),
    "two rounds, three tries": (Blocks((14, 14), 75.0, 16, 40, tries=3, rounds=2), 300, BLOCK_COLUMNS),
}


def draw(blocks: Blocks, images: int, columns: int = BLOCK_COLUMNS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, columns, generator=generator), blocks.counts(images, generator)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("as_gpu", [False, True], ids=["unfinished", "all"])
def test_blocks_are_those_of_the_rule_image_by_image(name, as_gpu, monkeypatch):
    if as_gpu:  # which keeps all images until the last round
        monkeypatch.setattr(masks, "_unfinished", lambda missing: torch.arange(len(missing)))
    blocks, images, columns = SETTINGS[name]
    noise, counts = draw(blocks, images, columns)
    got = blocks.masks(noise, counts)
    expected = [
        blocks.one(wanted, from_noise(row)) for row, wanted in zip(noise.tolist(), counts.tolist(), strict=True)
    ]
    assert got.dtype == torch.bool
    assert got.tolist() == expected
    assert (got.sum(1) <= counts).all()


def test_beit_masks_as_often_as_measured_for_its_released_code():
    """4000 draws of BEiT's own generator: mean 74.49, least 65, most 75, exactly 75 in 67.5 %."""
    masked = BEIT.masks(*draw(BEIT, 20_000)).sum(1)
    noise = math.sqrt(1 / 4000 + 1 / 20_000)  # of both estimates
    assert masked.double().mean().item() == pytest.approx(74.49, abs=5 * masked.double().std().item() * noise)
    assert (masked == 75).double().mean().item() == pytest.approx(0.675, abs=5 * math.sqrt(0.675 * 0.325) * noise)
    assert masked.max() == 75
    assert 60 <= masked.min() <= 65


@pytest.mark.parametrize("blocks", [BEIT, IBOT, DINOV2], ids=["BEiT", "iBOT", "DINOv2"])
def test_blocks_are_distributed_as_with_pythons_own_random_numbers(blocks):
    """Every token's chance of being masked, and the share of images with each number of masked tokens."""
    noise, counts = draw(blocks, 20_000, seed=1)
    got = blocks.masks(noise, counts)
    source, images = random.Random(2), 2500
    wanted = blocks.counts(images, torch.Generator().manual_seed(3)).tolist()
    expected = torch.tensor([blocks.one(count, from_python(source)) for count in wanted])
    steps = torch.arange(0, got.shape[1], 1 if blocks is BEIT else 14)
    for mine, theirs in (
        (got.double(), expected.double()),
        ((got.sum(1, keepdim=True) >= steps).double(), (expected.sum(1, keepdim=True) >= steps).double()),
    ):
        share = torch.cat([mine, theirs]).mean(0)
        deviation = (share * (1 - share) * (1 / len(mine) + 1 / len(theirs))).sqrt()
        assert ((mine.mean(0) - theirs.mean(0)).abs() <= 5 * deviation + 1e-12).all()


def test_a_block_mask_depends_on_its_own_row_alone():
    noise, counts = draw(IBOT, 64)
    whole, order = IBOT.masks(noise, counts), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(IBOT.masks(noise[order], counts[order]), whole[order])
    assert torch.equal(torch.cat([IBOT.masks(noise[:5], counts[:5]), IBOT.masks(noise[5:], counts[5:])]), whole)


def test_no_tokens_wanted_none_masked():
    noise, _ = draw(BEIT, 8)
    counts = torch.tensor([0, 40, 0, -3, 0, 40, 0, 40])
    before = counts.clone()
    assert (BEIT.masks(noise, counts).sum(1) > 0).tolist() == (counts > 0).tolist()
    assert not BEIT.masks(noise, torch.zeros(8)).any()
    assert torch.equal(counts, before)


def test_an_image_without_a_place_for_a_block_is_done_at_once(monkeypatch):
    looks, look = [], masks._unfinished
    monkeypatch.setattr(masks, "_unfinished", lambda missing: (looks.append(len(missing)), look(missing))[1])
    assert not block_masks(draw(BEIT, 3)[0], (1, 1), torch.ones(3), least_area=1).any()
    assert len(looks) == 2


@pytest.mark.parametrize(("grid", "scale", "cells", "tokens"), [((14, 14), 2, 49, 120), ((48, 48), 8, 36, 22 * 64)])
def test_simmim_masks_whole_cells_and_always_as_many(grid, scale, cells, tokens):
    assert coarse_columns(grid, scale) == cells
    noise = torch.rand(50, cells, generator=torch.Generator().manual_seed(0))
    got = coarse_masks(noise, grid, scale=scale, ratio=0.6)
    assert got.sum(1).tolist() == [tokens] * 50
    rows = range(grid[1] // scale)
    for row, mask in zip(noise.tolist(), got.view(-1, *grid).tolist(), strict=True):
        chosen = sorted(range(cells), key=row.__getitem__)[: tokens // scale**2]
        assert all(
            mask[y][x] == (y // scale * len(rows) + x // scale in chosen)
            for y in range(grid[0])
            for x in range(grid[1])
        )


def test_coarse_masks_of_an_oblong_grid():
    got = coarse_masks(torch.tensor([[0.5, 0.1, 0.9, 0.2, 0.7, 0.8]]), (4, 6), scale=2, ratio=1 / 3)
    assert ["".join("01"[token] for token in row) for row in got.view(4, 6).tolist()] == [
        "001100",
        "001100",
        "110000",
        "110000",
    ]


def test_ibot_leaves_half_of_the_crops_whole():
    noise = torch.tensor([[0.9, 0.25, 0.4], [0.9, 0.25, 0.5], [0.0, 0.0, 0.9], [0.0, 0.75, 0.999]])
    assert ibot_counts(noise, 196).tolist() == pytest.approx([0, 0.2 * 196, 0.1 * 196, 0.4 * 196], rel=1e-7)
    got = ibot_counts(noise, 100, ratios=(0.2, 0.3), variances=(0.1, 0.0))
    assert got.tolist() == pytest.approx([28.0, 30.0, 30.0, 30.0], rel=1e-6)
    counts = ibot_counts(torch.rand(20_000, ibot_columns(), generator=torch.Generator().manual_seed(0)), 196)
    assert (counts == 0).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(20_000))
    some = counts[counts > 0] / 196
    assert some.min() >= 0.1
    assert some.max() < 0.5
    assert some.mean().item() == pytest.approx(0.3, abs=5 * 0.4 / math.sqrt(12 * len(some)))


@pytest.mark.parametrize(("crops", "masked"), [(2, 1), (7, 3), (64, 32)])
def test_dinov2_draws_one_crop_from_each_part_of_the_range(crops, masked):
    generator = torch.Generator().manual_seed(crops)
    order, noise = ranks(torch.rand(crops, generator=generator)), torch.rand(crops, generator=generator)
    assert sorted(order.tolist()) == list(range(crops))
    counts, bound = dinov2_counts(order, noise, 196)
    edges = torch.linspace(0.1, 0.5, masked + 1, dtype=torch.float64).tolist()
    for place, u, count in zip(order.tolist(), noise.tolist(), counts.tolist(), strict=True):
        expected = 196 * (edges[place] + u * (edges[place + 1] - edges[place])) if place < masked else 0
        assert count == int(expected)
    assert bound == sum(int(196 * edge + 1e-9) for edge in edges[1:])
    largest, _ = dinov2_counts(order, torch.full((crops,), 1 - 2**-24), 196)
    assert bound - masked <= largest.sum() <= bound
    pairs, same = dinov2_counts(order.view(-1, 1), noise.view(-1, 1), 196)
    assert torch.equal(pairs, counts.view(-1, 1))
    assert same == bound


def test_ranks_are_places_in_ascending_order():
    assert ranks(torch.tensor([[0.5, 0.1, 0.7], [0.9, 0.2, 0.6]])).tolist() == [[2, 0, 4], [5, 1, 3]]


def test_dinov2_share_and_ratios():
    counts, bound = dinov2_counts(torch.tensor([2, 0, 3, 1]), torch.zeros(4), 100, share=0.75, ratios=(0.2, 0.8))
    assert counts.tolist() == [60, 20, 0, 40]
    assert bound == 40 + 60 + 80


@pytest.mark.parametrize("padding", [0, 1, 50])
def test_masked_rows_lists_every_masked_token_once(padding):
    masked = DINOV2.masks(*draw(DINOV2, 6))
    masked[[0, 3]] = False
    total = int(masked.sum())
    index, weight = masked_rows(masked, total + padding)
    assert index.dtype == torch.int64
    assert weight.dtype == torch.float32
    assert index[:total].tolist() == [i for i, one in enumerate(masked.flatten().tolist()) if one]
    each = masked.sum(1).tolist()
    assert weight[:total].tolist() == pytest.approx([1 / count for count in each for _ in range(count)])
    assert index[total:].tolist() == weight[total:].tolist() == [0] * padding


def test_masked_rows_of_nothing():
    index, weight = masked_rows(torch.zeros(2, 9, dtype=torch.bool), 3)
    assert index.tolist() == weight.tolist() == [0, 0, 0]


def test_a_gpu_is_never_waited_for():
    """Tensors without data have no value to wait for: whatever looks at one raises."""
    with FakeTensorMode():
        noise = torch.rand(4, BLOCK_COLUMNS, device="cuda")
        blocks = replace(BEIT, rounds=2).masks(noise, ibot_counts(noise[:, :3], 196))
        assert blocks.shape == (4, 196)
        assert [tensor.shape for tensor in masked_rows(blocks, 300)] == [(300,), (300,)]
        assert coarse_masks(noise[:, :49], (14, 14), scale=2, ratio=0.6).shape == (4, 196)
        counts, bound = dinov2_counts(ranks(noise[:, :2]), noise[:, 2:4], 196)
        assert counts.shape == (4, 2)
        assert bound == 273
        with pytest.raises(RuntimeError):
            blocks.nonzero()


NOISE = torch.full((2, 6), 0.5)
ERRORS = {
    "3 x 3 tokens do not tile a grid of 14 x 14": lambda: coarse_columns((14, 14), 3),
    r"noise must be \[B, 49\], got \(2, 6\)": lambda: coarse_masks(NOISE, (14, 14), scale=2, ratio=0.6),
    "ratio must be from 0 to 1, got 1.5": lambda: coarse_masks(NOISE, (2, 3), scale=1, ratio=1.5),
    r"noise must be \[B, 3 \* attempts\], got \(2, 5\)": lambda: BEIT.masks(NOISE[:, :5], torch.ones(2)),
    r"counts must be \[2\] on cpu as the noise is, got \[3\]": lambda: BEIT.masks(NOISE, torch.ones(3)),
    "aspect must be over 0": lambda: block_masks(NOISE, (4, 4), torch.ones(2), least_area=1, aspect=2.0),
    "least_area must not be negative, got -1": lambda: block_masks(NOISE, (4, 4), torch.ones(2), least_area=-1),
    r"noise must be \[B, 3\], got \(2, 6\)": lambda: ibot_counts(NOISE, 196),
    "one for each of 2 ratios, got 1": lambda: ibot_counts(NOISE[:, :3], 196, variances=(0.0,)),
    "one shape": lambda: dinov2_counts(torch.arange(3), NOISE[0], 196),
    "capacity must be positive, got 0": lambda: masked_rows(NOISE > 0, 0),
    "12 tokens are masked and capacity is 11": lambda: masked_rows(NOISE > 0, 11),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_cannot_be_is_said(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
