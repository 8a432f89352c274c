"""Whole training steps: implementations run in processes of their own, in turns, and their figures become rows.

Processes alternate, so that a machine that slows down slows all implementations, and ratios are taken within a round.
Before anything becomes a row, the first losses are compared: a difference says that the models are not the same.
"""

import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vitrail.engine.train.throughput import peak_flops

from . import peers, roofline
from .environment import ROOT
from .measure import Outcome
from .plugin import LATE, TAPE, Session, conclude
from .results import is_ours
from .rows import Key, Row, quantiles, ratios

CHILD = ROOT / "benchmarks" / "steps" / "child.py"
TIMEOUT = 900  # s, for a process that hangs
AGREEMENT = 1e-3  # relative difference of first losses that bf16 explains, where the case does not say otherwise
OUT_OF_MEMORY = "out of memory"
MODELS = {"small": ("ViT-S/16", 16), "base": ("ViT-B/16", 16), "large": ("ViT-L/16", 16), "huge": ("ViT-H/14", 14)}
SWINS = {"tiny": ("Swin-T W7", 4), "small": ("Swin-S W7", 4), "base": ("Swin-B W14", 4)}
MULTI_CROP = ("dino", "esvit")
LOCAL_CROPS, LOCAL_SIZE, PROTOTYPES = 8, 96, 65_536
TRIED = {"mae": (2, 0), "dino": (4, 64), "esvit": (4, 64)}  # images and their side in a dry run; 0 is the case's own
Run = dict[str, Any]
"""What a process printed."""


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """Training steps of one method and size. Everything here is data."""

    op: str
    """Name of the op; its rows go to `results/<machine>/<op>.json`."""
    name: str
    """Which sizes, in words."""
    family: str = "mae"
    """The method: `mae`, `moco_v3`, `simclr`, `dino`, `esvit` or `sit`."""
    model: str
    """`small`, `base`, `large` or `huge`; of `SWINS` for EsViT."""
    batch: int
    """Images of a step."""
    rounds: Mapping[str, int]
    """Processes of each implementation, ours first; ratios are taken over the rounds that two have in common."""
    steps: int
    """Timed steps of a process."""
    warmup: int = 1
    """Steps between the first, which is timed apart, and the timed ones."""
    image_size: int = 224
    """Side of the images in pixels."""
    mask_ratio: float = 0.75
    """Share of the patches that MAE hides."""
    agreement: float = AGREEMENT
    """Relative difference of first losses that bf16 explains."""
    limit: int = 0
    """Bytes of data that a process on a CPU may hold; 0 for what the machine has free."""

    @property
    def shape(self) -> dict[str, int | float | str]:
        """The sizes in numbers."""
        patch = (SWINS if self.family == "esvit" else MODELS)[self.model][1]
        common: dict[str, int | float | str] = {"batch": self.batch, "image": self.image_size, "patch": patch}
        if self.family != "mae":
            common["views"] = 2
            if self.family in MULTI_CROP:
                common |= {"crops": LOCAL_CROPS, "crop_image": LOCAL_SIZE, "prototypes": PROTOTYPES}
            return common
        length = (self.image_size // patch) ** 2
        visible = int(length * (1 - self.mask_ratio))
        masked = length - visible
        return {**common, "visible": visible, "masked": masked}

    def key(self, implementation: str) -> Key:
        """What identifies the row of an implementation."""
        return (self.op, self.name, implementation, "bfloat16", "step", "hot")


def measures(cases: Sequence[StepCase]) -> Callable[..., None]:
    """Make the test of a benchmark file, one for each case and implementation: `test_<op> = steps.measures(cases)`."""
    tests = [pytest.param(case, name, id=f"{case.name}-{name}") for case in cases for name in case.rounds]

    @pytest.mark.benchmark(timer=TAPE.time)
    @pytest.mark.parametrize(("case", "implementation"), tests)
    def test(benchmark: Any, bench: Session, case: StepCase, implementation: str) -> None:
        benchmark.group = f"{case.op} {case.name}"
        done = bench.has(case.key(implementation))
        conclude(benchmark, bench, implementation, (case.op, case.name), lambda: measure(case, bench), done=done)

    return test


def measure(case: StepCase, bench: Session) -> Outcome:
    """Run a case, all implementations in turns. A dry run makes no rows."""
    outcome = Outcome()
    runs = collect(case, bench, outcome)
    complete = {name: parts for name, parts in runs.items() if not any("outcome" in run for run in parts)}
    losses = {name: [run["loss"] for run in parts] for name, parts in complete.items()}
    if not agree([loss for several in losses.values() for loss in several], case.agreement):
        outcome.failed.update(dict.fromkeys(runs, f"the implementations do not compute the same loss: {losses}"))
        return outcome
    outcome.samples = {
        name: [] if bench.dry else flatten(run["seconds"] for run in parts) for name, parts in complete.items()
    }
    if bench.dry:
        # At these sizes nothing runs out of memory.
        outcome.failed.update(dict.fromkeys(runs.keys() - complete.keys(), OUT_OF_MEMORY))
        return outcome
    speed_over = paired(outcome.samples)
    for name, parts in runs.items():
        figures = _figures(case, parts, bench.device) | {"speed_over": speed_over[name]} if name in complete else {}
        outcome.rows[name] = _row(case, name, parts[-1], figures, outcome.absent)
    return outcome


def collect(case: StepCase, bench: Session, outcome: Outcome) -> dict[str, list[Run]]:
    """Start the processes round by round; who is absent or fails is noted in the outcome.

    When the time is up no further process starts, and who has not run at all is noted as well.

    Returns:
        By implementation what its processes printed, a list that ends where memory ran out.
    """
    runs: dict[str, list[Run]] = {}
    for name in case.rounds:
        reason = peers.absent(name, bench.device) or peers.absent(stands_on(case, name), bench.device)
        if reason is None:
            runs[name] = []
        else:
            outcome.absent[name] = reason
    with tempfile.TemporaryDirectory() as caches:  # empty at first, so that the first round compiles everything
        for turn in range(1 if bench.dry else max(case.rounds.values())):
            for name in [name for name in runs if turn < case.rounds[name]]:
                if runs[name] and "outcome" in runs[name][-1]:
                    continue
                if bench.late and any(runs.values()):  # what was measured shall have its rows
                    if not runs[name]:
                        outcome.absent[name] = LATE
                        del runs[name]
                    continue
                try:
                    one = try_out(case, name) if bench.dry else run(case, name, bench.device, Path(caches))
                    runs[name].append(one)
                except Exception as error:  # a peer may raise anything; the others are still measured
                    outcome.failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
                    del runs[name]
    return runs


def stands_on(case: StepCase, implementation: str) -> str:
    """Who else has to be there: MAE's weights are those that transformers draws, other methods' peers train timm's."""
    if case.family == "mae":
        return "transformers"
    return implementation if is_ours(implementation) else "timm"


def run(case: StepCase, implementation: str, device: torch.device, caches: Path) -> Run:
    """Run the steps of an implementation in a process.

    Raises:
        RuntimeError: The process failed; the message is the last line of what it said.
    """
    limit = 0
    if device.type == "cpu":
        limit = case.limit or available_memory()
    else:
        torch.cuda.empty_cache()  # what this process keeps, the other lacks
    command = [sys.executable, str(CHILD), implementation, "--family", case.family]
    command += ["--model", case.model, "--batch", str(case.batch), "--image-size", str(case.image_size)]
    command += ["--mask-ratio", str(case.mask_ratio), "--steps", str(case.steps), "--warmup", str(case.warmup)]
    command += ["--limit", str(limit)]
    # Waiting threads that spin on disturb all implementations on a shared machine; these settings are everyone's.
    settings = {"GOMP_SPINCOUNT": "20000", **os.environ}
    settings |= {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        raise RuntimeError(f"the process ended with status {done.returncode}: {said[-1]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "limit": limit}


def try_out(case: StepCase, implementation: str) -> Run:
    """A few images through two blocks in this process: enough to see that a case builds and agrees with the others.

    A process for each would take longer than all else, as would Inductor, so that compilation stops at the graph. The
    methods that compare images need many, or rounding shows in their losses, and are content with small ones; those
    with small crops have many in each image.
    """
    module = child()
    batch, image_size = TRIED.get(case.family, (64, 32))
    work = module.Work(
        family=case.family,
        implementation=implementation,
        model=case.model,
        batch=batch,
        image_size=image_size or case.image_size,
        local_size=32,
        prototypes=1024,
        mask_ratio=case.mask_ratio,
        steps=1,
        warmup=0,
        depth=2,
        backend="eager",
    )
    return module.attempt(work)


def child() -> ModuleType:
    """`child.py` as a module."""
    folder = str(CHILD.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(CHILD.stem)


def agree(losses: Sequence[float], agreement: float = AGREEMENT) -> bool:
    """Whether losses differ by no more than bf16 explains. A loss that is not finite agrees with nothing."""
    if not all(map(math.isfinite, losses)):
        return False
    return not losses or max(losses) - min(losses) <= agreement * max(losses)


def paired(samples: Mapping[str, Sequence[float]]) -> dict[str, dict[str, list[float]]]:
    """`ratios`, over the rounds that two implementations have in common where they ran differently often."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in samples}
    for name, own in samples.items():
        for other, theirs in samples.items():
            if other != name:
                both = {key: values[: min(len(own), len(theirs))] for key, values in ((name, own), (other, theirs))}
                found[name] |= ratios(both)[name]
    return found


def available_memory() -> int:
    """Bytes that the machine has free, less a tenth."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return int(0.9 * free)


def flatten(parts: Any) -> list[float]:
    """The samples of all rounds, in order."""
    return [sample for part in parts for sample in part]


def _figures(case: StepCase, runs: Sequence[Run], device: torch.device) -> dict[str, Any]:
    """What a row says about runs that had enough memory."""
    samples = flatten(run["seconds"] for run in runs)
    middle, spread = quantiles(samples)
    flops = runs[0]["flops"]
    floor, bound = roofline.measured(device)[0].floor(0, flops, torch.bfloat16)
    extra = {
        "images_per_s": case.batch / middle,
        "first_step_s": runs[0]["first_step_s"],
        "step_bytes": max(run["step_bytes"] for run in runs),
        "loss": runs[0]["loss"],
        "gflops": flops / middle / 1e9,
    }
    peak = peak_flops(device)
    if peak is not None:
        extra["mfu"] = flops / middle / peak
    return {
        "timer": "events" if device.type == "cuda" else "wall",
        "samples": len(samples),
        "median_s": middle,
        "quantiles_s": spread,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "flops": flops,
        "tflop_per_s": flops / middle / 1e12,
        "floor_s": floor,
        "bound": bound,
        "roofline": floor / middle,
        "extra": extra,
    }


def _row(case: StepCase, name: str, last: Run, figures: dict[str, Any], absent: dict[str, str]) -> Row:
    """The row of an implementation, with figures or with the reason why there are none."""
    extra = figures.pop("extra", {})
    if last["limit"]:
        extra["limit_bytes"] = last["limit"]
    return Row(
        suite="steps",
        op=case.op,
        case=case.name,
        implementation=name,
        shape=case.shape,
        dtype="bfloat16",
        direction="step",
        cache="hot",
        outcome=last.get("outcome", "ok"),
        absent=absent,
        extra=extra,
        **figures,
    )
