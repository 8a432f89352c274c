"""Teachers and optimisers under every ZeRO stage, on one and two ranks, interrupted, and with broken numbers."""

import math

import momentum
import pytest
import torch
import training
from momentum import OPTIMISERS, POISON
from safetensors.torch import load_file
from training import STEPS

pytestmark = [pytest.mark.launch, pytest.mark.slow]

WATCHED = ["stage0", "stage1", "stage2", "stage3", "torch", "bf16", "coming"]


class Runs:
    """Reports and final weights on some ranks."""

    def __init__(self, folder, ranks):
        self.folder = folder
        self.reports = training.run_case("everything", folder, ranks=ranks, script=momentum.__file__)
        self.weights = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}

    def losses(self, name):
        """Losses without the one that was poisoned."""
        losses = self.reports[name]["losses"]
        assert len(losses) == STEPS
        assert math.isnan(losses[POISON])
        return losses[:POISON] + losses[POISON + 1 :]


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request):
    return request.param


@pytest.fixture(scope="module")
def optimisers(tmp_path_factory):
    return {n: Runs(tmp_path_factory.mktemp(f"ranks{n}"), n) for n in (1, 2)}


@pytest.fixture(scope="module")
def stages(optimisers, ranks):
    return optimisers[ranks]


def differences(first, second, prefix=""):
    """Largest absolute difference of all floating parameters and buffers under a prefix."""
    assert first.keys() == second.keys()
    names = [name for name in first if name.startswith(prefix) and first[name].is_floating_point()]
    assert names
    return max((first[name] - second[name]).abs().max().item() for name in names)


@pytest.mark.parametrize("name", WATCHED)
def test_the_teacher_is_the_average_of_the_students(stages, name):
    """Against float64, from the student's weights after each step; six updates of numbers below 1.3."""
    assert stages.reports[name]["error"] < STEPS * 2**-24 * 1.3


@pytest.mark.parametrize("name", WATCHED)
def test_a_poisoned_step_moves_no_teacher(stages, name):
    report = stages.reports[name]
    assert report["applied"] == [step != POISON for step in range(STEPS)]
    assert report["moved"][POISON] == 0.0
    assert all(moved > 1e-3 for step, moved in enumerate(report["moved"]) if step != POISON)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_stages_agree(stages, stage):
    assert stages.losses(f"stage{stage}") == pytest.approx(stages.losses("stage1"), rel=1e-6)
    assert differences(stages.weights[f"stage{stage}"], stages.weights["stage1"], "teacher.") < 1e-6
    assert differences(stages.weights[f"stage{stage}"], stages.weights["stage1"], "student.") < 1e-5


def test_one_pass_equals_adamw_then_average(stages):
    """vitrail's AdamW with the teacher in the same pass, torch's AdamW with the teacher in a second one."""
    assert stages.losses("stage0") == pytest.approx(stages.losses("torch"), rel=1e-6)
    assert differences(stages.weights["stage0"], stages.weights["torch"], "teacher.") < 1e-6
    assert differences(stages.weights["stage0"], stages.weights["torch"], "student.") < 1e-5


@pytest.mark.parametrize("stage", range(4))
def test_interrupted_runs_continue_exactly(stages, stage):
    whole, parts = stages.reports[f"stage{stage}"], stages.reports[f"parts{stage}"]
    assert len(parts["applied"]) == STEPS - 3
    assert parts["losses"][:POISON] == whole["losses"][:POISON]
    assert parts["losses"][POISON + 1 :] == whole["losses"][POISON + 1 :]
    saved, resumed = stages.weights[f"stage{stage}"], stages.weights[f"parts{stage}"]
    assert saved.keys() == resumed.keys()
    assert all(torch.equal(saved[name], resumed[name]) for name in saved)


@pytest.mark.parametrize("stage", range(4))
def test_the_sidecar_holds_the_teacher(stages, stage):
    (folder,) = (stages.folder / f"stage{stage}" / "checkpoints").glob(f"step_{STEPS:08}")
    saved, last = load_file(folder / "model.safetensors"), stages.weights[f"stage{stage}"]
    assert any(name.startswith("teacher.") for name in saved)
    assert saved.keys() == last.keys()
    assert all(torch.equal(saved[name], last[name]) for name in saved)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_teaches(optimisers, name):
    for ranks in (1, 2):
        report = optimisers[ranks].reports[name]
        assert report["applied"] == [step != POISON for step in range(STEPS)]
        assert report["moved"][POISON] == 0.0
        assert report["error"] < STEPS * 2**-24 * 1.3
    assert optimisers[1].losses(name)[-1] < optimisers[1].losses(name)[0]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_two_ranks_equal_one(optimisers, name):
    one, two = optimisers[1], optimisers[2]
    assert two.losses(name) == pytest.approx(one.losses(name), rel=1e-5)
    trained = [{k: v for k, v in runs.weights[name].items() if "running" not in k} for runs in (one, two)]
    assert differences(*trained) < 1e-5  # the statistics of BatchNorm are each rank's own


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_interrupted_runs_of_other_optimisers_continue_exactly(optimisers, name, ranks):
    runs = optimisers[ranks]
    assert runs.losses(f"parts {name}") == runs.losses(name)
    whole, parts = runs.weights[name], runs.weights[f"parts {name}"]
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_clipping_is_the_same_whoever_does_it(optimisers, ranks):
    """vitrail's optimiser as it reads the gradients, torch's by a scale, DeepSpeed on shards."""
    runs = optimisers[ranks]
    assert runs.losses("clipped by torch") == pytest.approx(runs.losses("clipped"), rel=1e-5)
    assert runs.losses("clipped in stage 1") == pytest.approx(runs.losses("clipped"), rel=1e-5)
    assert runs.losses("per tensor by torch") == pytest.approx(runs.losses("per tensor"), rel=1e-5)
    for one, other in (("clipped", "not clipped"), ("clipped", "per tensor")):
        assert abs(runs.losses(one)[-1] / runs.losses(other)[-1] - 1) > 1e-3


@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeeds_adamw_trains_alike(optimisers, ranks):
    runs = optimisers[ranks]
    assert runs.losses("deepspeed") == pytest.approx(runs.losses("not clipped"), rel=1e-4)
    assert runs.losses("clipped for deepspeed") == pytest.approx(runs.losses("clipped"), rel=1e-4)
