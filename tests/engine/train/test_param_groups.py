"""Which parameters are decayed, which follow the schedule, and whether every ZeRO stage steps them so."""

import math
from dataclasses import replace
from itertools import chain

import descent
import pytest
import torch
import training
from descent import POISON, RELEASE, STOPS, WARMUP
from safetensors.torch import load_file
from training import STEPS

from vitrail.engine.methods.mae import MAE
from vitrail.engine.train import OptimConfig
from vitrail.engine.train.param_groups import parameter_groups


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


def test_what_a_method_does_not_decay_is_spared_with_the_vectors(tmp_path):
    config = training.tiny_config(tmp_path)
    method = MAE(config.method)
    method.undecayed = lambda: [method.encoder.cls_token, method.encoder.norm.weight]
    kept, decayed = names_of(method, parameter_groups(method, config))
    assert {"encoder.cls_token", "encoder.norm.weight"} <= set(kept)
    assert "decoder.mask_token" in decayed
    everything = replace(config, optim=replace(config.optim, decay="all"))
    assert len(parameter_groups(method, everything)) == 1


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


def test_a_schedule_of_the_decay_is_for_those_that_are_decayed(tmp_path):
    config = descent.descent_config(tmp_path, descent.ADAMW)
    groups = parameter_groups(descent.Descent(), config)
    assert [(group["weight_decay"], "scheduled_decay" in group) for group in groups] == [(0.0, False), (0.04, True)] * 3


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_networks_off_the_schedule_and_held_ones_have_groups_of_their_own(tmp_path, decay):
    config = descent.descent_config(tmp_path)
    config = replace(config, optim=replace(config.optim, decay=decay, lr=None, base_lr=1.6))
    method = descent.Descent()
    groups = parameter_groups(method, config)
    found = names_of(method, groups)
    spared, decayed = {"weight_decay": 0.0}, {"weight_decay": 0.125}
    fixed, held = {"fixed_lr": 0.1}, {"held_until": descent.RELEASE * 16 / 12_000}  # 1.6 x 16 / 256
    wanted = {
        "matrices": [
            (["encoder.bias", "neck.bias"], spared),
            (["encoder.weight", "neck.weight"], decayed),
            (["predictor.bias"], spared | fixed),
            (["predictor.weight"], decayed | fixed),
            (["prototypes.bias"], spared | held),
            (["prototypes.weight"], decayed | held),
        ],
        "all": [
            (["encoder.weight", "encoder.bias", "neck.weight", "neck.bias"], decayed),
            (["predictor.weight", "predictor.bias"], decayed | fixed),
            (["prototypes.weight", "prototypes.bias"], decayed | held),
        ],
    }[decay]
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert list(zip(found, options, strict=True)) == wanted


# --- on two ranks, interrupted twice ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of weights, and the reports by optimiser and stage."""
    folder = tmp_path_factory.mktemp("descent")
    return folder, training.run_case("stages", folder, ranks=2, script=descent.__file__)


def half_cosine(start, end, steps):
    return [end + (start - end) * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]


RATES = {
    "sgd": half_cosine(0.25, 0.0, STEPS),
    "adamw": [0.0, 0.25, *half_cosine(0.25, 0.0, STEPS - WARMUP)],
}
DECAYS = {"sgd": [0.125] * STEPS, "adamw": half_cosine(0.04, 0.4, STEPS)}


def textbook(name):
    """Weights and gradient norms by the formulas, in float64, poisoned steps left out and prototypes held."""
    optim = descent.OPTIMS[name]
    weights = {key: descent.start(p.shape).double() for key, p in descent.Descent().named_parameters()}
    moments = {key: [torch.zeros_like(value), torch.zeros_like(value), 0] for key, value in weights.items()}
    norms = {}
    for step in sorted(set(range(STEPS)) - set(POISON)):
        active = [key for key in weights if step >= RELEASE or not key.startswith("prototypes.")]
        gradients = {key: weights[key] - descent.target(step) for key in active}
        common = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
        norms[step] = common
        for key, gradient in gradients.items():
            norm = gradient.norm().item() if optim.clip_per_tensor else common
            gradient = gradient * min(1.0, optim.clip / (norm + 1e-6))
            lr = optim.lr if key.startswith("predictor.") else RATES[name][step]
            decay = DECAYS[name][step] if optim.decay == "all" or key.endswith("weight") else 0.0
            weights[key] = {"sgd": sgd, "adamw": adamw}[name](weights[key], gradient, moments[key], lr, decay)
    return weights, norms


def sgd(weight, gradient, moments, lr, decay):
    """SGD with momentum and L2 decay."""
    moments[0] = descent.SGD.momentum * moments[0] + gradient + decay * weight
    return weight - lr * moments[0]


def adamw(weight, gradient, moments, lr, decay):
    """AdamW (arXiv 1711.05101)."""
    (beta1, beta2), eps = descent.ADAMW.betas, descent.ADAMW.eps
    moments[0] = beta1 * moments[0] + (1 - beta1) * gradient
    moments[1] = beta2 * moments[1] + (1 - beta2) * gradient**2
    moments[2] += 1
    mean, square = moments[0] / (1 - beta1 ** moments[2]), moments[1] / (1 - beta2 ** moments[2])
    return weight * (1 - lr * decay) - lr * mean / (square.sqrt() + eps)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("stage", "0123")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
class TestLaunched:
    def test_steps_follow_the_formulas(self, runs, name, stage):
        folder, reports = runs
        expected, norms = textbook(name)
        weights, report = load_file(folder / f"{name}{stage}.safetensors"), reports[name + stage]
        assert [len(part) for part in report["applied"]] == [STOPS[0], STOPS[1] - STOPS[0], STEPS - STOPS[1]]
        assert list(chain(*report["applied"])) == [step not in POISON for step in range(STEPS)]
        assert {step: report["gradient_norm"][step] for step in norms} == pytest.approx(norms, rel=1e-5)
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=2e-6)

    def test_rates_are_logged_as_scheduled(self, runs, name, stage):
        report = runs[1][name + stage]
        assert report["lr"] == pytest.approx(RATES[name], abs=1e-12)
        assert report.get("weight_decay", DECAYS[name]) == pytest.approx(DECAYS[name])

    def test_what_is_held_does_not_move_by_a_bit(self, runs, name, stage):
        folder, _ = runs
        held = load_file(folder / f"{name}{stage} after {STOPS[0]}.safetensors")
        released = load_file(folder / f"{name}{stage}.safetensors")
        for key, value in held.items():
            assert torch.equal(value, descent.start(value.shape)) == key.startswith("prototypes.")
            assert not torch.equal(released[key], descent.start(value.shape))
