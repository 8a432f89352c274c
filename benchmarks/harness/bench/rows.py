"""Rows: one measured implementation of one case, as it is written to `benchmarks/results/<machine>/<op>.json`."""

import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .environment import ROOT, describe, machine

RESULTS = ROOT / "benchmarks" / "results"
Key = tuple[str, ...]


def today() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A result. Absent figures are None and are not written."""

    suite: str
    """`kernels`, `engine`, `steps` or `data`: the folder of the benchmark."""
    op: str
    """What was measured; also the name of the file."""
    case: str
    """Which sizes, in words."""
    implementation: str
    """Whose."""
    shape: dict[str, int | float | str]
    """The sizes in numbers."""
    dtype: str
    """Of the arithmetic or of the data that counts."""
    direction: str
    """`forward`, `forward+backward`, `step` or `pass`."""
    cache: str
    """`cold`: inputs rotate through more than the L2 cache holds; `hot`: the same inputs again and again."""
    timer: str = ""
    """`wall`, `events`, `graph` (CUDA graph) or `backlog` (the device is kept busy while the host enqueues)."""
    samples: int = 0
    """Number of timings, each of which may be the mean of several calls."""
    median_s: float | None = None
    """Seconds for a call, a step or an image: the median of the samples."""
    quantiles_s: list[float] | None = None
    """Quantiles 0.2 and 0.8."""
    peak_bytes: int | None = None
    """Most memory that a call held beyond its inputs; for a step, that the process held."""
    bytes: int | None = None
    """Fewest bytes that the call must read and write."""
    flops: float | None = None
    """Operations of its matrix products."""
    gb_per_s: float | None = None
    """Those bytes over the median."""
    tflop_per_s: float | None = None
    """Those operations over the median."""
    floor_s: float | None = None
    """The larger of bytes over copy bandwidth and operations over matrix rate, both measured on this machine."""
    bound: str | None = None
    """Which of the two: `memory` or `matrix`."""
    roofline: float | None = None
    """floor_s over the median; above 1 where data stays in a cache."""
    speed_over: dict[str, list[float]] = field(default_factory=dict)
    """For each other implementation: its time over this one's, as median and quantiles 0.2, 0.8 of paired samples."""
    absent: dict[str, str] = field(default_factory=dict)
    """Implementations that could not run here, with the reason."""
    outcome: str = "ok"
    """`ok`, or why there are no figures (`out of memory`)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further figures of steps and loaders, by name and unit."""
    environment: dict[str, Any] = field(default_factory=describe)
    """Machine, versions, commit."""
    date: str = field(default_factory=today)
    """When, in UTC."""

    @property
    def key(self) -> Key:
        """What identifies a row among those of its machine."""
        return (self.op, self.case, self.implementation, self.dtype, self.direction, self.cache)

    def to_json(self) -> dict[str, Any]:
        """A dictionary without absent figures."""
        needed = {f.name for f in fields(self) if f.default is MISSING and f.default_factory is MISSING}
        return {name: value for name, value in asdict(self).items() if name in needed or value not in (None, {}, "")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Row":
        """Read what `to_json` wrote.

        Raises:
            ValueError: A field is missing or unknown.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown fields {unknown} in a row; it was written by another version: measure again")
        try:
            # The environment of a row that lacks one must not become this machine's.
            return cls(**{"environment": {}, "date": "", **values})
        except TypeError as error:
            raise ValueError(f"incomplete row: {error}") from None


def quantiles(samples: Sequence[float]) -> tuple[float, list[float]]:
    """The median, and the quantiles 0.2 and 0.8."""
    if len(samples) == 1:
        return samples[0], [samples[0], samples[0]]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), [fifths[0], fifths[-1]]


def ratios(samples: Mapping[str, Sequence[float]]) -> dict[str, dict[str, list[float]]]:
    """How much faster each implementation is than every other.

    Args:
        samples: Timings by implementation, taken in turns: those of one round stand at the same place.

    Returns:
        For each implementation and each other one: the other's time over its own, as the median of the ratios within
        rounds and their quantiles 0.2 and 0.8. A machine that slows down slows both sides of such a ratio.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in samples}
    for name, own in samples.items():
        for other, theirs in samples.items():
            if other != name:
                middle, (low, high) = quantiles([b / a for a, b in zip(own, theirs, strict=True)])
                found[name][other] = [middle, low, high]
    return found


class Store:
    """The rows of one machine, a file for each op.

    Args:
        folder: Where the files are; that of this machine by default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or RESULTS / machine()

    def read(self, op: str) -> list[Row]:
        """The rows of an op, none where there is no file.

        Raises:
            ValueError: The file holds something else; the message names it.
        """
        path = self.folder / f"{op}.json"
        if not path.exists():
            return []
        try:
            return [Row.from_json(values) for values in json.loads(path.read_text())]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def read_all(self) -> list[Row]:
        """The rows of every op, sorted by file."""
        return [row for path in sorted(self.folder.glob("*.json")) for row in self.read(path.stem)]

    def has(self, keys: Iterable[Key]) -> bool:
        """Whether every key has a row that was measured here, on this code, with these versions."""
        wanted = set(keys)
        now = describe()
        same = ("device", "torch", "triton", "code", "threads")
        found = {
            row.key
            for op in {key[0] for key in wanted}
            for row in self.read(op)
            if all(row.environment.get(name) == now.get(name) for name in same)
        }
        return wanted <= found

    def put(self, rows: Sequence[Row]) -> None:
        """Write rows, in place of those with the same key; a file is complete at any moment."""
        for op in sorted({row.op for row in rows}):
            new = {row.key: row for row in rows if row.op == op}
            kept = {row.key: row for row in self.read(op)}
            merged = list({**kept, **new}.values())
            text = ",\n".join(json.dumps(row.to_json()) for row in merged)
            self._write(self.folder / f"{op}.json", f"[\n{text}\n]\n")

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
