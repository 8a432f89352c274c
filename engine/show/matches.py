"""Pictures of matched regions: which cell of a mirror image a network takes for which cell of the image."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from ..data import DataConfig, Source
from ..evaluate.correspondence import Correspondence, Pair, correspondence
from ..evaluate.features import evaluation_mode
from ..methods.base import Method

COLUMNS = 4  # pairs beside each other
GAP = 0.15  # between the two images of a pair, as a share of their width
RIGHT, WRONG = "limegreen", "red"


def match_regions(
    method: Method,
    source: Source,
    data: DataConfig,
    *,
    precision: str,
    batch: int,
    device: torch.device,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Correspondence:
    """Run `correspondence` on a method's backbone, at the size of its first view. Collective.

    Args:
        method: on `device`.
        source: images.
        data: decoding options.
        precision: "bf16" for autocast.
        batch: images at a time on a rank.
        device: where the images go.
        limit: use only this many images.
        rank: this process.
        world: processes that share the work.
    """
    with evaluation_mode(method, precision):
        return correspondence(
            method.backbone(),
            source,
            method.views()[0].size,
            data,
            batch=batch,
            device=device,
            limit=limit,
            rank=rank,
            world=world,
        )


def draw_matches(report: Correspondence, path: Path) -> None:
    """Save the pairs of images with lines between matched cells, green where right and red where wrong.

    Args:
        report: what `correspondence` found.
        path: the PNG to write.
    """
    rows = -(-len(report.pairs) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(2.6 * COLUMNS, 1.35 * rows + 0.4), squeeze=False)
    _draw_pairs(axes.flat, report)
    figure.suptitle(_title(report), fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare_correspondence(reports: dict[str, Correspondence], path: Path) -> None:
    """Save the accuracies of several networks as bars beside chance, and their matches of the same images in rows.

    Args:
        reports: by name, what `correspondence` found on the same images.
        path: the PNG to write.
    """
    shown = min(COLUMNS, *(len(report.pairs) for report in reports.values()))
    figure = plt.figure(figsize=(2.6 + 2.6 * shown, 1.45 * max(2, len(reports)) + 0.3), layout="constrained")
    bars, matches = figure.subfigures(1, 2, width_ratios=(2.6, 2.6 * shown))
    _draw_bars(bars.subplots(), reports)
    axes = matches.subplots(len(reports), shown, squeeze=False)
    for line, (name, report) in zip(axes, reports.items(), strict=True):
        _draw_pairs(line, report)
        line[0].text(-0.03, 0.5, name, rotation=90, ha="right", va="center", fontsize=8, transform=line[0].transAxes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _title(report: Correspondence) -> str:
    rows, columns = report.grid
    return (
        f"{100 * report.accuracy:.1f} % of the most similar pairs are right, {100 * report.all_accuracy:.1f} % of all "
        f"{rows} x {columns} regions; chance is {100 * report.chance:.1f} %"
    )


def _draw_bars(axis: Any, reports: dict[str, Correspondence]) -> None:
    """Both accuracies of each network, and the line of chance, which depends on the number of regions."""
    places = np.arange(len(reports))
    for shift, name, label in ((-0.2, "accuracy", "most similar pairs"), (0.2, "all_accuracy", "all regions")):
        heights = [100 * report.numbers()[name] for report in reports.values()]
        axis.bar_label(axis.bar(places + shift, heights, 0.4, label=label), fmt="%.0f", fontsize=7)
    for place, report in zip(places, reports.values(), strict=True):
        line = [100 * report.chance] * 2
        axis.plot((place - 0.45, place + 0.45), line, "k--", linewidth=1, label="" if place else "chance")
    axis.set_xticks(places, list(reports), fontsize=8, rotation=20, ha="right")
    axis.set_ylim(0, 115)
    axis.set_title("regions found again, %", fontsize=8)
    axis.legend(fontsize=6, loc="upper left")


def _draw_pairs(axes: Iterable[Any], report: Correspondence) -> None:
    """Draw the first pairs into axes, of which more than there are pairs stay empty."""
    pairs = iter(report.pairs)
    for axis in axes:
        axis.axis("off")
        pair = next(pairs, None)
        if pair is not None:
            _draw_pair(axis, pair, report.grid)


def _draw_pair(axis: Any, pair: Pair, grid: tuple[int, int]) -> None:
    height, width = pair.image.shape[:2]
    gap = np.full((height, max(1, round(GAP * width)), 3), 255, np.uint8)
    axis.imshow(np.concatenate([pair.image, gap, pair.mirrored], axis=1), interpolation="nearest")
    side = np.array([height, width]) / grid  # of a cell in pixels
    for start, end, right in zip(pair.cells, pair.matched, pair.right, strict=True):
        (top, left), (bottom, other) = (start + 0.5) * side - 0.5, (end + 0.5) * side - 0.5
        points = (left, other + width + gap.shape[1]), (top, bottom)
        axis.plot(*points, color=RIGHT if right else WRONG, linewidth=1, marker="o", markersize=2)
