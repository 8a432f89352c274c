"""A short table of rows for a terminal or a log, and how numbers are written anywhere."""

import math
from collections.abc import Mapping, Sequence

from .rows import Row


def number(value: float) -> str:
    """Three significant digits, more before the point where there are more, and never an exponent."""
    rounded = float(f"{value:.3g}")
    if not math.isfinite(rounded) or rounded == 0:
        return f"{rounded:.0f}"
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{decimals}f}"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{number(value * factor)} {unit}"
    return f"{number(value * 1e9)} ns"


def bytes_(value: float) -> str:
    """A number of bytes in the unit that suits it."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{value:.0f} B"


def show(rows: Sequence[Row], absent: Mapping[str, str]) -> str:
    """Lines of text: a row for each measurement, then who was absent and why."""
    lines = []
    header = (
        "op",
        "case",
        "direction",
        "cache",
        "implementation",
        "time",
        "GB/s",
        "TFLOP/s",
        "floor",
        "peak",
        "ratios",
    )
    cells = [header, *map(_cells, rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]
    for row in cells:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    lines += [f"absent: {name}: {reason}" for name, reason in sorted(absent.items())]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.op,
        row.case,
        row.direction,
        row.cache,
        row.implementation,
        row.outcome if row.median_s is None else seconds(row.median_s),
        "" if row.gb_per_s is None else number(row.gb_per_s),
        "" if row.tflop_per_s is None else number(row.tflop_per_s),
        "" if row.roofline is None else f"{100 * row.roofline:.0f} %",
        "" if row.peak_bytes is None else bytes_(row.peak_bytes),
        "  ".join(f"{ratio[0]:.2f}x {name}" for name, ratio in row.speed_over.items()),
    )
