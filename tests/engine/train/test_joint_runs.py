"""Methods on two views in the trainer: any number of ranks, cached gradients, every ZeRO stage, broken numbers."""

import joint_runs
import pytest
import torch
import training
from joint_runs import CACHED, INTERRUPTED, METHODS, POISON, STAGES, STEPS
from safetensors.torch import load_file

from vitrail.engine.methods.mae import MAEConfig
from vitrail.engine.models.resnet import ResNetConfig
from vitrail.engine.train.config import ConfigError
from vitrail.engine.train.grad_cache import check_comparisons

pytestmark = [pytest.mark.launch, pytest.mark.slow]


class Runs:
    """Reports and final weights on some ranks."""

    def __init__(self, folder, ranks):
        self.reports = training.run_case("runs", folder, ranks=ranks, script=joint_runs.__file__)
        self.weights = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
        for weights in self.weights.values():
            if "queue" in weights:  # within a batch the order of its keys is that of ranks and micro-batches
                weights["queue"] = weights["queue"][weights["queue"][:, 0].argsort()]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("two"), 2)


def assert_same_run(first, second):
    """Losses, gradient norms and final state of two runs, given as (runs, name), up to the order of sums in float32."""
    (a, name), (b, other) = first, second
    for figure in ("loss", "gradient_norm"):
        assert len(a.reports[name][figure]) == STEPS
        assert a.reports[name][figure] == pytest.approx(b.reports[other][figure], rel=1e-4, abs=1e-6), figure
    torch.manual_seed(0)  # the runs' seed
    start = METHODS[other.split()[0]].build().state_dict()
    if "queue" in start:
        start["queue"] = start["queue"][start["queue"][:, 0].argsort()]
    assert a.weights[name].keys() == b.weights[other].keys() == start.keys()
    kinds = ["encoder.", "projector.", "predictor.", "momentum", "queue", "student", "teacher", "centers"]
    for kind in [*kinds, "patch_centers"]:
        keys = [k for k in start if k.startswith(kind) and start[k].is_floating_point() and start[k].numel()]
        difference = sum((a.weights[name][k] - b.weights[other][k]).square().sum().item() for k in keys)
        moved = sum((b.weights[other][k] - start[k]).square().sum().item() for k in keys)
        if keys:
            assert difference**0.5 <= 1e-3 * moved**0.5, (kind, difference**0.5, moved**0.5)
            assert moved > 0, kind


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one(one, two, name):
    """Negatives, statistics of batch normalisation, queue and centres are those of the whole batch."""
    assert_same_run((two, name), (one, name))


@pytest.mark.parametrize("name", ["dino", "esvit"])
@pytest.mark.parametrize("how", ["accumulated", "0", "3"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_crops_in_every_way(one, two, ranks, how, name):
    """Micro-batches, the optimiser that steps the teacher too, and sharded parameters: losses, weights, centres."""
    assert_same_run((one if ranks == 1 else two, f"{name} {how}"), (one, name))


@pytest.mark.parametrize("how", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_hidden_and_corrupted_views_in_every_stage(one, two, ranks, how):
    """Masks, the count of corrupted pixels, keys, batch statistics and both centres are those of the whole batch."""
    assert_same_run((one if ranks == 1 else two, how), (one, how.split()[0]))


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("ranks", [1, 2])
def test_cached_gradients_are_those_of_the_whole_batch(one, two, ranks, name):
    assert_same_run((one if ranks == 1 else two, f"{name} cached"), (one, name))


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_cached_gradients_in_every_stage(one, two, ranks, stage):
    assert_same_run((one if ranks == 1 else two, f"moco_v3 cached {stage}"), (one, "moco_v3"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_cached_keys_enter_the_queue_once_in_stage_3(one, two, ranks):
    """There the heads are trained with the first micro-batch, elsewhere with the last."""
    assert_same_run((one if ranks == 1 else two, "moco_v2 cached 3"), (one, "moco_v2"))


def test_cached_gradients_under_autocast(one):
    """The same products in bf16, summed in another order; a few steps later the two runs have parted."""
    plain, cached = one.reports["moco_v3 bf16"], one.reports["moco_v3 bf16 cached"]
    assert cached["loss"][:2] == pytest.approx(plain["loss"][:2], rel=2e-3)
    assert cached["gradient_norm"][:2] == pytest.approx(plain["gradient_norm"][:2], rel=2e-2)


def test_accumulation_alone_is_another_loss(one):
    """Four images at a time have three negatives each: what caching is for. The run says so."""
    whole, part = one.reports["moco_v3"]["loss"], one.reports["moco_v3 accumulated"]["loss"]
    assert all(abs(a - b) > 0.1 for a, b in zip(whole, part, strict=True))
    assert any("MoCoV3 sees 4 images at a time, not 16" in message for message in one.reports["events"])


def test_both_passes_drop_the_same_blocks(one):
    for sums in one.reports["dropped"]:
        first, again = sums[:4], sums[4:]
        assert again == first
        assert len(set(first)) == 4


STATE = {
    "moco_v3": {"running_mean", "num_batches_tracked"},
    "moco_v2": {"queue"},
    "esvit": {"centers"},
    "ibot": {"centers"},
    "sit": {"running_mean", "num_batches_tracked"},
}


@pytest.mark.parametrize("name", STATE)
def test_a_step_that_is_not_applied_leaves_no_state_behind(one, name):
    moved = one.reports[f"{name} poisoned"]
    assert {kind for kind in set().union(*STATE.values()) for key in moved if kind in key} == STATE[name]
    for key, steps in moved.items():
        assert steps == [step != POISON for step in range(STEPS)], key


@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted_runs_continue_exactly(one, name):
    assert one.reports[f"{name} parts"]["loss"] == one.reports[name]["loss"]
    whole, parts = one.weights[name], one.weights[f"{name} parts"]
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_shuffled_statistics(one, two):
    """Two ranks normalise halves of the permuted batch, and every image gets its own features back."""
    found = two.reports["shuffled"]
    torch.testing.assert_close(*map(torch.tensor, (found["features"], found["halves"])), rtol=1e-5, atol=1e-6)
    alone = one.reports["shuffled"]["features"][:4]
    assert (torch.tensor(found["features"]) - torch.tensor(alone)).abs().max() > 1e-2


def test_what_cannot_be_cached_is_refused(tmp_path):
    def refusal(method, world=1, **train):
        config = joint_runs.config(tmp_path, method, micro=4, **train)
        return check_comparisons(method.build(), config, world)

    with pytest.raises(ConfigError, match=r"MAE looks at each image alone.*--train.no-grad-cache"):
        refusal(MAEConfig(), grad_cache=True)
    resnet = joint_runs.replace(METHODS["moco_v2"], encoder=ResNetConfig(architecture="resnet18", image_size=32))
    with pytest.raises(ConfigError, match="backbone with batch normalisation"):
        refusal(resnet, grad_cache=True)
    with pytest.raises(ConfigError, match=r"8 images at a time, not 16.*--train.grad-cache, or --train.micro-batch 8"):
        refusal(METHODS["simclr"], world=2)
    assert "sees 4 images" in refusal(METHODS["simclr"], accumulation=4)
    assert "batch statistics" in refusal(METHODS["byol"])
    assert refusal(METHODS["simclr"], grad_cache=True) is None
    assert refusal(METHODS["simclr"], world=4) is None
