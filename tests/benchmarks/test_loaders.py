"""The benchmark of input pipelines: what it covers, what it lets pass, and what its clock counts."""

import importlib.util
import inspect
from collections import deque
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from bench import loaders, peers
from bench.loaders import Feed, Job, LoaderCase, Photos, difference, make_photos, measure, prepare, time_in_turns
from PIL import Image

from vitrail.engine.data import views

CPU = torch.device("cpu")


def load():
    path = Path(__file__).parents[2] / "benchmarks" / "data" / "bench_loader.py"
    spec = importlib.util.spec_from_file_location("bench_loader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench_loader = load()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Photos:
    return make_photos(tmp_path_factory.mktemp("photos"), 32)


@pytest.fixture
def job(photos) -> Job:
    return Job(photos=photos, batch=2, workers=2, device=CPU)


def test_every_operation_is_measured_alone():
    ops = {
        thing
        for _, thing in inspect.getmembers(views, inspect.isclass)
        if hasattr(thing, "draw") and hasattr(thing, "output_size") and thing is not views.Op
    }
    assert views.RandomResizedCrop in ops
    assert {type(op) for op in bench_loader.OPS} == ops, "add the operation to OPS in benchmarks/data/bench_loader.py"
    names = {case.name for case in bench_loader.CASES}
    assert {f"{op.__name__} alone" for op in ops} <= names


def test_photographs_are_what_the_rows_say(photos):
    for path in photos.files:
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (loaders.WIDTH, loaders.HEIGHT), "RGB")
    sizes = [path.stat().st_size for path in photos.files]
    mean = sum(sizes) / len(sizes)
    assert mean == pytest.approx(loaders.MEAN_BYTES, rel=0.05)
    assert photos.shape == {"images": 32, "width": 500, "height": 375, "bytes": round(mean)}
    assert len({path.read_bytes() for path in photos.files}) == len(photos.files)


@pytest.mark.parametrize("case", bench_loader.CASES, ids=lambda case: case.name)
def test_every_implementation_computes_the_truth(case, job):
    with ExitStack() as closing:
        outcome, feeds = prepare(case, job, closing)
        assert not outcome.failed
        assert feeds.keys() | outcome.absent.keys() == case.implementations.keys()
        alone = case.name in ("ColorJitter alone", "GaussianBlur alone")
        assert {"Pillow"} | (set() if alone else {"torchvision"}) <= feeds.keys()


def test_only_random_views_are_compared_by_statistics(job):
    loose = {case.name: case.own_draws for case in bench_loader.CASES if case.own_draws}
    assert loose == {"MAE views": ("torchvision",), "DINO views": ("torchvision",)}


@pytest.fixture(scope="module")
def batch(photos) -> torch.Tensor:
    return bench_loader.stacked([Image.open(path).convert("RGB") for path in photos.files[:4]])


WRONG = {
    "mirrored": lambda b: b.flip(2),
    "colours swapped": lambda b: b.flip(3),
    "shifted by a pixel": lambda b: b.roll(1, 2),
    "another image": lambda b: b.roll(1, 0),
    "no antialiasing": lambda b: b[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :375, :500],
    "a view too many": lambda b: [b, b],
    "cut": lambda b: b[:, 1:],
    "planes first": lambda b: b.permute(0, 3, 1, 2),
    "floats": lambda b: b / 255,
}
WRONG_WHATEVER_IS_DRAWN = {
    "a view too many": lambda b: [b, b],
    "cut": lambda b: b[:, 1:],
    "planes first": lambda b: b.permute(0, 3, 1, 2),
    "floats": lambda b: b / 255,
    "floats as bytes": lambda b: (b / 255).byte(),
    "halved": lambda b: b // 2,
    "one colour": lambda b: b.float().mean((1, 2), keepdim=True).byte().expand_as(b),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pixels_are_rejected(name, batch):
    wrong = WRONG[name](batch)
    assert difference([batch], [batch]) is None
    assert difference(wrong if isinstance(wrong, list) else [wrong], [batch]) is not None


@pytest.mark.parametrize("name", WRONG_WHATEVER_IS_DRAWN)
def test_wrong_statistics_are_rejected(name, batch):
    wrong = WRONG_WHATEVER_IS_DRAWN[name](batch)
    assert difference([batch.flip(2)], [batch], allowed=None) is None
    assert difference(wrong if isinstance(wrong, list) else [wrong], [batch], allowed=None) is not None


def fake(pixels: torch.Tensor) -> Feed:
    return Feed(pull=lambda: [pixels], images=len(pixels), pixels=lambda views: views)


def raising(job: Job) -> Feed:
    raise RuntimeError("no such decoder")


def test_only_who_is_right_gets_a_row(batch, job, monkeypatch):
    monkeypatch.setattr(loaders, "SAMPLE", 1e-4)
    case = LoaderCase(
        name="fake",
        shape=lambda job: job.photos.shape,
        truth=lambda job: [batch],
        implementations={
            "Pillow": lambda job: fake(batch.clone()),
            "torchvision": lambda job: fake(batch.flip(2)),
            "vitrail": raising,
            "DALI GPU": raising,
        },
    )
    outcome = measure(case, job, dry=False)
    assert outcome.rows.keys() == {"Pillow"}
    assert "grey levels" in outcome.failed["torchvision"]
    assert outcome.failed["vitrail"] == "RuntimeError: no such decoder"
    assert outcome.absent == {"DALI GPU": "runs on CUDA only"}
    row = outcome.rows["Pillow"]
    assert row.extra["images_per_s"] == pytest.approx(1 / row.median_s)
    assert row.extra["images_per_s_per_core"] == pytest.approx(row.extra["images_per_s"] / 2)
    assert (row.suite, row.op, row.direction, row.cache, row.absent) == (
        "data",
        "loader",
        "pass",
        "hot",
        outcome.absent,
    )
    assert (row.extra["cores"], row.extra["workers"]) == (2, 2)


def test_a_dry_run_has_no_rows(batch, job):
    case = LoaderCase(
        name="fake",
        shape=lambda job: job.photos.shape,
        truth=lambda job: [batch],
        implementations={"Pillow": lambda job: fake(batch)},
    )
    outcome = measure(case, job, dry=True)
    assert (outcome.rows, outcome.failed, outcome.samples) == ({}, {}, {"Pillow": []})


def test_without_dali_there_is_a_reason(job, monkeypatch):
    monkeypatch.setattr(peers, "_importable", lambda module: not module.startswith("nvidia"))
    (case,) = [case for case in bench_loader.CASES if case.name == "decode only"]
    with ExitStack() as closing:
        outcome, feeds = prepare(case, job, closing)
    assert outcome.absent["DALI"].startswith("nvidia.dali is not installed")
    assert feeds.keys() == {"Pillow", "torchvision"}


class Clock:
    """Time that passes only where something waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Simulated:
    """A pipeline with a stock: one batch at a time is made, as long as fewer than `ahead` wait."""

    def __init__(self, clock: Clock, pace: float, ahead: int) -> None:
        self.clock, self.pace = clock, pace
        self.ready = deque(clock.now + pace * (number + 1) for number in range(ahead))

    @property
    def idle(self) -> bool:
        return self.ready[-1] <= self.clock.now + 1e-9

    def pull(self) -> None:
        last = self.ready[-1]
        self.clock.now = max(self.clock.now, self.ready.popleft())
        self.ready.append(max(self.clock.now, last) + self.pace)


def test_what_was_in_stock_is_not_counted_and_nobody_works_in_anothers_turn(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loaders, "time", clock)
    slow, fast = Simulated(clock, 0.03, 4), Simulated(clock, 0.002, 3)
    asleep = []

    def alone() -> None:
        asleep.append(slow.idle and fast.idle)
        clock.now += 0.01

    feeds = {
        "slow": Feed(pull=slow.pull, images=2, pixels=list, ahead=4),
        "fast": Feed(pull=fast.pull, images=2, pixels=list, ahead=3),
        "alone": Feed(pull=alone, images=2, pixels=list),
    }
    samples = time_in_turns(feeds, CPU)
    assert samples["slow"] == pytest.approx([0.015] * loaders.ROUNDS)
    assert samples["fast"] == pytest.approx([0.001] * loaders.ROUNDS)
    assert samples["alone"] == pytest.approx([0.005] * loaders.ROUNDS)
    assert all(asleep)
