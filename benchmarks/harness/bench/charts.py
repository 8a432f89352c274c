"""Which charts a machine's rows make, and their PNGs: the same rows give the same bytes."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

from . import plots
from .report import STEPS
from .results import Machine, headline
from .rows import Row

DPI = 110
SOURCE, PIXELS = "Source", "Pixels"  # text chunks of a PNG: what it was drawn from, and what was drawn


@dataclass(frozen=True)
class Chart:
    """A kind of chart."""

    name: str
    """Of the file."""
    title: str
    """Says how to read it."""
    suite: str
    ops: tuple[str, ...]
    """Which rows it takes; all of the suite if empty."""
    draw: Callable[[list[Row]], Figure | None]
    """None where the rows make no chart."""

    def select(self, machine: Machine) -> list[Row]:
        """The rows of a machine that it shows."""
        rows = [row for row in machine.rows if row.suite == self.suite and row.op != "roofline"]
        return headline([row for row in rows if not self.ops or row.op in self.ops])

    def fingerprint(self, machine: Machine) -> str:
        """Changes with the rows and with the code that draws them."""
        code = "".join(Path(str(module)).read_text() for module in (__file__, plots.__file__))
        text = json.dumps([machine.title, [row.to_json() for row in self.select(machine)], code])
        return hashlib.sha256(text.encode()).hexdigest()


FASTER = "speed of vitrail over others (medians, quantiles 0.2–0.8)"
ROOFLINE = "share of the floor that copy bandwidth and matrix rate set"
CHARTS = (
    Chart("steps", f"Whole training steps: {FASTER}", "steps", tuple(STEPS), plots.ratios),
    Chart("batch", "A training step as the batch grows", "steps", ("mae_batch",), plots.batches),
    Chart("cost", "A training step against tokens and mask ratio", "steps", ("mae_cost",), plots.costs),
    Chart("kernels", f"Ops: {FASTER}", "kernels", (), plots.ratios),
    Chart("kernels-roofline", f"Ops: {ROOFLINE}", "kernels", (), plots.roofline),
    Chart("engine", f"Parts of the engine: {FASTER}", "engine", (), plots.ratios),
    Chart("engine-roofline", f"Parts of the engine: {ROOFLINE}", "engine", (), plots.roofline),
    Chart("loader", "Loaders: images per second and core (grey: torchvision)", "data", ("loader",), plots.loaders),
)


def drawn(machine: Machine) -> list[str]:
    """The names of the charts that a machine's rows make."""
    return [chart.name for chart in CHARTS if _figure(chart, machine) is not None]


def png(name: str, machine: Machine) -> bytes:
    """A chart of `drawn` as a file."""
    chart = next(chart for chart in CHARTS if chart.name == name)
    figure = _figure(chart, machine)
    assert figure is not None
    with matplotlib.rc_context(plots.STYLE):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    text = PngImagePlugin.PngInfo()
    text.add_text(SOURCE, chart.fingerprint(machine))
    text.add_text(PIXELS, hashlib.sha256(pixels.tobytes()).hexdigest())
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True, pnginfo=text)
    return file.getvalue()


def is_current(file: Path, name: str, machine: Machine) -> bool:
    """Whether a file is the chart that would be drawn.

    By what it says of its source, since fonts and rasterisers of other versions give other pixels.
    """
    if not file.exists():
        return False
    chart = next(chart for chart in CHARTS if chart.name == name)
    with Image.open(file) as image:
        pixels = hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()
        return image.info.get(SOURCE) == chart.fingerprint(machine) and image.info.get(PIXELS) == pixels


def _figure(chart: Chart, machine: Machine) -> Figure | None:
    rows = chart.select(machine)
    if not rows:
        return None
    with matplotlib.rc_context(plots.STYLE):
        figure = chart.draw(rows)
        if figure is not None:
            figure.suptitle(chart.title, x=0.01, ha="left", fontsize=10, fontweight="bold", wrap=True)
            figure.supxlabel(f"{machine.title}; {machine.dates}", x=0.99, ha="right", fontsize=8, color="#555555")
    return figure
