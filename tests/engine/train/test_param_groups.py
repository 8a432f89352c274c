"""Which parameters are decayed, which follow the schedule, and whether every ZeRO stage steps them so."""

from dataclasses import replace
from itertools import chain

import descent
import pytest
import torch
import training
from descent import POISON, STOP
from safetensors.torch import load_file
from training import STEPS

from vitrail.engine.methods.mae import MAE
from vitrail.engine.train import OptimConfig
from vitrail.engine.train.param_groups import parameter_groups
from vitrail.engine.train.schedules import cosine_with_warmup


def names_of(method, groups):
    """Names of the parameters of each group; every trained one is in one group."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    found = [[names[parameter] for parameter in group["params"]] for group in groups]
    assert sorted(chain(*found)) == sorted(name for p, name in names.items() if p.requires_grad)
    return found


def test_matrices_are_decayed_as_in_the_official_code(tmp_path):
    config = training.tiny_config(tmp_path)
    method = MAE(config.method)
    kept, decayed = groups = parameter_groups(method, config)
    assert (kept["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert all(p.dim() == 1 for p in kept["params"])
    in_decay = names_of(method, groups)[1]
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} <= set(in_decay)


def test_all_spares_nothing(tmp_path):
    config = replace(training.tiny_config(tmp_path), optim=OptimConfig(weight_decay=0.1, decay="all"))
    method = MAE(config.method)
    (group,) = parameter_groups(method, config)
    assert group["weight_decay"] == 0.1
    assert group["params"] == [p for p in method.parameters() if p.requires_grad]


def test_frozen_parameters_reach_no_group(tmp_path):
    config = training.tiny_config(tmp_path)
    method = MAE(config.method)
    method.encoder.requires_grad_(False)
    found = names_of(method, parameter_groups(method, config))
    assert all(name.startswith("decoder.") for name in chain(*found))
    method.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(method, config)


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_networks_off_the_schedule_have_groups_of_their_own(tmp_path, decay):
    config = descent.descent_config(tmp_path)
    config = replace(config, optim=replace(config.optim, decay=decay, lr=None, base_lr=1.6))
    method = descent.Descent()
    groups = parameter_groups(method, config)
    found = names_of(method, groups)
    spared, decayed = {"weight_decay": 0.0}, {"weight_decay": 0.125}
    held = {"fixed_lr": 0.1}  # 1.6 x 16 / 256
    wanted = {
        "matrices": [
            (["encoder.bias"], spared),
            (["encoder.weight"], decayed),
            (["predictor.bias"], spared | held),
            (["predictor.weight"], decayed | held),
        ],
        "all": [
            (["encoder.weight", "encoder.bias"], decayed),
            (["predictor.weight", "predictor.bias"], decayed | held),
        ],
    }[decay]
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert list(zip(found, options, strict=True)) == wanted


# --- SGD on two ranks, interrupted -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Reports and final weights of every stage."""
    folder = tmp_path_factory.mktemp("descent")
    report = training.run_case("stages", folder, ranks=2, script=descent.__file__)
    return {stage: (report[stage], load_file(folder / f"stage{stage}.safetensors")) for stage in report}


def rate(step):
    """The scheduled learning rate."""
    return cosine_with_warmup(step, peak=descent.OPTIM.lr, final=0.0, warmup=0, total=STEPS)


def expected(name, weights):
    """SGD with L2 decay by its formula, in float64, poisoned steps left out."""
    weights, velocity = weights.double(), torch.zeros_like(weights, dtype=torch.float64)
    for step in set(range(STEPS)) - set(POISON):
        gradient = weights - descent.target(step) + descent.OPTIM.weight_decay * weights
        velocity = descent.OPTIM.momentum * velocity + gradient
        weights = weights - (descent.OPTIM.lr if name.startswith("predictor.") else rate(step)) * velocity
    return weights


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("stage", "0123")
def test_sgd_follows_its_formula_in_every_stage(runs, stage):
    report, weights = runs[stage]
    assert report["first"] + report["second"] == [step not in POISON for step in range(STEPS)]
    assert len(report["first"]) == STOP
    assert report["lr"] == pytest.approx([rate(step) for step in range(STEPS)])
    assert weights.keys() == {f"{net}.{kind}" for net in ("encoder", "predictor") for kind in ("weight", "bias")}
    for name, value in weights.items():
        torch.testing.assert_close(value.double(), expected(name, descent.start(value.shape)), rtol=0, atol=2e-6)
