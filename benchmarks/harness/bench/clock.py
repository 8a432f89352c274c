"""Clocks: how long calls take, when they are made in turns."""

import gc
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
SHORT = 100e-6  # s: on a GPU, calls shorter than this are timed without the gaps between launches
SAMPLE = {"cpu": 2e-3, "cuda": 1e-3}  # s: calls are repeated within one sample until it takes this long
ROUNDS = (5, 60)  # samples at least and at most
RATE = 2e9  # cycles per second that no GPU exceeds: sleeping cycles / RATE is at least the time asked for


@dataclass(frozen=True)
class Timings:
    """Samples of one implementation: seconds for a call, each the mean of several."""

    samples: list[float]
    timer: str
    """`wall`, `events`, `graph` or `backlog`."""


def time_in_turns(calls: Mapping[str, Sequence[Call]], device: torch.device, *, seconds: float) -> dict[str, Timings]:
    """Time implementations round by round, so that a machine that slows down slows all of them.

    Args:
        calls: For each implementation its call, bound to one set of inputs or more; they are rotated through.
        device: Where they run.
        seconds: About how long to measure each implementation.

    Returns:
        Timings by implementation, with equally many samples; those of one round stand at the same place.
    """
    runners = {name: _runner(list(variants), device) for name, variants in calls.items()}
    cost = sum(runner.seconds for runner in runners.values())
    rounds = int(min(max(seconds * len(runners) / cost, ROUNDS[0]), ROUNDS[1]))
    samples: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)  # nobody always runs behind the same neighbour
            for name in order:
                samples[name].append(runners[name].sample())
    finally:
        if collecting:
            gc.enable()
    return {name: Timings(values, runners[name].timer) for name, values in samples.items()}


@dataclass(frozen=True)
class _Runner:
    """Takes one sample at a time."""

    sample: Callable[[], float]
    """Runs the calls of one sample; returns seconds for a call."""
    seconds: float
    """About how long a sample takes."""
    timer: str


def _runner(variants: list[Call], device: torch.device) -> _Runner:
    if device.type == "cpu":
        return _on_cpu(variants)
    return _on_gpu(variants)


def _on_cpu(variants: list[Call]) -> _Runner:
    def sample(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            next(turns)()
        return (time.perf_counter() - started) / count

    turns = itertools.cycle(variants)
    for call in variants:  # compiles, and touches memory for the first time
        call()
    estimate = min(sample(1), sample(1))
    count = max(1, round(SAMPLE["cpu"] / max(estimate, 1e-9)))
    return _Runner(lambda: sample(count), estimate * count, "wall")


def _on_gpu(variants: list[Call]) -> _Runner:
    for call in variants:
        call()
        call()
    torch.cuda.synchronize()
    queued, estimate = _enqueue_time(variants)
    # Every set of inputs equally often, so that a sample is a fair mean of them.
    count = len(variants) * max(1, round(SAMPLE["cuda"] / max(estimate, 1e-9) / len(variants)))
    calls = [variants[index % len(variants)] for index in range(count)]
    if estimate < SHORT:
        try:
            return _graph(calls, estimate)
        except RuntimeError:  # some peers wait for the device, which a graph cannot hold
            torch.cuda.synchronize()
    # Where enqueueing takes about as long as running, the host would be what is timed.
    waits = queued > estimate / 2
    return _events(calls, estimate, backlog=queued * count if waits else 0.0)


def _enqueue_time(variants: list[Call]) -> tuple[float, float]:
    """Seconds that the host takes to enqueue a call, and that the device is busy with it (or waiting for the host)."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 10 * len(variants)
    started = time.perf_counter()
    begin.record()
    for index in range(repeats):
        variants[index % len(variants)]()
    end.record()
    queued = (time.perf_counter() - started) / repeats
    end.synchronize()
    return queued, begin.elapsed_time(end) / 1e3 / repeats


def _graph(calls: list[Call], estimate: float) -> _Runner:
    """All calls captured in one CUDA graph: what the device needs, without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    return _Runner(sample, estimate * len(calls), "graph")


def _events(calls: list[Call], estimate: float, *, backlog: float) -> _Runner:
    """Events around the calls; with a backlog the device first idles so long that the host has enqueued everything."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = int(2 * backlog * RATE)

    def sample() -> float:
        if cycles:
            torch.cuda._sleep(cycles)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    return _Runner(sample, estimate * len(calls) + 2 * backlog, "backlog" if cycles else "events")
