"""Rows as Markdown: the README's section, and what it shares with the page of all figures."""

import textwrap
from collections.abc import Iterable, Sequence

from .results import Comparison, Group, Machine, compare, groups, headline
from .rows import Row
from .table import bytes_, number, seconds

PICTURES = "images/benchmarks"  # under docs/
PAGE = "docs/benchmarks.md"
STEPS = {"mae_step": "MAE", "moco_v3_step": "MoCo v3", "simclr_step": "SimCLR"}
SUITES = {"kernels": "ops", "engine": "parts of the engine", "steps": "whole training steps", "data": "loaders"}
GENERATED = "<!-- Written from benchmarks/results by `make figures`: do not edit. -->"
NOTHING = (
    "Nothing has been measured on this code yet. `make bench` writes rows to `benchmarks/results/<machine>`, and\n"
    "`make figures` writes what they say."
)
NO_GPU = (
    "No figure of a GPU is given, because none has been measured yet: `make bench-gpu` writes the rows of one, and\n"
    "`make figures` adds them."
)


def section(machines: Sequence[Machine], charts: dict[str, list[str]]) -> str:
    """The README's section.

    Args:
        machines: With their rows.
        charts: By machine, the names of the charts that are drawn.
    """
    return assembled([GENERATED], [_machine(machine, charts[machine.name]) for machine in machines], machines)


def assembled(head: Sequence[str], bodies: Iterable[Sequence[str]], machines: Sequence[Machine]) -> str:
    """A text of paragraphs: what comes first, what is said of each machine, and what has not been measured."""
    parts = [*head, *(part for body in bodies for part in body)]
    if not machines:
        parts.append(NOTHING)
    if not any(machine.gpu for machine in machines):
        parts.append(NO_GPU)
    return "\n\n".join(parts)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def wrapped(text: str) -> str:
    """A paragraph in lines of the usual length."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def folded(header: Sequence[str], rows: Sequence[Sequence[str]], foldable: Sequence[str]) -> tuple[str, str]:
    """A table without those columns of `foldable` in which all rows agree.

    Returns:
        What they agree in, in words, and the table.
    """
    same = [at for at, name in enumerate(header) if name in foldable and len({row[at] for row in rows}) == 1]
    kept = [at for at in range(len(header)) if at not in same]
    words = ", ".join(f"{header[at]} {rows[0][at]}" for at in same)
    return words, table([header[at] for at in kept], [[row[at] for at in kept] for row in rows])


def provenance(machine: Machine) -> str:
    """When, at which commits, and with which command the rows were made."""
    commits = ", ".join(f"`{commit[:10]}`" for commit in machine.known("commit"))
    return f"measured {machine.dates} at {commits} with `make {'bench-gpu' if machine.gpu else 'bench'}`"


def suites(rows: Iterable[Row]) -> list[str]:
    """Those that rows are from, in the order of SUITES, unknown ones last."""
    found = {row.suite for row in rows}
    return [name for name in SUITES if name in found] + sorted(found - SUITES.keys())


def step_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and a line for each implementation of whole steps."""
    ours = sorted({row.implementation for group in groups(rows) for row in group.ours})
    ratios = [f"{name} over it" for name in ours]
    header = ["case", "dtype", "direction", "cache", "implementation", "images/s", *ratios, "peak memory", "first step"]
    utilised = any("mfu" in row.extra for row in rows)
    lines = []
    for group in groups(rows):
        by_name = {row.implementation: row for row in group.ours}
        for row in group.rows:
            first = row.extra.get("first_step_s")
            line = [row.case, row.dtype, row.direction, row.cache, row.implementation, images_per_second(row)]
            line += [over(by_name.get(name), row.implementation) for name in ours]
            line += [peak(row), "" if first is None else seconds(first)]
            lines.append([*line, share(row.extra.get("mfu"))] if utilised else line)
    return [*header, "MFU"] if utilised else header, lines


def images_per_second(row: Row) -> str:
    """The rate of a step or a loader, or why there is none."""
    rate = row.extra.get("images_per_s")
    return number(rate) if rate is not None else failure(row)


def failure(row: Row) -> str:
    """Why a row has no figures, empty if it has."""
    limit = row.extra.get("limit_bytes")
    return "" if row.outcome == "ok" else f"{row.outcome} (limit {bytes_(limit)})" if limit else row.outcome


def peak(row: Row) -> str:
    """The peak memory, empty where it is not known."""
    return "" if row.peak_bytes is None else bytes_(row.peak_bytes)


def share(value: float | None) -> str:
    """A fraction in percent."""
    return "" if value is None else f"{number(100 * value)} %"


def over(row: Row | None, other: str) -> str:
    """A row over another implementation, with the spread; empty where they were not timed together."""
    one = None if row is None else compare(row, other)
    if one is None:
        return ""
    text = f"{number(one.ratio)}× ({number(one.low)}–{number(one.high)})"
    return f"slower than {other}: {text}" if one.slower else text


def against(group: Group, row: Row) -> str:
    """Vitrail's row of a group over another one."""
    return over(group.ours[0] if group.ours else None, row.implementation)


def worst(found: Sequence[Group]) -> Comparison | None:
    """The comparison in which vitrail looks worst."""
    return min((one for group in found for one in group.comparisons), key=lambda one: one.ratio, default=None)


def place(row: Row) -> str:
    """Which case, in words."""
    return ", ".join((row.case, row.dtype, row.direction, row.cache))


def _machine(machine: Machine, charts: Sequence[str]) -> list[str]:
    rows = [row for row in machine.rows if row.op != "roofline"]
    parts = [
        f"### {machine.title}",
        wrapped(f"[Rows](benchmarks/results/{machine.name}), {provenance(machine)}. All figures: [{PAGE}]({PAGE})."),
    ]
    explained = (
        " A ratio is the time of the implementation over ours, as the median over turns and its quantiles 0.2 and 0.8."
    )
    for op, method in STEPS.items():
        if steps := [row for row in rows if row.op == op]:
            common, lines = folded(*step_lines(steps), ("dtype", "direction", "cache"))
            sizes = ", ".join(filter(None, [_sizes(steps), common]))
            parts += [wrapped(f"A whole {method} training step ({sizes}).{explained}"), lines]
            explained = ""
    parts += [_picture(machine, name) for name in ("batch",) if name in charts]
    if ops := groups(headline([row for row in rows if row.suite in ("kernels", "engine") and row.median_s])):
        parts += _ops(ops)
        parts += [_picture(machine, name) for name in ("kernels",) if name in charts]
    parts.append(_missing(machine))
    return parts


def _sizes(rows: Sequence[Row]) -> str:
    """What all rows' shapes have in common."""
    common = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in rows[0].shape.items()
        if all(row.shape.get(name) == value for row in rows)
    ]
    return ", ".join(common)


def _ops(found: Sequence[Group]) -> list[str]:
    lines = []
    for group in [one for one in found if one.first.suite == "kernels"]:
        row, others = group.first, group.comparisons
        words = ", ".join(f"**{one.words()}**" if one.slower else one.words() for one in others)
        lines.append([f"`{row.op}`", row.case, row.dtype, row.direction, row.cache, words or "no peer measured"])
    by_op = {group.first.op: [one for one in found if one.first.op == group.first.op] for group in found}
    lowest = [(op, one) for op, members in by_op.items() if (one := worst(members)) is not None]
    count = sum(len(group.comparisons) for group in found)
    slower = sum(one.slower for group in found for one in group.comparisons)
    header = ["op", "case", "dtype", "direction", "cache", "vitrail's speed over others"]
    parts = []
    if lines:
        common, ops = folded(header, lines, ("dtype", "cache"))
        said = f" ({common})" if common else ""
        parts = [wrapped(f"Each op, as the time of the other implementation over vitrail's{said}, by medians."), ops]
    return [
        *parts,
        wrapped(
            "The lowest ratio of each op, and of each part of a step as the engine calls it (its LayerNorm and AdamW "
            "are PyTorch's), with its quantiles 0.2 and 0.8. "
            f"Vitrail is slower in {slower} of {count} comparisons."
        ),
        table(
            ["op", "lowest ratio", "where"], [[f"`{op}`", one.words(spread=True), place(one.row)] for op, one in lowest]
        ),
    ]


def _picture(machine: Machine, name: str) -> str:
    return f"![{name} on {machine.name}](docs/{PICTURES}/{machine.name}/{name}.png)"


def _missing(machine: Machine) -> str:
    """What of this machine has not been measured."""
    present = suites(machine.rows)
    left = [f"{words} (`pytest benchmarks/{suite}`)" for suite, words in SUITES.items() if suite not in present]
    by_reason: dict[str, list[str]] = {}
    for name, reason in machine.absent.items():
        by_reason.setdefault(reason, []).append(name)
    absent = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    lines = [f"Not measured here: {', '.join(left)}."] if left else []
    lines += [f"Absent: {'; '.join(absent)}."] if absent else []
    return "\n".join(map(wrapped, lines)) or "Every suite was measured here, with every peer."
