"""Input pipelines under the harness: photographs to read, a check of the pixels, turns that do not overlap, and rows.

A pipeline works ahead of whoever pulls from it, so its turn is not over when the last batch has been taken. A sample is
therefore three things: the batches in stock are taken and not counted; then several times as many are timed, every one
made while the clock ran; then everybody waits until the stock is full again.
"""

import gc
import io
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.engine.data.cache import available_threads

from . import peers
from .measure import SEED, Outcome
from .plugin import TAPE, Session, conclude
from .rows import Key, Row, quantiles, ratios

HEIGHT, WIDTH = 375, 500  # pixels; the commonest size of ImageNet's photographs
MEAN_BYTES = 110_000  # of ImageNet's training files
QUALITY = 95  # with the grain below, what brings photographs of this size to that many bytes
GRAIN = 6.0  # standard deviation in grey levels
COUNT = {False: 256, True: 8}  # photographs of a run, of a dry run
# Images. DALI waits for a batch's slowest image before each operation, so that few images for a thread slow it down.
BATCH = {"cpu": 32, "cuda": 64}
DRY_BATCH = 2
SHARE = 16  # images of each worker in a call that prepares nothing ahead
ROUNDS = 5
SAMPLE = 0.25  # s: of one sample, at least
# Grey levels in the mean, as in tests/engine/data/test_parity.py: Pillow rounds between the two passes of a resize.
ALLOWED = 0.35
STATISTICS = 40  # grey levels by which channels' means and deviations may differ between two draws of the same views


@dataclass(frozen=True)
class Photos:
    """JPEG files, in the order of their names."""

    folder: Path
    """Holds one sub-folder, which holds them."""
    files: tuple[Path, ...]

    def first(self, count: int) -> "Photos":
        """The first `count` of them, for calls that are given files rather than the folder."""
        return Photos(self.folder, self.files[:count])

    @property
    def shape(self) -> dict[str, int | float | str]:
        """How many and how large, as a row states it; `bytes` is the mean of a file."""
        size = sum(path.stat().st_size for path in self.files) / len(self.files)
        return {"images": len(self.files), "width": WIDTH, "height": HEIGHT, "bytes": round(size)}


def make_photos(folder: Path, count: int) -> Photos:
    """Write photographs: shifted and somewhat enlarged crops of scikit-learn's two, with the grain of a sensor.

    The two are smooth for their size; without grain a decoder would have half of ImageNet's entropy to work through.
    Having just been written, the files are in the page cache.
    """
    from sklearn.datasets import load_sample_image

    sources = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    grain = rng.normal(0, GRAIN, (2 * HEIGHT, 2 * WIDTH, 1)).astype(np.float32)
    (folder / "photographs").mkdir()
    files = []
    for number in range(count):
        source = sources[number % 2]
        scale = rng.uniform(0.8, 1.0)
        width, height = scale * WIDTH, scale * HEIGHT
        left, top = rng.random() * (source.width - width), rng.random() * (source.height - height)
        box = (left, top, left + width, top + height)
        image = np.asarray(source.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box))
        down, right = int(rng.random() * HEIGHT), int(rng.random() * WIDTH)
        grainy = (image + grain[down : down + HEIGHT, right : right + WIDTH]).clip(0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(grainy).save(encoded, "JPEG", quality=QUALITY)
        files.append(folder / "photographs" / f"{number:04d}.jpg")
        files[-1].write_bytes(encoded.getvalue())
    return Photos(folder, tuple(files))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every implementation is given."""

    photos: Photos
    batch: int
    """Images of a batch."""
    workers: int
    """Threads or processes that decode: as many as there are cores."""
    device: torch.device
    """Where the batches are wanted."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """An implementation that has been built."""

    pull: Callable[[], Any]
    """Returns the next batch, in whatever form the implementation has it."""
    images: int
    """In a batch."""
    pixels: Callable[[Any], Sequence[torch.Tensor]]
    """Turns what was pulled into one uint8 tensor [b, height, width, 3] per view. Is not timed."""
    ahead: int = 0
    """Batches that are made before anyone asks; 0 where `pull` does all the work and leaves nothing running."""
    close: Callable[[], None] = lambda: None
    """Releases threads, processes and memory."""


@dataclass(frozen=True, kw_only=True)
class LoaderCase:
    """One thing that input pipelines do."""

    name: str
    shape: Callable[[Job], dict[str, int | float | str]]
    """The images in numbers."""
    truth: Callable[[Job], Sequence[torch.Tensor]]
    """What the first batch must hold, for each view, computed as plainly as possible."""
    implementations: Mapping[str, Callable[[Job], Feed]]
    """By the name of the implementation."""
    own_draws: tuple[str, ...] = ()
    """Implementations that draw the parameters of random views themselves, so that only statistics can agree."""
    allowed: Mapping[str, float] = field(default_factory=dict)
    """Mean error in grey levels by implementation, where it is not `ALLOWED`."""

    @property
    def cell(self) -> tuple[str, ...]:
        """What identifies the case among all of a run."""
        return ("loader", self.name, "pass", "hot")

    def key(self, implementation: str) -> Key:
        """What identifies the row of an implementation."""
        return ("loader", self.name, implementation, "uint8", "pass", "hot")


def difference(
    got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], *, allowed: float | None = ALLOWED
) -> str | None:
    """What is wrong with the views of a batch, None if nothing is.

    Args:
        got: One tensor per view.
        expected: What they should be.
        allowed: Error in grey levels in the mean; None where the two were drawn with different parameters, so that only
            the means and standard deviations of the channels are compared, over all views of equal size: a few small
            crops of a few photographs show anything.
    """
    if len(got) != len(expected):
        return f"{len(got)} views, expected {len(expected)}"
    for index, (view, truth) in enumerate(zip(got, expected, strict=True)):
        if view.dtype != truth.dtype or view.shape != truth.shape:
            have, want = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (view, truth))
            return f"view {index} is {have}, expected {want}"
        if allowed is not None:
            error = (view.float() - truth.float()).abs().mean().item()
            if not error <= allowed:
                return f"view {index} is off by {error:.2g} grey levels in the mean, allowed {allowed:.2g}"
    return _statistics(got, expected) if allowed is None else None


def _statistics(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    for shape in dict.fromkeys(view.shape for view in expected):
        a, b = (torch.cat([view for view in views if view.shape == shape]).float() for views in (got, expected))
        for what in (torch.mean, torch.std):
            error = (what(a, (0, 1, 2)) - what(b, (0, 1, 2))).abs().max().item()
            if not error <= STATISTICS:
                which = f"views of {shape[1]}x{shape[2]} pixels"
                return f"the {what.__name__} of the {which} is off by {error:.2g} grey levels, allowed {STATISTICS}"
    return None


def prepare(case: LoaderCase, job: Job, closing: ExitStack) -> tuple[Outcome, dict[str, Feed]]:
    """Build the implementations that can run here and check the first batch of each.

    Args:
        case: The case.
        job: What they are given.
        closing: Closes all that was built.

    Returns:
        An outcome that holds who is absent and who failed, and the feeds of the others.
    """
    outcome, feeds = Outcome(), {}
    expected = case.truth(job)
    for name, start in case.implementations.items():
        reason = peers.absent(name, job.device)
        if reason is not None:
            outcome.absent[name] = reason
            continue
        allowed = None if name in case.own_draws else case.allowed.get(name, ALLOWED)
        try:
            torch.manual_seed(SEED)  # of what draws for itself: statistics of a few images must not depend on luck
            feed = start(job)
            closing.callback(feed.close)
            wrong = difference(feed.pixels(feed.pull()), expected, allowed=allowed)
        except Exception as error:  # a peer may raise anything; the others are still measured
            wrong = f"{type(error).__name__}: {error}".partition("\n")[0]
        if wrong is None:
            feeds[name] = feed
        else:
            outcome.failed[name] = wrong
    return outcome, feeds


def _pull(feed: Feed, count: int, device: torch.device) -> float:
    """Take batches; seconds for each."""
    started = time.perf_counter()
    for _ in range(count):
        feed.pull()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / max(count, 1)


def _sample(feed: Feed, count: int, device: torch.device) -> float:
    """One sample, in seconds for a batch."""
    _pull(feed, feed.ahead, device)
    pace = _pull(feed, count, device)
    time.sleep(feed.ahead * pace)  # it fills its stock again
    return pace


def time_in_turns(feeds: Mapping[str, Feed], device: torch.device) -> dict[str, list[float]]:
    """Time pipelines round by round.

    Returns:
        Seconds for an image, by implementation; samples of one round stand at the same place.
    """
    counts = {}
    for name, feed in feeds.items():
        pace = _sample(feed, max(feed.ahead, 1), device)
        # A multiple of the stock: worker processes finish batches at about the same time, as many as there are of them.
        # And twice the stock at least, so that the ends of a sample, where less runs at once, weigh little.
        stock = max(feed.ahead, 1)
        counts[name] = stock * max(2 if feed.ahead else 1, math.ceil(SAMPLE / (pace * stock)))
    samples: dict[str, list[float]] = {name: [] for name in feeds}
    order = list(feeds)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(ROUNDS):
            shuffle(order)  # nobody always runs behind the same neighbour
            for name in order:
                samples[name].append(_sample(feeds[name], counts[name], device) / feeds[name].images)
    finally:
        if collecting:
            gc.enable()
    return samples


def measure(case: LoaderCase, job: Job, *, dry: bool) -> Outcome:
    """Measure one case, all implementations in turns; or, if `dry`, only build and check them."""
    with ExitStack() as closing:
        outcome, feeds = prepare(case, job, closing)
        outcome.samples = {name: [] for name in feeds} if dry else time_in_turns(feeds, job.device)
    if not dry:
        compared = ratios(outcome.samples)
        for name, samples in outcome.samples.items():
            outcome.rows[name] = _row(case, job, name, samples, compared[name], outcome.absent)
    return outcome


def _row(
    case: LoaderCase,
    job: Job,
    name: str,
    samples: list[float],
    speed_over: dict[str, list[float]],
    absent: dict[str, str],
) -> Row:
    middle, spread = quantiles(samples)
    op, case_name, implementation, dtype, direction, cache = case.key(name)
    return Row(
        suite="data",
        op=op,
        case=case_name,
        implementation=implementation,
        shape=case.shape(job),
        dtype=dtype,
        direction=direction,
        cache=cache,
        timer="wall",
        samples=len(samples),
        median_s=middle,
        quantiles_s=spread,
        speed_over=speed_over,
        absent=absent,
        extra={
            "images_per_s": 1 / middle,
            "images_per_s_per_core": 1 / middle / job.workers,
            "cores": job.workers,
            "workers": job.workers,
        },
    )


def measures(cases: Sequence[LoaderCase]) -> Callable[..., None]:
    """Make the test of a benchmark file, which has a fixture `photos`."""
    tests = [pytest.param(case, name, id=f"{case.name}-{name}") for case in cases for name in case.implementations]

    @pytest.mark.benchmark(timer=TAPE.time)
    @pytest.mark.parametrize(("case", "implementation"), tests)
    def test(benchmark: Any, bench: Session, photos: Photos, case: LoaderCase, implementation: str) -> None:
        benchmark.group = " ".join(case.cell)
        job = Job(
            photos=photos,
            batch=DRY_BATCH if bench.dry else BATCH[bench.device.type],
            workers=available_threads(),
            device=bench.device,
        )
        done = bench.has(case.key(implementation))
        conclude(benchmark, bench, implementation, case.cell, lambda: measure(case, job, dry=bench.dry), done=done)

    return test
