"""The clocks, on a CPU and (marked) on a GPU, and the cases in both states of the cache."""

import time
from functools import partial

import pytest
import torch
from bench import Case, clock, measure, roofline
from bench.memory import peak_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_implementations_take_turns():
    calls = []
    variants = {name: [partial(sleep_and_note, calls, name, 0.003)] for name in ("a", "b", "c")}
    timings = clock.time_in_turns(variants, CPU, seconds=0.0)
    assert {len(timing.samples) for timing in timings.values()} == {clock.ROUNDS[0]}
    rounds = calls[-3 * clock.ROUNDS[0] :]  # warm-up and estimates come first
    for start in range(0, len(rounds), 3):
        assert sorted(rounds[start : start + 3]) == ["a", "b", "c"]
    assert rounds != sorted(rounds)


def sleep_and_note(calls, name, seconds):
    calls.append(name)
    time.sleep(seconds)


def test_samples_are_seconds_for_a_call():
    timings = clock.time_in_turns(
        {"short": [lambda: time.sleep(1e-3)], "long": [lambda: time.sleep(4e-3)]}, CPU, seconds=0.2
    )
    short, long = (sorted(timings[name].samples)[0] for name in ("short", "long"))  # the least disturbed of them
    assert 1e-3 <= short < 3e-3
    assert 4e-3 <= long < 8e-3
    assert timings["short"].timer == "wall"


def test_sets_of_inputs_are_rotated():
    seen = []
    clock.time_in_turns(
        {"a": [partial(seen.append, 0), partial(seen.append, 1), partial(seen.append, 2)]}, CPU, seconds=0.0
    )
    counts = [seen.count(index) for index in range(3)]
    assert max(counts) - min(counts) <= 1


def test_more_time_gives_more_samples_up_to_a_limit():
    def count(seconds):
        return len(clock.time_in_turns({"a": [lambda: time.sleep(2e-3)]}, CPU, seconds=seconds)["a"].samples)

    assert count(0.0) == clock.ROUNDS[0]
    assert count(100.0) == clock.ROUNDS[1]


def test_the_peak_is_what_a_call_holds():
    keep = torch.ones(4 << 20)
    peak = peak_of(lambda: (keep + 1, keep + 2), CPU)  # two results of 16 MiB at the same time
    if peak is None:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    assert 30 << 20 <= peak < 48 << 20


@pytest.mark.parametrize(
    ("size", "sets"), [(0, 1), (1 << 10, measure.MOST_SETS), (1 << 20, 150), (49 << 20, 4), (1 << 30, 1)]
)
def test_as_many_sets_as_exceed_a_cache_of_50_mib(size, sets):
    assert measure.sets_beyond(50 << 20, size) == sets


def example() -> Case:
    size = 1 << 22
    return Case(
        op="copy",
        name="4 Mi",
        shape={"elements": size},
        dtype=torch.float32,
        inputs=lambda device: {"x": torch.randn(size, device=device)},
        truth=lambda x: x + 1,
        implementations={"vitrail": lambda: lambda x: x + 1, "eager": lambda: lambda x: (x + 1).clone()},
        bytes={"forward": 8 * size},
        flops={},
    )


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=gpu)])
def test_a_case_becomes_rows_that_agree_with_each_other(device):
    for cache in measure.caches(device):
        outcome = measure.measure(example(), "forward", cache, "kernels", device)
        ours, theirs = outcome.rows["vitrail"], outcome.rows["eager"]
        assert ours.quantiles_s[0] <= ours.median_s <= ours.quantiles_s[1]
        assert ours.gb_per_s == pytest.approx(8 * (1 << 22) / ours.median_s / 1e9)
        assert ours.speed_over["eager"][0] > 1  # a copy more
        assert theirs.speed_over["vitrail"][0] < 1
        assert ours.bound == "memory"
        assert ours.roofline == pytest.approx(ours.floor_s / ours.median_s)
        assert ours.samples == theirs.samples == len(outcome.samples["eager"])
        assert ours.cache == cache


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestOnGPU:
    """What only a GPU can show."""

    def test_short_calls_are_captured_and_agree_with_the_backlog(self):
        x = torch.randn(1 << 20, device=CUDA)
        call = partial(torch.add, x, 1)
        timings = clock.time_in_turns({"a": [call]}, CUDA, seconds=0.1)["a"]
        assert timings.timer == "graph"
        queued, estimate = clock._enqueue_time([call])
        other = clock._events([call] * 200, estimate, backlog=200 * queued)
        assert other.timer == "backlog"
        assert sorted(timings.samples)[len(timings.samples) // 2] == pytest.approx(other.sample(), rel=0.3)

    def test_what_waits_for_the_device_is_timed_without_a_graph(self):
        x = torch.ones(8, device=CUDA)
        assert clock.time_in_turns({"a": [lambda: x.sum().item()]}, CUDA, seconds=0.05)["a"].timer in (
            "backlog",
            "events",
        )

    def test_a_cold_cache_is_slower_than_a_hot_one(self):
        small = example()
        cold, hot = (
            measure.measure(small, "forward", cache, "kernels", CUDA).rows["vitrail"].median_s
            for cache in ("cold", "hot")
        )
        assert cold > hot

    def test_sets_of_inputs_exceed_the_cache(self):
        sets = measure.input_sets(example(), CUDA, "cold")
        held = sum(inputs["x"].numel() * 4 for inputs in sets)
        assert held >= 3 * torch.cuda.get_device_properties(CUDA).L2_cache_size

    def test_the_roofline_is_below_the_datasheet(self):
        limits, rows = roofline.measured(CUDA)
        assert 0.2e12 < limits.copy < 10e12
        assert limits.matrix[torch.bfloat16] > limits.matrix[torch.float32]
        assert len(rows) == 4
