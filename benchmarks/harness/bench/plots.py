"""Matplotlib figures of rows. Colours are Okabe and Ito's, which the colour-blind tell apart; shapes differ as well."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .results import Comparison, Group, groups, is_ours
from .rows import Row
from .table import number

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
BLUE, VERMILION = "#0072B2", "#D55E00"
OTHERS = (("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#56B4E9", "P"), ("#000000", "X"), ("#8C6D31", "D"))
LINES = 46  # bars and headings in a column at most, so that a chart stays on a screen
FAILED = "no result: "


def styles(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Colour and shape of every implementation; ours are blue, compiled ones are drawn hollow and dashed."""
    names = sorted({row.implementation for row in rows})
    plain = [name for name in dict.fromkeys(name.removesuffix(" compiled") for name in names) if not is_ours(name)]
    found = {}
    for name in names:
        if is_ours(name):
            colour, marker = BLUE, "o"
        else:
            colour, marker = OTHERS[plain.index(name.removesuffix(" compiled")) % len(OTHERS)]
        hollow = name.endswith(" compiled")
        face, line = ("white", "--") if hollow else (colour, "-")
        found[name] = {"color": colour, "marker": marker, "markerfacecolor": face, "linestyle": line}
    return found


def ratios(rows: list[Row]) -> Figure | None:
    """A bar for every comparison, from 1 to the ratio; those where vitrail is slower go left, in another colour."""
    shown = [group for group in groups(rows) if group.comparisons]
    if not shown:
        return None
    parts = _columns(shown, lambda group: len(group.comparisons) + 1.4)
    height = max(sum(len(group.comparisons) + 1.4 for group in part) for part in parts)
    figure = Figure(figsize=(4.6 * max(len(parts), 1.6), max(0.165 * height + 1.1, 2.0)))
    values = [edge for group in shown for one in group.comparisons for edge in (one.low, one.high, one.ratio)]
    low, high = min(0.8, *values) / 1.1, max(1.5, *values) * 1.1
    for axis, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        ticks: dict[float, str] = {}
        at = 0.0
        for group in part:
            _head(axis, at, group)
            for one in group.comparisons:
                at += 1
                _bar(axis, at, one)
                ticks[at] = one.peer
            at += 1.4
        axis.set_yticks(list(ticks), list(ticks.values()))
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")
        axis.set_ylim(height - 0.6, -0.9)
        axis.axvspan(low, 1, color=VERMILION, alpha=0.06, linewidth=0)
        axis.axvline(1, color="black", linewidth=1)
        _logarithmic(axis, low, high)
        axis.set_xlabel("← vitrail slower        vitrail faster →")
    return figure


def _head(axis: Any, at: float, group: Group) -> None:
    box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}
    place = axis.get_yaxis_transform()
    axis.text(0.005, at, _heading(group), transform=place, va="center", weight="bold", bbox=box, zorder=3)


def _bar(axis: Any, at: float, one: Comparison) -> None:
    colour = VERMILION if one.slower else BLUE
    axis.barh(at, one.ratio - 1, left=1, height=0.72, color=colour)
    whiskers = [[max(one.ratio - one.low, 0)], [max(one.high - one.ratio, 0)]]
    axis.errorbar(one.ratio, at, xerr=whiskers, color="#333333", linewidth=0.8, capsize=1.5)
    text, weight = (f" {number(one.ratio)}× slower", "bold") if one.slower else (f" {number(one.ratio)}×", "normal")
    place = axis.get_yaxis_transform()
    axis.text(1, at, text, transform=place, va="center", color=VERMILION if one.slower else "black", weight=weight)


def roofline(rows: list[Row]) -> Figure | None:
    """A line for every case with a point for every implementation, at its share of the floor."""
    shown = [group for group in groups(rows) if any(row.roofline for row in group.rows)]
    if not shown:
        return None
    style = styles(rows)
    figure = Figure(figsize=(8.4, max(0.2 * len(shown) + 1.2, 2.2)))
    axis = figure.subplots()
    for at, group in enumerate(shown):
        # Ours last, so that nobody covers it.
        for row in sorted(group.rows, key=lambda row: is_ours(row.implementation)):
            if row.roofline:
                size = 7 if is_ours(row.implementation) else 4.5
                axis.plot(100 * row.roofline, at, **{**style[row.implementation], "linestyle": ""}, markersize=size)
    axis.set_yticks(range(len(shown)), [_heading(group) for group in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.axvline(100, color="black", linewidth=1)
    shares = [100 * row.roofline for group in shown for row in group.rows if row.roofline]
    _logarithmic(axis, min(50.0, *shares) / 1.2, max(120.0, *shares) * 1.2, " %")
    axis.set_xlabel("share of the floor (beyond 100 %: data stays in a cache)")
    _legend(figure, style, line=False)
    return figure


def batches(rows: list[Row]) -> Figure | None:
    """Peak memory and images per second against the batch, a row of axes for each model."""
    families = _families([row for row in rows if "batch" in row.shape])
    if not families:
        return None
    style = styles(rows)
    figure = Figure(figsize=(9.2, 2.7 * len(families) + 0.7))
    grid = figure.subplots(len(families), 2, squeeze=False)
    for (family, members), (memory, speed) in zip(families.items(), grid, strict=True):
        _curves(memory, members, style, "batch", lambda row: row.peak_bytes and row.peak_bytes / 2**30)
        _curves(speed, members, style, "batch", lambda row: row.extra.get("images_per_s"))
        sizes = sorted({_size(row, "batch") for row in members})
        # A limit that was set, and by which somebody failed.
        for limit in sorted({row.extra.get("limit_bytes", 0) for row in members if row.outcome != "ok"} - {0}):
            memory.axhline(limit / 2**30, color="#555555", linestyle=":", linewidth=1)
            memory.text(sizes[0], limit / 2**30, "limit", va="bottom", color="#555555")
        memory.set(title=family, xlabel="batch", ylabel="peak memory, GiB", ylim=(0, None))
        speed.set(title=family, xlabel="batch", ylabel="images/s", ylim=(0, None))
        for axis in (memory, speed):
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axis.xaxis.set_minor_locator(NullLocator())
            _failures(axis, members, style)
    _legend(figure, style, outcomes=sorted({row.outcome for row in rows} - {"ok"}))
    return figure


def costs(rows: list[Row]) -> Figure | None:
    """Time for an image against the number of patches at one mask ratio, and against the mask ratio at one size."""
    panels = []
    for family, members in _families([row for row in rows if {"visible", "masked"} <= row.shape.keys()]).items():
        for variable, fixed in (("patches", "mask ratio"), ("mask ratio", "patches")):
            chosen = _sweep(members, variable, fixed)
            if len({_size(row, variable) for row in chosen}) > 1:
                panels.append((family, variable, fixed, chosen))
    if not panels:
        return None
    style = styles(rows)
    figure = Figure(figsize=(1.2 + 4 * min(len(panels), 2), 2.7 * math.ceil(len(panels) / 2) + 0.9))
    axes = figure.subplots(math.ceil(len(panels) / 2), min(len(panels), 2), squeeze=False).flat
    for axis, (family, variable, fixed, chosen) in zip(axes, panels, strict=False):
        _curves(axis, chosen, style, variable, _milliseconds_per_image)
        axis.set_xticks(sorted({_size(row, variable) for row in chosen}))
        title = f"{family}, {fixed} {_size(chosen[0], fixed):g}"
        axis.set(title=title, xlabel=f"{variable} of an image", ylabel="ms for an image", ylim=(0, None))
        _failures(axis, chosen, style, variable)
    _legend(figure, style, outcomes=sorted({row.outcome for row in rows} - {"ok"}))
    return figure


def loaders(rows: list[Row]) -> Figure | None:
    """A bar for every loader; single operations are too fast to stand beside them."""
    whole = [group for group in groups(rows) if not group.first.case.endswith(" alone")]
    shown = [group for group in whole if any(_rate(row) for row in group.rows)]
    if not shown:
        return None
    figure = Figure(figsize=(7.6, 0.2 * sum(len(group.rows) + 1.4 for group in shown) + 1.1))
    axis = figure.subplots()
    ticks: dict[float, str] = {}
    at = 0.0
    for group in shown:
        _head(axis, at, group)
        for row in group.rows:
            if rate := _rate(row):
                at += 1
                ticks[at] = row.implementation
                axis.barh(at, rate, height=0.72, color="#999999" if row.implementation == "torchvision" else BLUE)
                if row.median_s and row.quantiles_s:
                    low, high = (rate * row.median_s / value for value in reversed(row.quantiles_s))
                    axis.errorbar(
                        rate, at, xerr=[[rate - low], [high - rate]], color="#333333", linewidth=0.8, capsize=1.5
                    )
                axis.text(1, at, f" {number(rate)}", transform=axis.get_yaxis_transform(), va="center")
        at += 1.4
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.set_ylim(at - 0.6, -0.9)
    axis.grid(visible=False, axis="y")
    axis.set(xlabel="images per second and core", xlim=(0, None))
    return figure


def _rate(row: Row) -> float | None:
    return row.extra.get("images_per_s_per_core")


def _columns(shown: Sequence[Group], size: Callable[[Group], float]) -> list[list[Group]]:
    """Groups in columns of about the same length, as few as keep to LINES."""
    total = sum(map(size, shown))
    count = math.ceil(total / LINES)
    parts: list[list[Group]] = [[] for _ in range(count)]
    passed = 0.0
    for group in shown:
        parts[min(int((passed + size(group) / 2) / total * count), count - 1)].append(group)
        passed += size(group)
    return [part for part in parts if part]


def _heading(group: Group) -> str:
    row = group.first
    direction = "" if row.direction in ("step", "pass") else f" · {row.direction}"
    return f"{row.op} · {row.case}{direction}"


def _logarithmic(axis: Any, low: float, high: float, unit: str = "×") -> None:
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [step * 10.0**power for power in range(-4, 7) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 3 and unit == "×":
        ticks = [tick for tick in (0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3) if low <= tick <= high]
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _size(row: Row, name: str) -> float:
    """A size of a row: one of its shape, the `patches` of an image, or the `mask ratio`."""
    if name in row.shape:
        return float(row.shape[name])
    visible, masked = (float(row.shape[part]) for part in ("visible", "masked"))
    return visible + masked if name == "patches" else round(masked / (visible + masked), 2)


def _milliseconds_per_image(row: Row) -> float | None:
    rate = row.extra.get("images_per_s")
    return 1e3 / rate if rate else None


def _families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by model, which is the first word of a case."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(re.split(r"[ ,]", row.case)[0], []).append(row)
    return found


def _sweep(rows: Sequence[Row], variable: str, fixed: str) -> list[Row]:
    """Rows at that value of `fixed` at which `variable` takes most values."""
    values: dict[float, set[float]] = {}
    for row in rows:
        values.setdefault(_size(row, fixed), set()).add(_size(row, variable))
    chosen = max(values, key=lambda value: (len(values[value]), value))
    return [row for row in rows if _size(row, fixed) == chosen]


def _curves(axis: Any, rows: list[Row], style: dict[str, Any], variable: str, y: Callable[[Row], Any]) -> None:
    for name in style:
        points = sorted((_size(row, variable), y(row)) for row in rows if row.implementation == name and y(row))
        if points:
            axis.plot(*zip(*points, strict=True), **style[name], linewidth=1.6, markersize=5)


def _failures(axis: Any, rows: list[Row], style: dict[str, Any], variable: str = "batch") -> None:
    """A cross at the top for every row without figures, those of one implementation at one height."""
    failed = [row for row in rows if row.outcome != "ok"]
    for index, name in enumerate(sorted({row.implementation for row in failed})):
        places = [_size(row, variable) for row in failed if row.implementation == name]
        heights = [0.97 - 0.07 * index] * len(places)
        look = {"marker": "x", "markersize": 8, "markeredgewidth": 2, "linestyle": "", "color": style[name]["color"]}
        axis.plot(places, heights, transform=axis.get_xaxis_transform(), clip_on=False, **look)


def _legend(figure: Figure, style: dict[str, Any], *, line: bool = True, outcomes: Sequence[str] = ()) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **(look if line else {**look, "linestyle": ""}), label=name) for name, look in style.items()
    ]
    cross: dict[str, Any] = {"marker": "x", "markersize": 7, "markeredgewidth": 2, "color": "#555555", "linestyle": ""}
    handles += [Line2D([], [], **cross, label=FAILED + why) for why in outcomes]
    figure.legend(handles=handles, loc="outside right upper")
