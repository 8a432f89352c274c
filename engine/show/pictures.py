"""Pictures of a run: what the autoencoder paints, and its curves with their alarms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a training machine has no screen

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import DataConfig, Source, evaluation_batches
from ..evaluate.features import evaluation_view
from ..methods.mae import Reconstruction


def some_images(source: Source, size: tuple[int, int], data: DataConfig, *, count: int, device: torch.device) -> Tensor:
    """Some images of a source, always the same random ones, as they are judged.

    Args:
        source: images.
        size: (height, width) in pixels.
        data: decoding options.
        count: how many, or all where there are fewer.
        device: where the images go.

    Returns:
        uint8 `[count, H, W, 3]`.

    Raises:
        ValueError: none are wanted.
    """
    if count < 1:
        raise ValueError(f"{count} images were asked for; expected at least one")
    batches = evaluation_batches(
        source, evaluation_view(size), batch=count, rank=0, world=1, device=device, config=data, limit=count
    )
    return next(iter(batches)).views[0]


def draw_reconstructions(pictures: Reconstruction, path: Path, *, columns: int = 4, note: str = "") -> None:
    """Save triples of image, masked image and reconstruction side by side.

    Args:
        pictures: three uint8 tensors `[B, H, W, 3]`.
        path: the PNG to write.
        columns: triples per row.
        note: a line below the title.
    """
    count = pictures.image.shape[0]
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, 3 * columns, figsize=(3.3 * columns, 1.25 * rows + 0.6), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i in range(count):
        for j, (name, images) in enumerate(zip(("image", "masked", "painted"), pictures, strict=True)):
            axis = axes[i // columns][3 * (i % columns) + j]
            axis.imshow(images[i].cpu().numpy(), interpolation="nearest")
            if i < columns:
                axis.set_title(name, fontsize=9)
    figure.suptitle(note, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_grid(
    rows: dict[str, list[NDArray[np.uint8]]],
    path: Path,
    *,
    marked: dict[str, list[bool]] | None = None,
    note: str = "",
) -> None:
    """Save images in named rows of equal length.

    Args:
        rows: by name, uint8 images `[H, W, 3]`.
        path: the PNG to write.
        marked: by name, which images of a row get a frame.
        note: a line above all.
    """
    columns = max(map(len, rows.values()))
    figure, axes = plt.subplots(len(rows), columns, figsize=(0.9 * columns, 1.0 * len(rows) + 0.3), squeeze=False)
    for (name, images), line in zip(rows.items(), axes, strict=True):
        frames = (marked or {}).get(name, [False] * columns)
        for image, framed, axis in zip(images, frames, line, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set(visible=framed, color="tab:red", linewidth=2.5)
        line[0].set_ylabel(name, fontsize=8)
    figure.suptitle(note, fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; of several lines for one kind and step the last counts."""
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] != "event":
            latest[record["kind"], record["step"]] = record
    return sorted(latest.values(), key=lambda record: record["step"])


def read_alarms(path: Path) -> list[tuple[int, str]]:
    """Step and kind of the alarms in a run's `metrics.jsonl`, each once."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return sorted({(r["step"], r["alarm"]) for r in records if "alarm" in r and r["action"] != "over"})


# Panels of the curves: kind of record, quantities that share an axis, whether it is logarithmic.
PANELS = (
    ("train", ("loss",), False),
    ("train", ("lr",), False),
    ("train", ("gradient_norm", "first_layer_gradient_norm"), True),
    ("evaluation", ("knn",), False),
    ("evaluation", ("rankme",), False),
)
ALARM_COLOURS = {"spike": "tab:red", "dip": "tab:purple", "collapse": "black", "nonfinite": "tab:gray"}


def draw_curves(metrics: Path, path: Path) -> None:
    """Save loss, learning rate, gradient norms, nearest-neighbour accuracy and rank of the features by step.

    What was not measured has no panel. Alarms are dashed vertical lines, in one colour for each kind.

    Args:
        metrics: a run's `metrics.jsonl`.
        path: the PNG to write.
    """
    records, alarms = read_metrics(metrics), read_alarms(metrics)
    panels = [panel for panel in PANELS if any(r["kind"] == panel[0] and panel[1][0] in r for r in records)]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.8), squeeze=False)
    for axis, (kind, names, logarithmic) in zip(axes[0], panels, strict=True):
        for name in names:
            points = [(r["step"], r[name]) for r in records if r["kind"] == kind and name in r]
            if points:
                label, marker = name.replace("_", " "), "o" if len(points) < 20 else None
                axis.plot(*zip(*points, strict=True), marker=marker, label=label)
        if logarithmic:
            axis.set_yscale("log")
            axis.legend(fontsize=7)
        for step, alarm in alarms:
            axis.axvline(step, color=ALARM_COLOURS[alarm], linestyle="--", linewidth=0.8)
        axis.set_title(names[0].replace("_", " "), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    told = sorted({alarm for _, alarm in alarms})
    if told:
        lines = [plt.Line2D([], [], color=ALARM_COLOURS[alarm], linestyle="--") for alarm in told]
        axes[0, 0].legend(lines, told, fontsize=7, title="alarms", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
