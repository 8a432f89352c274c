"""`make bench-gpu`: what it does without a GPU, and how it stops and goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import torch

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "benchmarks" / "harness" / "gpu.py"


@pytest.mark.slow
def test_a_dry_run_builds_every_case():
    """The command as it is typed, without the arguments of a `make test ARGS=…` around it.

    `make bench-gpu --dry` says make's own --dry-run.
    """
    typed = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES")}
    command = ["make", "bench-gpu", "--dry"]
    ran = subprocess.run(command, cwd=ROOT, env=typed, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines() if " " in line)
    for stage in ("kernels", "steps", "engine", "sweeps", "data"):
        assert " passed" in lines[stage], ran.stdout
        assert "failed" not in lines[stage], ran.stdout


@pytest.mark.slow
def test_it_runs_without_an_installation_of_vitrail(tmp_path):
    """No `vitrail` in site-packages, none of what a bare GPU machine lacks: links and a path are enough."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(
        "import importlib.abc, sys\n"
        "class Blocker(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('tyro', 'deepspeed', 'lightly', 'liger_kernel') or name == 'nvidia.dali':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        # An editable installation hooks itself in under a name of its own.
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    code = (
        "import sys; sys.argv = ['gpu.py']; sys.path.insert(0, 'benchmarks/harness')\n"
        "import gpu; sys.path.insert(0, gpu.link())\n"
        "import bench, vitrail.kernels, vitrail.engine.methods.mae, vitrail.engine.train.throughput\n"
        "assert '.links' in vitrail.kernels.__file__, vitrail.kernels.__file__\n"
        "from bench.peers import absent\n"
        "import torch\n"
        "assert 'pip install lightly' in absent('lightly', torch.device('cpu'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_the_extension_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    kernels, log, setup = tmp_path / "kernels", tmp_path / "build.log", tmp_path / "setup.py"
    kernels.mkdir()
    setup.write_text("import sys; sys.stderr.write('vitrail: building without the compiled extension: no toolkit\\n')")
    assert gpu.build(log) == "vitrail: building without the compiled extension: no toolkit"
    setup.write_text("raise SystemExit(3)")
    assert gpu.build(log) == f"failed, see {log}"
    setup.write_text("import sys; assert sys.argv[1:] == ['build_ext', '--inplace']; open('kernels/_C.abi3.so', 'w')")
    assert gpu.build(log) == "built"
    setup.write_text("raise SystemExit(3)")
    assert gpu.build(log) == "is there"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    ran = subprocess.run([sys.executable, str(DRIVER)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stdout.splitlines() == [
        "error: no CUDA GPU here; --dry builds every case without one, and `make bench` measures on a CPU"
    ]


@pytest.fixture
def drive(monkeypatch, tmp_path):
    """Runs the stages with prepared outcomes; returns the exit status and the limit of every stage that ran."""

    def start(statuses: dict[str, int], *, late: float = 0.0) -> tuple[int, dict[str, float]]:
        limits = {}

        def run(arguments, log, *, limit):
            log.write_text("FAILED tests/a.py::test_b[c] - d\n" if statuses.get(log.stem) else "")
            limits[log.stem] = limit
            return statuses.get(log.stem, 0), "1 passed"

        monkeypatch.setattr(gpu, "run", run)
        status = gpu.stages(tmp_path, tmp_path, time.monotonic() - late, seconds=500.0, dry=False)
        return status, limits

    return start


def test_the_most_important_comes_first_and_all_of_it_ends_in_time(drive):
    status, limits = drive({"data": 5})  # no test there could run
    assert status == 0
    assert list(limits) == ["check", "kernels", "steps", "engine", "sweeps", "data"]
    assert limits["check"] < 0.4 * 500 + 31
    assert limits["kernels"] < 0.45 * 500 + 31
    assert max(limits.values()) < 540  # nine minutes


def test_ops_that_passed_are_not_checked_again_and_others_are(drive, capsys):
    status, _ = drive({"check": 1})
    assert status == 1
    assert "failed: tests/a.py::test_b[c]" in capsys.readouterr().out
    assert "check" in drive({})[1]
    assert "check" not in drive({})[1]
    assert "has its row" in capsys.readouterr().out


def test_what_has_no_time_left_waits_for_the_next_call(drive, capsys):
    assert drive({}, late=501.0) == (0, {})
    assert capsys.readouterr().out.count("the time is up; call again to go on") == 6


def test_a_stage_that_hangs_is_stopped_and_counts_as_failed(tmp_path):
    hanging = [sys.executable, "-c", "import time; print('1 passed', flush=True); time.sleep(60)"]
    assert gpu.run(hanging, tmp_path / "log", limit=1.0) == (124, "stopped after 1 s")


@pytest.fixture
def measured(tmp_path):
    """Runs one small benchmark file with some options; returns its outcome lines and its rows."""
    folder = tmp_path / "rows"

    def run(*options):
        command = ["benchmarks/kernels/bench_random_masking.py", "-k", "draw and B and not compiled", *options]
        ran = subprocess.run(
            [Path(sys.executable).with_name("pytest"), "-q", "-rs", "--rows", str(folder), *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        rows = json.loads((folder / "random_masking.json").read_text()) if folder.exists() else []
        return ran.stdout, rows

    return run


@pytest.mark.slow
def test_a_second_run_measures_only_what_is_missing(measured):
    first, rows = measured()
    assert {row["implementation"] for row in rows} >= {"vitrail", "eager"}
    assert "passed" in first
    assert "lightly" in first.split("vitrail ===")[-1]  # the table comes last
    again, same = measured("--resume")
    assert same == rows
    assert "has its row" in again
    _, newer = measured()
    assert newer != rows


@pytest.mark.slow
def test_no_case_starts_after_the_time_is_up(measured):
    output, rows = measured("--seconds", "0")
    assert rows == []
    assert "the time is up: run again to go on" in output


@pytest.mark.slow
def test_dry_writes_nothing(measured):
    output, rows = measured("--dry")
    assert rows == []
    assert "passed" in output
