"""Pictures of a run: what the autoencoder paints, and its curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a training machine has no screen

import matplotlib.pyplot as plt

from ..methods.mae import Reconstruction


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; of several lines for one kind and step the last counts."""
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] != "event":
            latest[record["kind"], record["step"]] = record
    return sorted(latest.values(), key=lambda record: record["step"])


def draw_curves(metrics: Path, path: Path) -> None:
    """Save loss, learning rate, gradient norm and nearest-neighbour accuracy against the step.

    Args:
        metrics: a run's `metrics.jsonl`.
        path: the PNG to write.
    """
    records = read_metrics(metrics)
    panels = [("train", "loss"), ("train", "lr"), ("train", "gradient_norm"), ("evaluation", "knn")]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.8))
    for axis, (kind, name) in zip(axes, panels, strict=True):
        points = [(r["step"], r[name]) for r in records if r["kind"] == kind and name in r]
        axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o" if len(points) < 20 else None)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
