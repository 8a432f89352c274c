"""All rows as readers of figures see them: by machine, in groups that can be compared, and traced to their code."""

import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import ROOT
from .rows import Row, Store
from .table import number

OURS = "vitrail"  # and its variants, such as `vitrail compiled`


@dataclass(frozen=True)
class Comparison:
    """One implementation of ours against one of somebody else."""

    row: Row
    """Ours."""
    peer: str
    ratio: float
    """Its time over ours: below 1 where we are slower."""
    low: float
    high: float
    """Quantiles 0.2 and 0.8."""

    @property
    def slower(self) -> bool:
        """Whether we are, as far as three digits tell."""
        return float(f"{self.ratio:.3g}") < 1

    def words(self, *, spread: bool = False) -> str:
        """`1.52× transformers`, or `slower than transformers: 0.80×`."""
        times = f"{number(self.ratio)}×"
        text = f"slower than {self.peer}: {times}" if self.slower else f"{times} {self.peer}"
        return f"{text} ({number(self.low)}–{number(self.high)})" if spread else text


@dataclass(frozen=True)
class Group:
    """Rows that differ in nothing but the implementation."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """Any of them, for what they have in common."""
        return self.rows[0]

    @property
    def ours(self) -> list[Row]:
        """Those of vitrail and its variants, vitrail itself first."""
        return sorted((row for row in self.rows if is_ours(row.implementation)), key=lambda row: row.implementation)

    @property
    def comparisons(self) -> list[Comparison]:
        """Of vitrail with everybody else, best first."""
        found = [compare(row, peer) for row in self.ours[:1] for peer in row.speed_over if not is_ours(peer)]
        return sorted((one for one in found if one is not None), key=lambda one: -one.ratio)


@dataclass(frozen=True)
class Machine:
    """What was measured on one machine."""

    name: str
    """Its folder: `cpu`, or that of a GPU."""
    rows: tuple[Row, ...]

    @property
    def gpu(self) -> bool:
        """Whether it has one."""
        return self.name != "cpu"

    def known(self, name: str) -> list[str]:
        """The values that an entry of the rows' environments takes."""
        return sorted({_text(row.environment[name]) for row in self.rows if row.environment.get(name)})

    @property
    def title(self) -> str:
        """Name, device, versions."""
        threads = "" if self.gpu else f", {' or '.join(self.known('threads'))} threads"
        return f"{self.name}: {' or '.join(self.known('device'))}{threads}, torch {' or '.join(self.known('torch'))}"

    @property
    def dates(self) -> str:
        """The days of the first and the last row."""
        days = sorted({row.date[:10] for row in self.rows})
        return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"

    @property
    def absent(self) -> dict[str, str]:
        """Who could not run in any case, with the reason."""
        reasons = {name: why for row in self.rows for name, why in row.absent.items()}
        present = {row.implementation for row in self.rows}
        return {name: reasons[name] for name in sorted(reasons) if name not in present}


def _text(value: Any) -> str:
    """An entry of an environment: `2.15`, or of a dictionary `timm 1.0, transformers 5.23`."""
    return ", ".join(f"{name} {of}" for name, of in value.items()) if isinstance(value, dict) else str(value)


def is_ours(implementation: str) -> bool:
    """Whether an implementation is vitrail's."""
    return implementation.split(" ")[0] == OURS


def compare(row: Row, other: str) -> Comparison | None:
    """A row against another implementation, None where they were not timed together."""
    return Comparison(row, other, *row.speed_over[other]) if other in row.speed_over else None


def read_machines(folder: Path) -> list[Machine]:
    """The machines with rows, GPUs first.

    Raises:
        ValueError: A file is not one of rows.
    """
    folders = sorted({path.parent for path in folder.glob("*/*.json")})
    machines = [Machine(path.name, tuple(Store(path).read_all())) for path in folders]
    return sorted((one for one in machines if one.rows), key=lambda one: (not one.gpu, one.name))


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows that can be compared, together, in the order in which they come; the roofline's constants left out."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.op != "roofline":
            found.setdefault((row.suite, row.op, row.case, row.dtype, row.direction, row.cache), []).append(row)
    return [Group(tuple(members)) for members in found.values()]


def headline(rows: Sequence[Row]) -> list[Row]:
    """Without the rows of a hot cache where there are those of a cold one: training finds its data cold."""
    cold = {(row.op, row.case, row.dtype, row.direction) for row in rows if row.cache == "cold"}
    return [row for row in rows if row.cache == "cold" or (row.op, row.case, row.dtype, row.direction) not in cold]


def no_history() -> str | None:
    """Why rows cannot be traced to commits here, None if they can."""
    asked = subprocess.run(
        ["git", "rev-parse", "--show-toplevel", "--is-shallow-repository"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        return f"no git history: {asked.stderr.strip()}"
    folder, shallow = asked.stdout.split("\n")[:2]
    if Path(folder).resolve() != ROOT:
        return f"no git history: {ROOT} only lies within another repository"
    return "a shallow clone: git fetch --unshallow brings the rest" if shallow == "true" else None


def in_history(commit: str) -> bool:
    """Whether a full hash is that of a commit which everybody who has this branch has too."""
    if re.fullmatch(r"[0-9a-f]{40}", commit) is None:
        return False
    asked = subprocess.run(
        ["git", "merge-base", "--is-ancestor", commit, "HEAD"], cwd=ROOT, capture_output=True, check=False
    )
    return asked.returncode == 0


def untraceable(
    machines: Iterable[Machine], known: Callable[[str], bool], digest_of: Callable[[str], str | None]
) -> list[str]:
    """Rows that do not lead to the code they were measured on.

    Args:
        machines: Their rows.
        known: Whether the history holds a commit.
        digest_of: The fingerprint of a commit's sources.

    Returns:
        Messages that name the rows, what is wrong and what to do; rows of a file with the same fault share one.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for machine in machines:
        for row in machine.rows:
            if fault := _fault(row, known, digest_of):
                found.setdefault((f"{machine.name}/{row.op}.json", fault), []).append(", ".join(row.key[1:]))
        for group in groups(machine.rows):
            if fault := _mixed(group):
                found.setdefault((f"{machine.name}/{group.first.op}.json", fault), []).append(group.first.case)
    return [f"{file}: {'; '.join(rows)}: {fault}" for (file, fault), rows in found.items()]


def _fault(row: Row, known: Callable[[str], bool], digest_of: Callable[[str], str | None]) -> str:
    """Why a row does not lead to its code, empty if it does."""
    commit, code = str(row.environment.get("commit")), row.environment.get("code")
    if not known(commit):
        return f"commit {commit} is not in this history: measure again on committed code"
    if (expected := digest_of(commit)) != code:
        return f"measured on sources {code}, but commit {commit[:10]} has {expected}: measure again on committed code"
    return ""


def _mixed(group: Group) -> str:
    """What is wrong with a group whose rows are from different code or places, empty if nothing is."""

    def origin(row: Row) -> tuple[Any, ...]:
        return tuple(row.environment.get(name) for name in ("code", "device", "torch", "threads"))

    reference = origin((group.ours or group.rows)[0])
    others = [row.implementation for row in group.rows if origin(row) != reference]
    if not others:
        return ""
    return (
        f"{', '.join(others)} measured on other code or versions than the rest: measure the case again or delete them"
    )
