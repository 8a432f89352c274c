"""How many images fit: the batch doubles until memory runs out.

An implementation is one test, which publishes its largest batch; every batch has a row, the last one without figures.
"""

from typing import Any

import pytest
from bench import steps
from bench.environment import device
from bench.measure import Outcome
from bench.plugin import TAPE, Session, conclude

OP = "mae_batch"
IMPLEMENTATIONS = ("vitrail", "transformers")
CPU = device().type == "cpu"
# On a CPU a limit stands for the memory of a machine, and keeps the sweep short.
MODEL, FIRST, STEPS, LIMIT = ("small", 8, 2, 4 << 30) if CPU else ("huge", 64, 5, 0)


def case(batch: int, implementations: list[str]) -> steps.StepCase:
    return steps.StepCase(
        op=OP,
        name=f"{steps.MODELS[MODEL][0]} batch {batch}",
        model=MODEL,
        batch=batch,
        rounds=dict.fromkeys(implementations, 1),
        steps=STEPS,
        warmup=0 if CPU else 3,
        limit=LIMIT,
    )


def sweep(bench: Session) -> Outcome:
    """Double the batch for all that still have memory, until none has or the time is up.

    Returns:
        For each implementation the row and the samples of the largest batch, and why others have none.
    """
    largest = Outcome()
    batch, left = FIRST, list(IMPLEMENTATIONS)
    while left:
        outcome = steps.measure(case(batch, left), bench)
        bench.put(list(outcome.rows.values()))
        largest.absent |= outcome.absent
        largest.failed |= outcome.failed
        largest.samples |= outcome.samples
        # A batch without figures takes the place of none that has them, except at the first.
        largest.rows |= {name: row for name, row in outcome.rows.items() if row.outcome == "ok" or batch == FIRST}
        left = [] if bench.dry or bench.late else list(outcome.samples)
        batch *= 2
    return largest


def ended(bench: Session, implementation: str) -> bool:
    """Whether the rows of an implementation reach to where memory ran out."""
    rows = [row for row in bench.store.read(OP) if row.implementation == implementation and row.outcome != "ok"]
    return any(bench.store.has([row.key]) for row in rows)


@pytest.mark.benchmark(timer=TAPE.time)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mae_batch(benchmark: Any, bench: Session, implementation: str) -> None:
    benchmark.group = OP
    done = bench.resume and ended(bench, implementation)
    conclude(benchmark, bench, implementation, (OP,), lambda: sweep(bench), done=done)
