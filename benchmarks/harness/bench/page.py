"""The page of all figures: every row of every machine in a table."""

from collections.abc import Sequence

from .report import (
    GENERATED,
    PICTURES,
    SUITES,
    against,
    assembled,
    failure,
    images_per_second,
    over,
    peak,
    place,
    provenance,
    share,
    step_lines,
    suites,
    table,
    worst,
    wrapped,
)
from .results import Group, Machine, groups
from .rows import Row
from .table import number, seconds

INTRODUCTION = """\
Times are medians, with the quantiles 0.2 and 0.8 in brackets. Implementations of a case were timed in turns, so that a
machine that slows down slows all of them; a ratio is the median over the turns of the other's time over vitrail's,
above 1 where vitrail is faster. GB/s counts the fewest bytes that a call must read and write, whatever an
implementation moves. The floor is the larger of those bytes over the machine's copy bandwidth and the operations of the
matrix products over its matrix rate, both measured in the same run; data that stays in a cache can beat it. Peak memory
is what a call held beyond its inputs, or for a step what its process held. Every figure is one of a row in
`benchmarks/results/<machine>/<op>.json`, found by case, dtype, direction, cache and implementation."""
IDENTITY = ("case", "dtype", "direction", "cache", "implementation")
ENVIRONMENT = ("device", "driver", "threads", "settings", "python", "torch", "triton", "peers", "commit")


USUAL = "torchvision"  # what loaders are compared with


def page(machines: Sequence[Machine], charts: dict[str, list[str]]) -> str:
    """The page.

    Args:
        machines: With their rows.
        charts: By machine, the names of the charts that are drawn.
    """
    head = ["# Benchmarks", GENERATED, INTRODUCTION]
    return assembled(head, [_machine(machine, charts[machine.name]) for machine in machines], machines) + "\n"


def _machine(machine: Machine, charts: Sequence[str]) -> list[str]:
    facts = [[name, " or ".join(machine.known(name))] for name in ENVIRONMENT if machine.known(name)]
    parts = [f"## {machine.title}", wrapped(f"Rows {provenance(machine)}."), table(["environment", ""], facts)]
    if constants := [row for row in machine.rows if row.op == "roofline"]:
        parts += ["### What the machine can do", _constants(constants)]
    for suite in suites(machine.rows):
        found = groups(row for row in machine.rows if row.suite == suite)
        if not found:
            continue
        parts.append(f"### {SUITES.get(suite, suite).capitalize()}")
        parts += [_picture(machine, name) for name in charts if name in CHARTS_OF.get(suite, ())]
        for op in dict.fromkeys(group.first.op for group in found):
            parts += _op([group for group in found if group.first.op == op])
    return parts


CHARTS_OF = {
    "kernels": ("kernels", "kernels-roofline"),
    "engine": ("engine", "engine-roofline"),
    "steps": ("steps", "batch", "cost"),
    "data": ("loader",),
}


def _picture(machine: Machine, name: str) -> str:
    return f"![{name} on {machine.name}]({PICTURES}/{machine.name}/{name}.png)"


def _constants(rows: Sequence[Row]) -> str:
    lines = [[row.case, row.dtype, _time(row), _of(row.gb_per_s), _of(row.tflop_per_s)] for row in rows]
    return table(["what", "dtype", "time", "GB/s", "TFLOP/s"], lines)


def _op(found: Sequence[Group]) -> list[str]:
    """Heading, table, the worst ratio and who was absent."""
    rows = [row for group in found for row in group.rows]
    if found[0].first.suite == "steps":
        body = table(*_step_lines(rows))
    elif found[0].first.suite == "data":
        body = _loaders(found)
    else:
        body = _kernels(found)
    parts = [f"#### {found[0].first.op}", body]
    if (lowest := worst(found)) is not None:
        parts.append(f"Lowest ratio: {lowest.words(spread=True)}; {place(lowest.row)}.")
    absent = {name: why for row in rows for name, why in row.absent.items()}
    if absent:
        parts.append("\n".join(f"* Absent: {name}: {why}" for name, why in sorted(absent.items())))
    return parts


def _step_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    header, lines = step_lines(rows)
    at = header.index("images/s")
    ordered = [row for group in groups(rows) for row in group.rows]
    timed = [
        [*line[:at], _time(row), share(row.roofline), *line[at:]] for line, row in zip(lines, ordered, strict=True)
    ]
    return [*header[:at], "time", "of the floor", *header[at:]], timed


def _kernels(found: Sequence[Group]) -> str:
    header = [*IDENTITY, "time", "GB/s", "TFLOP/s", "of the floor", "bound", "peak memory", "vitrail over it"]
    lines = []
    for group in found:
        for row in group.rows:
            rates = [_of(row.gb_per_s), _of(row.tflop_per_s), share(row.roofline), row.bound or ""]
            lines.append([*_identity(row), _time(row), *rates, peak(row), against(group, row)])
    return table(header, lines)


def _loaders(found: Sequence[Group]) -> str:
    header = [*IDENTITY, "time", "images/s", "per core", f"over {USUAL}"]
    lines = []
    for group in found:
        for row in group.rows:
            rates = [images_per_second(row), _of(row.extra.get("images_per_s_per_core"))]
            lines.append([*_identity(row), _time(row), *rates, over(row, USUAL)])
    return table(header, lines)


def _identity(row: Row) -> list[str]:
    return [str(getattr(row, name)) for name in IDENTITY]


def _time(row: Row) -> str:
    if row.median_s is None:
        return failure(row) or row.outcome
    if row.quantiles_s is None:
        return seconds(row.median_s)
    return f"{seconds(row.median_s)} ({seconds(row.quantiles_s[0])}–{seconds(row.quantiles_s[1])})"


def _of(value: float | None) -> str:
    return "" if value is None else number(value)
