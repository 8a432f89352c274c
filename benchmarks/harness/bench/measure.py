"""From a case to rows: build, check against float64, time in turns, compare."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from . import peers, roofline
from .case import Case, Factory, Function, Inputs, bind, clone, convert, dtype_name, tensors
from .clock import Timings, time_in_turns
from .memory import peak_of
from .rows import Row, quantiles, ratios

SEED = 0
MOST_SETS = 1024  # of inputs for a cold cache; only noise for a few images is so small that these do not exceed it
SECONDS = {"cpu": 1.0, "cuda": 0.3}  # for each implementation of a case


@dataclass
class Outcome:
    """What became of one direction of a case."""

    rows: dict[str, Row] = field(default_factory=dict)
    """By implementation."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Timings by implementation, seconds for a call."""
    failed: dict[str, str] = field(default_factory=dict)
    """Implementations that miscompute or crash, with what was wrong. They have no rows."""
    absent: dict[str, str] = field(default_factory=dict)
    """Implementations that cannot run here, with the reason."""
    crashed: str = ""
    """What ended the measurement of all of them, if anything did."""


def caches(device: torch.device) -> tuple[str, ...]:
    """The states of the cache that are measured: both on a GPU, `hot` on a CPU."""
    return ("cold", "hot") if device.type == "cuda" else ("hot",)


def measure(case: Case, direction: str, cache: str, suite: str, device: torch.device) -> Outcome:
    """Measure one direction of a case in one state of the cache, all implementations in turns."""
    outcome, functions = prepare(case, direction, device)
    if not functions:
        return outcome
    sets = input_sets(case, device, cache)
    calls = {name: [bind(case, direction, function, inputs) for inputs in sets] for name, function in functions.items()}
    timings = time_in_turns(calls, device, seconds=SECONDS[device.type])
    peak = {name: peak_of(variants[0], device) for name, variants in calls.items()}
    compared = ratios({name: timing.samples for name, timing in timings.items()})
    limits, _ = roofline.measured(device)
    for name, timing in timings.items():
        outcome.samples[name] = timing.samples
        outcome.rows[name] = _row(
            case, direction, cache, suite, name, timing, limits, peak[name], compared[name], outcome.absent
        )
    return outcome


def prepare(case: Case, direction: str, device: torch.device) -> tuple[Outcome, dict[str, Function]]:
    """Build the implementations that can run here and check each against float64.

    Returns:
        An outcome that holds who is absent and who failed, and the functions of the others.
    """
    outcome = Outcome()
    functions: dict[str, Function] = {}
    inputs = seeded(partial(case.inputs, device))
    expected = case.compared(_run(case, direction, case.truth, convert(inputs, torch.float64)))
    for name, factory in case.implementations.items():
        reason = peers.absent(name, device)
        if reason is not None:
            outcome.absent[name] = reason
            continue
        try:
            function = _built(factory)
            wrong = difference(case.compared(_run(case, direction, function, inputs)), expected, case.allowed)
        except NotImplementedError as error:  # a peer's own word that it cannot do this
            if name == "vitrail":
                raise
            outcome.absent[name] = str(error).partition("\n")[0]
            continue
        except Exception as error:  # a peer may raise anything; the others are still measured
            wrong = f"{type(error).__name__}: {error}".partition("\n")[0]
        if wrong is None:
            functions[name] = function
        else:
            outcome.failed[name] = wrong
    return outcome, functions


@functools.cache
def _built(factory: Factory) -> Function:
    """What a factory builds, once for all directions: compiling takes longer than measuring."""
    return factory()


def difference(results: Any, expected: Any, allowed: float) -> str | None:
    """What is wrong with results, None if nothing is.

    Integers must be equal. Of floating results the norm of the error over the norm of the truth may be `allowed`, and
    no element may be off by more than eight times that share of the largest one.
    """
    got, truth = tensors(results), tensors(expected)
    if len(got) != len(truth):
        return f"returns {len(got)} tensors, expected {len(truth)}"
    for index, (value, reference) in enumerate(zip(got, truth, strict=True)):
        if value.shape != reference.shape:
            return f"result {index} has shape {list(value.shape)}, expected {list(reference.shape)}"
        if not value.is_floating_point():
            # As int64: in a narrow dtype an index that overflowed would equal the truth that overflowed with it.
            if reference.is_floating_point() or not torch.equal(value.long(), reference.long()):
                return f"result {index} differs, expected equality"
            continue
        error = value.double() - reference.double()
        scale = reference.double()
        relative = (error.norm() / scale.norm().clamp_min(1e-30)).item() if error.numel() else 0.0
        largest = (error.abs().max() / scale.abs().max().clamp_min(1e-30)).item() if error.numel() else 0.0
        # Written so that a NaN fails.
        if not (relative <= allowed and largest <= 8 * allowed):
            return f"result {index} is off by {relative:.2g} (largest element {largest:.2g}), allowed {allowed:.2g}"
    return None


def seeded(call: Callable[[], Any]) -> Any:
    """Run a call with the global generators in a known state."""
    torch.manual_seed(SEED)
    return call()


def _run(case: Case, direction: str, function: Function, inputs: Inputs) -> Any:
    """Results on copies of the inputs, since an optimiser changes what it is given."""
    call = bind(case, direction, function, clone(inputs))
    return seeded(call)


def input_sets(case: Case, device: torch.device, cache: str) -> list[Inputs]:
    """One set of inputs, or for a cold cache so many that together they are three times the L2 cache or more."""
    first = seeded(partial(case.inputs, device))
    if cache == "hot":
        return [first]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(first))
    wanted = sets_beyond(torch.cuda.get_device_properties(device).L2_cache_size, size)
    return [first, *(case.inputs(device) for _ in range(1, wanted))]


def sets_beyond(cache: int, size: int) -> int:
    """How many sets of inputs of `size` bytes exceed a cache three times; one where there is nothing to read."""
    return min(max(math.ceil(3 * cache / size), 1), MOST_SETS) if size else 1


def _row(
    case: Case,
    direction: str,
    cache: str,
    suite: str,
    name: str,
    timing: Timings,
    limits: roofline.Roofline,
    peak: int | None,
    speed_over: dict[str, list[float]],
    absent: dict[str, str],
) -> Row:
    middle, spread = quantiles(timing.samples)
    nbytes, flops = case.bytes[direction], case.flops.get(direction, 0.0)
    floor, bound = limits.floor(nbytes, flops, case.dtype)
    return Row(
        suite=suite,
        op=case.op,
        case=case.name,
        implementation=name,
        shape=case.shape,
        dtype=dtype_name(case.dtype),
        direction=direction,
        cache=cache,
        timer=timing.timer,
        samples=len(timing.samples),
        median_s=middle,
        quantiles_s=spread,
        peak_bytes=peak,
        bytes=nbytes,
        flops=flops or None,
        gb_per_s=nbytes / middle / 1e9,
        tflop_per_s=flops / middle / 1e12 if flops else None,
        floor_s=floor,
        bound=bound,
        roofline=floor / middle,
        speed_over=speed_over,
        absent=absent,
    )
