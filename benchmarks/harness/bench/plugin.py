"""The harness in pytest: a test for each row, the table at the end, and the options.

pytest-benchmark wants to time one function after the other. Implementations of a case are timed here in turns instead,
and each test then plays its samples back through a clock that pytest-benchmark reads: its tables, its JSON and its
comparison of runs all work, on samples that were taken fairly.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from . import environment, peers, roofline
from .case import Case, Sizes, dtype_name
from .measure import Outcome, caches, measure, prepare
from .rows import Key, Row, Store
from .table import show

BATCH = {"cuda": 256, "cpu": 16}
DRY_BATCH = 2
LATE = "the time is up: run again to go on"


class Tape:
    """A clock that advances by recorded durations."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pending: list[float] = []

    def time(self) -> float:
        """The tape's time in seconds."""
        return self.now

    def advance(self) -> None:
        """Let the next recorded duration pass."""
        self.now += self.pending.pop(0)


TAPE = Tape()


@dataclass
class Session:
    """What the tests of one run share."""

    device: torch.device
    dry: bool
    resume: bool
    deadline: float | None
    store: Store
    written: dict[Key, Row] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    outcomes: dict[tuple[Any, ...], Outcome] = field(default_factory=dict)

    @property
    def late(self) -> bool:
        """Whether the time that was given is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def has(self, key: Key) -> bool:
        """Whether this run goes on with an earlier one that wrote the row."""
        return self.resume and self.store.has([key])

    def put(self, rows: Sequence[Row]) -> None:
        """Write rows, the first that are held to the machine's limits together with these limits."""
        if any(row.floor_s is not None for row in rows) and all(key[0] != "roofline" for key in self.written):
            rows = [*roofline.measured(self.device)[1], *rows]
        self.store.put(rows)
        self.written.update((row.key, row) for row in rows)
        for row in rows:
            self.absent.update(row.absent)


def conclude(
    benchmark: Any,
    bench: Session,
    implementation: str,
    cell: tuple[Any, ...],
    measure: Callable[[], Outcome],
    *,
    done: bool,
) -> None:
    """Be the test of one row: measure where nobody has, and end as the outcome says.

    Args:
        benchmark: pytest-benchmark's fixture.
        bench: What the tests share.
        implementation: Whose row.
        cell: What is measured together, the same for all implementations; its rows are written at once.
        measure: Measures it; in a dry run only builds and checks.
        done: Whether its rows are there already.
    """
    if (reason := peers.absent(implementation, bench.device)) is not None:
        bench.absent[implementation] = reason
        pytest.skip(reason)
    if done:
        pytest.skip("has its row")
    if cell not in bench.outcomes:
        if bench.late:
            pytest.skip(LATE)
        try:
            bench.outcomes[cell] = measure()
        except Exception as error:  # the next implementation's test shall not try all of it again
            bench.outcomes[cell] = Outcome(crashed=f"{type(error).__name__}: {error}".partition("\n")[0])
            raise
        bench.put(list(bench.outcomes[cell].rows.values()))
    outcome = bench.outcomes[cell]
    if outcome.crashed:
        pytest.fail(f"no row: the measurement of this case ended with {outcome.crashed}", pytrace=False)
    if implementation in outcome.absent:
        bench.absent[implementation] = outcome.absent[implementation]
        pytest.skip(outcome.absent[implementation])
    if implementation in outcome.failed:
        pytest.fail(f"no row: {outcome.failed[implementation]}", pytrace=False)
    if bench.dry:
        benchmark.disabled = True
        benchmark.pedantic(lambda: None)  # or it warns that it was not used
        return
    row = outcome.rows[implementation]
    if row.outcome != "ok":
        pytest.skip(f"{row.outcome}: the row says so")
    publish(benchmark, outcome.samples[implementation], row)


def measures(cases: Callable[[Sizes], Sequence[Case]]) -> Callable[..., None]:
    """Make the test of a benchmark file, which calls it `test_<op>`.

    Args:
        cases: Returns the cases for a machine's sizes.
    """

    @pytest.mark.benchmark(timer=TAPE.time)
    def test(benchmark: Any, bench: Session, case: Case, direction: str, cache: str, implementation: str) -> None:
        benchmark.group = f"{case.op} {case.name} {direction} {cache}"
        key = (case.op, case.name, implementation, dtype_name(case.dtype), direction, cache)

        def run() -> Outcome:
            if bench.dry:
                return prepare(case, direction, bench.device)[0]
            return measure(case, direction, cache, test.suite, bench.device)

        cell = (case.op, case.name, direction, cache)
        conclude(benchmark, bench, implementation, cell, run, done=bench.has(key))

    test.cases = cases
    return test


def publish(benchmark: Any, samples: Sequence[float], row: Row) -> None:
    """Hand samples that were taken elsewhere to pytest-benchmark, with the row beside them."""
    TAPE.pending = list(samples)
    benchmark.extra_info.update(row.to_json())
    benchmark.pedantic(TAPE.advance, rounds=len(samples))


def generate(metafunc: pytest.Metafunc, *, dry: bool) -> None:
    """One test for each case, direction, state of the cache and implementation."""
    cases = getattr(metafunc.function, "cases", None)
    if cases is None:
        return
    metafunc.function.suite = metafunc.definition.path.parent.name
    device = environment.device()
    tests = [
        pytest.param(case, direction, cache, name, id=f"{case.name}-{direction}-{cache}-{name}")
        for case in cases(Sizes(batch=DRY_BATCH if dry else BATCH[device.type], dry=dry))
        for direction in case.directions
        for cache in caches(device)
        for name in case.implementations
    ]
    metafunc.parametrize(("case", "direction", "cache", "implementation"), tests)


def open_session(config: pytest.Config) -> Session:
    """The shared state, from the options."""
    limit = config.getoption("--seconds")
    folder = config.getoption("--rows")
    return Session(
        device=environment.device(),
        dry=config.getoption("--dry"),
        resume=config.getoption("--resume"),
        deadline=None if limit is None else time.monotonic() + limit,
        store=Store(folder),
    )


def add_options(parser: pytest.Parser) -> None:
    """The options of `pytest benchmarks`."""
    from pathlib import Path

    group = parser.getgroup("vitrail benchmarks")
    group.addoption("--dry", action="store_true", help="build every case small and check it; time and write nothing")
    group.addoption("--resume", action="store_true", help="pass over what has a row for this machine and this code")
    group.addoption("--seconds", type=float, default=None, help="start no further case after so long")
    group.addoption("--rows", type=Path, default=None, help="folder of the rows; benchmarks/results/<machine>")


def summary(session: Session) -> str:
    """The table of what was measured, and why who was not."""
    return show(list(session.written.values()), session.absent)
