"""Check and measure everything on one GPU: `make bench-gpu`, or `python benchmarks/harness/gpu.py`.

First the extension is compiled, if there is a CUDA toolkit, and every op is checked on the GPU (float64 truth, 20
bit-identical repeats, graph capture, odd shapes), then ops, training steps and the parts of a step are measured, the
most important first. When the time is up the rest is left for the next call, which passes over what has a row. Needs
torch, triton, pytest and pytest-benchmark, for the extension also setuptools; no network, no DALI and no installation
of vitrail. `--dry` builds every case on any machine and measures nothing.

Rows go to `benchmarks/results/<gpu>/*.json`, the output of each stage to `logs/` beside them; a short table comes last.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 500.0  # in all: under nine minutes, with what the last case takes
GRACE = 30.0  # s that a case may run on after the time is up


@dataclass(frozen=True)
class Stage:
    """One run of pytest."""

    name: str
    """Also that of its log."""
    arguments: tuple[str, ...]
    share: float = 1.0
    """Largest share of the whole time that it may take."""


CHECK = Stage("check", ("tests/kernels", "tests/benchmarks", "-m", "gpu"), 0.4)
MEASURE = (
    Stage("kernels", ("benchmarks/kernels",), 0.45),
    Stage(
        "steps",
        tuple(
            f"benchmarks/steps/bench_{method}_step.py"
            for method in ("mae", "moco_v3", "simclr", "esvit", "dino", "sit")
        ),
    ),
    Stage("engine", ("benchmarks/engine",)),
    Stage("sweeps", ("benchmarks/steps/bench_mae_batch.py", "benchmarks/steps/bench_mae_cost.py")),
    Stage("data", ("benchmarks/data",)),
)


def link() -> str:
    """The folder of links that makes vitrail importable without an installation, made if need be."""
    links = ROOT / ".links"
    (links / "vitrail").mkdir(parents=True, exist_ok=True)
    for folder in ("kernels", "engine", "recipes"):
        target = links / "vitrail" / folder
        if not target.is_symlink():
            target.symlink_to(Path("../..") / folder)
    return str(links)


def environment() -> dict[str, str]:
    """Variables of the stages: this working tree's vitrail, and no network."""
    path = [link(), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def command(stage: Stage, folder: Path, *, seconds: float, dry: bool) -> list[str]:
    """The command line of a stage whose rows go to `folder`."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *stage.arguments]
    if stage is CHECK:
        return pytest
    if dry:
        return [*pytest, "--dry"]
    return [*pytest, "--resume", "--rows", str(folder), "--seconds", f"{seconds:.0f}", "--benchmark-quiet"]


def run(arguments: list[str], log: Path, *, limit: float | None) -> tuple[int, str]:
    """Run pytest with its output in a log, for `limit` seconds at most.

    Returns:
        Its exit status (124 where it was stopped) and the line that counts its tests.
    """
    with log.open("w") as output:
        try:
            status = subprocess.run(
                arguments,
                cwd=ROOT,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            output.write(f"\nstopped after {limit:.0f} s\n")
            status = 124
    lines = [
        line for line in log.read_text().splitlines() if re.search(r"\d+ (passed|failed|skipped|error)|^stopped", line)
    ]
    return status, lines[-1].strip("= ") if lines else "no output"


def build(log: Path) -> str:
    """Compile the extension where it is not there yet; returns what came of it. Without it, only Triton is measured."""
    if any((ROOT / "kernels").glob("_C*.so")):
        return "is there"
    status, _ = run([sys.executable, "setup.py", "build_ext", "--inplace"], log, limit=None)
    told = [line for line in log.read_text().splitlines() if line.startswith("vitrail: ")]
    if status or told:
        return told[-1] if told else f"failed, see {log}"
    return "built"


def failures(log: Path) -> list[str]:
    """The tests that a log names as failed."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(), flags=re.MULTILINE)


def main() -> int:
    """Run the stages and print the table; returns 0 unless something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="build every case, measure nothing; needs no GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--results", type=Path, help="folder of the rows; benchmarks/results/<gpu>")
    arguments = parser.parse_args()
    missing = [name for name in ("torch", "pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed for {sys.executable}; install, or choose another PYTHON")
        return 2
    sys.path.insert(0, link())
    started = time.monotonic()

    import torch
    from bench.environment import commit, machine

    if not arguments.dry and not torch.cuda.is_available():
        print("error: no CUDA GPU here; --dry builds every case without one, and `make bench` measures on a CPU")
        return 2
    if not arguments.dry and commit() == "unknown":
        print("note: no git history here, so rows will not name their commit; set VITRAIL_COMMIT=$(git rev-parse HEAD)")
    folder = arguments.results or ROOT / "benchmarks" / "results" / machine()
    logs = (ROOT / "build" / "dry" if arguments.dry else folder) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return stages(folder, logs, started, seconds=arguments.seconds, dry=arguments.dry)


def stages(folder: Path, logs: Path, started: float, *, seconds: float, dry: bool) -> int:
    """Run the check, then the measurements, and print the table of our rows."""
    from bench.rows import Row, Store
    from bench.table import show

    store, failed = Store(folder), False
    checked = Row(
        suite="kernels",
        op="checks",
        case="every op on the GPU",
        implementation="vitrail",
        shape={},
        dtype="all",
        direction="check",
        cache="hot",
    )
    if not dry:
        print(f"{'build':8} {build(logs / 'build.log')}", flush=True)
    for stage in (CHECK, *MEASURE):
        left = min(started + seconds - time.monotonic(), stage.share * seconds)
        if not dry and (left <= 0 or (stage is CHECK and store.has([checked.key]))):
            print(
                f"{stage.name:8} passed over: {'the time is up; call again to go on' if left <= 0 else 'has its row'}"
            )
            continue
        log = logs / f"{stage.name}.log"
        arguments = command(stage, folder, seconds=left, dry=dry)
        status, line = run(arguments, log, limit=None if dry else left + GRACE)
        print(f"{stage.name:8} {line}", *(f"\n         failed: {name}" for name in failures(log)), flush=True)
        failed |= status not in (0, 5)  # 5: nothing to run
        if stage is CHECK and status == 0 and not dry:
            store.put([checked])
    if not dry:
        print(show([row for row in store.read_all() if row.implementation.startswith("vitrail")], {}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
