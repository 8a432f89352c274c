"""Whether equal parts of two pictures get equal features (EsViT, Li et al., arXiv 2106.09785)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrail.kernels import region_match

from ..data import DataConfig, Source, View, evaluation_batches
from ..data.views import ColorJitter, HorizontalFlip, RandomGrayscale
from .features import evaluation_view


@dataclass(frozen=True)
class Pair:
    """An image, its changed mirror image, and the pairs of cells that are most similar."""

    image: NDArray[np.uint8]
    """`[H, W, 3]`."""
    mirrored: NDArray[np.uint8]
    """`[H, W, 3]`."""
    cells: NDArray[np.int64]
    """Row and column of each cell of the image, `[M, 2]`, the most similar pair first."""
    matched: NDArray[np.int64]
    """Row and column of the cell of the mirrored image that is most similar to it, `[M, 2]`."""
    expected: NDArray[np.int64]
    """Row and column where the cell really is, `[M, 2]`."""

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which matches are exactly right, `[M]`."""
        return (self.matched == self.expected).all(axis=1)


@dataclass(frozen=True, kw_only=True)
class Correspondence:
    """How well cells of images find themselves again in changed mirror images."""

    accuracy: float
    """Share of exact matches among the most similar pairs of each image, 0 to 1."""
    distance: float
    """Mean distance between found and true place of those pairs, in cells."""
    all_accuracy: float
    """Share of exact matches among all cells, 0 to 1."""
    all_distance: float
    """Mean distance of all cells, in cells."""
    chance: float
    """Accuracy of guessing: one over the number of cells."""
    images: int
    """Images that were compared."""
    grid: tuple[int, int]
    """Rows and columns of cells."""
    pairs: tuple[Pair, ...]
    """The first images, for pictures."""

    def numbers(self) -> dict[str, float]:
        """What a report holds: all but the pictures."""
        return {
            "accuracy": self.accuracy,
            "distance": self.distance,
            "all_accuracy": self.all_accuracy,
            "all_distance": self.all_distance,
            "chance": self.chance,
            "images": self.images,
        }


def mirrored_view(view: View) -> View:
    """The view whose images are compared with those of `view`: mirrored, colours changed, then grey."""
    ops = (HorizontalFlip(p=1.0), ColorJitter(p=0.8), RandomGrayscale(p=1.0))
    return View(name="mirrored", ops=(*view.ops, *ops))


def cell_grid(cells: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of row-major cells that cover an image.

    Args:
        cells: how many.
        size: (height, width) of the image in pixels.

    Raises:
        ValueError: no grid with about the image's aspect has so many cells.
    """
    rows = max(1, round(math.sqrt(cells * size[0] / size[1])))
    if cells % rows:
        raise ValueError(
            f"{cells} regions cannot be a grid over an image of {size[0]}x{size[1]}: expected one vector for each cell "
            "of a grid, row by row, without class token"
        )
    return rows, cells // rows


@torch.no_grad()
def correspondence(
    backbone: Any,
    source: Source,
    size: tuple[int, int],
    data: DataConfig,
    *,
    batch: int,
    device: torch.device,
    limit: int | None = None,
    top: int = 10,
    shown: int = 8,
    rank: int = 0,
    world: int = 1,
) -> Correspondence:
    """Match the regions of images with those of their changed mirror images.

    Every region of an image is matched with the most similar one of the other image, by cosine; the match is right if
    it is exactly the mirrored place. The published figure counts the ten most similar pairs of each image; how the
    colours change is drawn from the images' numbers, so the result is the same in every run. A network that tells
    places apart by their position alone, and not by what is there, finds the place that is *not* mirrored: it is right
    in the middle column of an odd grid and nowhere else.

    Collective when `world` is more than 1: every rank must call it, and every rank gets the whole result.

    Args:
        backbone: has `forward_regions`, uint8 images `[B, H, W, 3]` to (vector `[B, D]`, regions `[B, T, D]`), the
            regions row by row.
        source: images, labelled or not.
        size: (height, width) of the images in pixels.
        data: decoding options.
        batch: images at a time on a rank.
        device: where the images go.
        limit: use only this many images, always the same random ones.
        top: pairs of each image that count as its most similar ones.
        shown: images whose pairs are kept for pictures.
        rank: this process.
        world: processes that share the work.

    Raises:
        ValueError: the regions are no grid, or there are no images.
    """
    tally = _Tally()
    for numbers, images, others in _batches(
        source, size, data, batch=batch, device=device, limit=limit, rank=rank, world=world
    ):
        regions, mirrored = (backbone.forward_regions(part)[1] for part in (images, others))
        tally.grid = cell_grid(regions.shape[1], size)
        matched, similarity = region_match(regions, mirrored)
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :top]
        tally.scores += zip(numbers.tolist(), _scores(matched, order, tally.grid).tolist(), strict=True)
        for i in range(min(shown - len(tally.pairs), len(images))):
            tally.pairs.append((int(numbers[i]), _pair(images[i], others[i], order[i], matched[i], tally.grid)))
    return tally.gathered(world).result(shown)


@dataclass
class _Tally:
    """What a rank has found: for each image its number in the source and what belongs to it."""

    grid: tuple[int, int] = (0, 0)
    scores: list[tuple[int, list[float]]] = field(default_factory=list)
    pairs: list[tuple[int, Pair]] = field(default_factory=list)

    def gathered(self, world: int) -> _Tally:
        """Those of all ranks together, in the order of the split."""
        parts: list[Any] = [self] * world
        if world > 1:
            torch.distributed.all_gather_object(parts, self)
        return _Tally(
            max(part.grid for part in parts),
            sorted((score for part in parts for score in part.scores), key=itemgetter(0)),
            sorted((pair for part in parts for pair in part.pairs), key=itemgetter(0)),
        )

    def result(self, shown: int) -> Correspondence:
        """Means over the images."""
        if not self.scores:
            raise ValueError("there are no images whose regions could be compared: expected at least one")
        accuracy, distance, all_accuracy, all_distance = np.mean([score for _, score in self.scores], axis=0).tolist()
        return Correspondence(
            accuracy=accuracy,
            distance=distance,
            all_accuracy=all_accuracy,
            all_distance=all_distance,
            chance=1 / math.prod(self.grid),
            images=len(self.scores),
            grid=self.grid,
            pairs=tuple(pair for _, pair in self.pairs[:shown]),
        )


def _batches(
    source: Source, size: tuple[int, int], data: DataConfig, **options: Any
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Numbers of the images in the source, the images, and their mirror images, two times uint8 `[B, H, W, 3]`."""
    plain = evaluation_view(size)
    passes = (evaluation_batches(source, view, config=data, **options) for view in (plain, mirrored_view(plain)))
    for images, others in zip(*passes, strict=True):
        if not torch.equal(images.indices, others.indices):
            raise ValueError(
                "an image could be read only once of twice, so that pairs are incomplete: run `vitrail data check`"
            )
        yield images.indices, images.views[0], others.views[0]


def _mirrored(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Numbers of the cells where row-major cells are in the mirror image."""
    rows = torch.div(cells, grid[1], rounding_mode="floor")
    return rows * grid[1] + grid[1] - 1 - cells % grid[1]


def _places(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Row and column of row-major cells, `[..., 2]`."""
    return torch.stack([torch.div(cells, grid[1], rounding_mode="floor"), cells % grid[1]], dim=-1)


def _scores(matched: Tensor, order: Tensor, grid: tuple[int, int]) -> Tensor:
    """Per image, accuracy and distance of the most similar pairs, then of all, `[B, 4]`.

    Args:
        matched: the cell of the mirror image that each cell was matched with, `[B, T]`.
        order: the cells of the most similar pairs, `[B, M]`.
        grid: rows and columns.
    """
    truth = _mirrored(torch.arange(matched.shape[1], device=matched.device), grid)
    right = (matched == truth).double()
    distance = (_places(matched, grid) - _places(truth, grid)).double().norm(dim=-1)
    best = (values.gather(1, order) for values in (right, distance))
    return torch.stack([values.mean(dim=1) for values in (*best, right, distance)], dim=1)


def _pair(image: Tensor, mirrored: Tensor, cells: Tensor, matched: Tensor, grid: tuple[int, int]) -> Pair:
    """What a picture shows of an image: `cells` are those of its most similar pairs, `matched` the matches of all."""
    places = (_places(found, grid).cpu().numpy() for found in (cells, matched[cells], _mirrored(cells, grid)))
    return Pair(image.cpu().numpy(), mirrored.cpu().numpy(), *places)
