"""Recipes as their users start them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training

from vitrail.engine.train import launch
from vitrail.recipes import mae_vith

RECIPE = Path(__file__).parents[3] / "recipes" / "mae_vith.py"
TINY = Path(training.__file__).with_name("tiny_recipe.py")
pytestmark = [pytest.mark.launch, pytest.mark.slow]


def test_a_mistake_ends_the_process_with_one_line_and_status_2():
    process = training.start(RECIPE)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "pass --data.path" in output.strip().splitlines()[-1]


@pytest.fixture
def refused(capfd):
    """Runs the recipe in this process and gives the last line that it says when it refuses."""

    def run(*flags: str) -> str:
        with pytest.raises(SystemExit) as stop:
            launch(mae_vith.recipe, flags)
        assert stop.value.code == 2
        return capfd.readouterr().err.strip().splitlines()[-1]

    return run


def test_bad_data_is_one_line(refused, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(tmp_path / "missing") in refused("--data.path", str(tmp_path / "missing"))
    assert refused("--data.path", str(empty)).startswith("error: ")


def test_a_batch_that_does_not_divide_is_one_line(refused, tmp_path):
    line = refused(*training.SHORT_DEMO, "--train.batch-size", "20", "--train.output", str(tmp_path))
    assert "20 is not a multiple of train.micro_batch 8" in line


def test_an_optimiser_that_cannot_run_is_one_line(refused, tmp_path):
    line = refused(*training.SHORT_DEMO, "--optim.name", "lars", "--train.output", str(tmp_path / "run"))
    assert line.startswith("error: optim.name lars of vitrail cannot run with train.zero_stage 1: LARS's trust ratios")
    assert line.endswith("pass --train.zero-stage 0")
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_an_installation_says_how_to_install():
    # -S leaves site-packages out, and with them the installation.
    bare = subprocess.run([sys.executable, "-S", str(RECIPE), "--demo"], capture_output=True, text=True, check=False)
    assert bare.returncode != 0
    assert "pip install -e ." in bare.stderr
    assert "Traceback" not in bare.stderr


def test_launcher_with_two_ranks_trains_on_the_same_batches_as_one(tmp_path):
    alone = training.run_case("short_demo", tmp_path, ranks=1)
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    assert launcher is not None
    output = tmp_path / "two"
    ran = subprocess.run(
        [launcher, "--num_accelerators", "2", str(RECIPE), *training.SHORT_DEMO, "--train.output", str(output)],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert len(alone) == 6
    assert training.logged(output) == pytest.approx(alone, rel=1e-5)
    for name in ("reconstructions.png", "curves.png", "config.json"):
        assert (output / name).stat().st_size > 0
    accuracy = json.loads((output / "summary.json").read_text())["accuracy"]
    assert accuracy.keys() == {"raw pixels", "untrained network", "trained network"}
    assert accuracy["raw pixels"]["linear"] > 0.8  # the digits can be read, and far above chance by whom is said
    assert "Training added" in ran.stdout


def wait_for(process, condition):
    """Wait until a run has come to a certain point."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


SAVING = ["--train.save-every", "0.0027"]  # two steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to."""
    output = tmp_path_factory.mktemp("whole")
    training.finish(training.start(TINY, str(output), *SAVING))
    return output


def test_killed_run_continues_where_it_was_saved(tmp_path, whole):
    """SIGKILL leaves no time to save: the run goes on from its last checkpoint and ends as if nothing had happened."""
    killed = tmp_path / "killed"
    process = training.start(TINY, str(killed), *SAVING)
    wait_for(process, (killed / "checkpoints" / "step_00000002").exists)
    process.kill()
    process.communicate()
    output = training.finish(training.start(TINY, str(killed), *SAVING))
    assert "continuing at step" in output
    assert training.logged(killed) == training.logged(whole)
    assert len(list((killed / "checkpoints").glob("step_*"))) == 2


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    process = training.start(TINY, str(tmp_path), "--train.epochs", "10")
    wait_for(process, lambda: (tmp_path / "metrics.jsonl").exists() and training.logged(tmp_path))
    process.send_signal(signal.SIGTERM)
    output = training.finish(process, timeout=60)
    assert "the same command continues from here" in output
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 1


def test_weights_of_another_run_start_a_new_one(tmp_path, whole):
    saved = max((whole / "checkpoints").glob("step_*"))
    training.finish(training.start(TINY, str(tmp_path), "--train.init-from", str(saved), "--optim.lr", "0"))
    # With a learning rate of zero every loss of the second run belongs to the first run's final weights.
    assert max(training.logged(tmp_path)) < training.logged(whole)[0]
