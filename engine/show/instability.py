"""A run that is made unstable on purpose, beside one that a frozen patch projection keeps stable."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from .pictures import ALARM_COLOURS, read_alarms, read_metrics

PANELS = (
    ("train", "first_layer_gradient_norm", True),
    ("train", "gradient_norm", True),
    ("evaluation", "knn", False),
)


def compare(runs: dict[str, Path], output: Path) -> dict[str, dict[str, Any]]:
    """Draw the runs above each other, print what the guard said of them, and write both down.

    Args:
        runs: by name, the folders of finished or stopped runs.
        output: folder that `instability.png` and `instability.json` are written to.

    Returns:
        For each run: `alarms` by kind, the `first_alarm`'s step (None without any), and the `best` and `last`
        nearest-neighbour accuracy, 0 to 1.
    """
    found = {name: _read(folder / "metrics.jsonl") for name, folder in runs.items()}
    (output / "instability.json").write_text(json.dumps(found, indent=1))
    _draw({name: folder / "metrics.jsonl" for name, folder in runs.items()}, output / "instability.png")
    table = Table("patch projection", "alarms", "first at step", "best 20-NN", "last 20-NN", title_justify="left")
    for name, told in found.items():
        alarms = ", ".join(f"{count} {kind}" for kind, count in told["alarms"].items()) or "none"
        first = str(told["first_alarm"] or "")
        table.add_row(name, alarms, first, *(f"{100 * told[key]:.1f} %" for key in ("best", "last")))
    Console().print(table)
    Console().print(f"Picture: {output / 'instability.png'}")
    return found


def _read(metrics: Path) -> dict[str, Any]:
    alarms = read_alarms(metrics)
    curve = [record["knn"] for record in read_metrics(metrics) if "knn" in record]
    return {
        "alarms": dict(Counter(kind for _, kind in alarms)),
        "first_alarm": alarms[0][0] if alarms else None,
        "best": max(curve, default=0.0),
        "last": curve[-1] if curve else 0.0,
    }


def _draw(runs: dict[str, Path], path: Path) -> None:
    """One row of panels for each run, with the same axes."""
    figure, axes = plt.subplots(
        len(runs), len(PANELS), figsize=(4 * len(PANELS), 2.4 * len(runs)), sharex=True, sharey="col", squeeze=False
    )
    for (name, metrics), line in zip(runs.items(), axes, strict=True):
        records, alarms = read_metrics(metrics), read_alarms(metrics)
        for axis, (kind, quantity, logarithmic) in zip(line, PANELS, strict=True):
            points = [(r["step"], r[quantity]) for r in records if r["kind"] == kind and quantity in r]
            axis.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1)
            axis.set_yscale("log" if logarithmic else "linear")
            for step, alarm in alarms:
                axis.axvline(step, color=ALARM_COLOURS[alarm], linestyle="--", linewidth=0.8)
            axis.grid(alpha=0.3)
        line[0].set_ylabel(name.replace(", ", "\n"), fontsize=9)
    for axis, (_, quantity, _) in zip(axes[0], PANELS, strict=True):
        axis.set_title(quantity.replace("_", " "), fontsize=10)
    for kind in sorted({alarm for metrics in runs.values() for _, alarm in read_alarms(metrics)}):
        axes[0, 0].plot([], [], color=ALARM_COLOURS[kind], linestyle="--", label=f"alarm: {kind}")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
