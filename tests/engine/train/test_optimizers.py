"""Which optimiser runs, what is refused, and in which words."""

import itertools
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
import training
from torch import nn

from vitrail.engine.train import ConfigError, OptimConfig
from vitrail.engine.train import optimizers as choice
from vitrail.engine.train.ds import _guard, deepspeed_config
from vitrail.kernels import multi_tensor_norm

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def guarded(built, optim):
    """Tell an optimiser what the norms of its gradients demand, as a step of stage 0 does; return the norms."""
    gradients = [p.grad for group in built.param_groups for p in group["params"]]
    norms = multi_tensor_norm(gradients)
    _guard(built, optim, gradients, norms, norms.found_inf)
    return norms


def configured(tmp_path, stage, **optim):
    return replace(training.tiny_config(tmp_path, zero_stage=stage), optim=OptimConfig(**optim))


@pytest.mark.parametrize(
    ("stage", "name", "expected"),
    [
        *((0, name, "vitrail") for name in ("adamw", "lars", "lamb")),
        *((stage, "adamw", "torch") for stage in (1, 2, 3)),
        *((stage, "sgd", "torch") for stage in range(4)),
    ],
)
def test_what_auto_takes(tmp_path, stage, name, expected):
    assert choice.choose(configured(tmp_path, stage, name=name)) == expected


@pytest.mark.parametrize(("stage", "name"), itertools.product((1, 2, 3), ("lars", "lamb")))
@pytest.mark.parametrize("implementation", ["auto", "vitrail"])
def test_trust_ratios_on_shards_are_refused(tmp_path, stage, name, implementation):
    with pytest.raises(ConfigError) as refusal:
        choice.choose(configured(tmp_path, stage, name=name, implementation=implementation))
    assert str(refusal.value) == (
        f"optim.name {name} of vitrail cannot run with train.zero_stage {stage}: {choice.TITLES[name]}'s trust ratios, "
        "one for each parameter, would be wrong on flat ZeRO shards; pass --train.zero-stage 0"
    )


@pytest.mark.parametrize(
    ("stage", "optim", "told"),
    [
        (
            2,
            {"implementation": "vitrail"},
            "adamw of vitrail .*zero_stage 2: .*no teachers; pass --train.zero-stage 0",
        ),
        (0, {"name": "lamb", "implementation": "torch"}, "PyTorch has no LAMB"),
        (2, {"name": "lamb", "implementation": "torch"}, "wrong on flat ZeRO shards.*PyTorch has no LAMB"),
        (0, {"name": "lars", "implementation": "apex"}, "apex has no LARS"),
        (
            0,
            {"name": "sgd", "implementation": "vitrail"},
            "sgd of vitrail .*zero_stage 0: SGD is taken from torch alone",
        ),
        (
            0,
            {"name": "lars", "decay": "all"},
            "decay all cannot run with optim.name lars: .*pass --optim.decay matrices",
        ),
        (0, {"name": "lamb", "implementation": "deepspeed"}, "FusedLamb runs on CUDA devices, not on the CPU"),
        (1, {"implementation": "apex"}, "apex is not installed"),
    ],
)
def test_a_choice_that_cannot_run_says_why_in_one_line(tmp_path, monkeypatch, stage, optim, told):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=told) as refusal:
        choice.choose(configured(tmp_path, stage, **optim))
    assert "\n" not in str(refusal.value)


def test_an_explicit_choice_that_can_run_is_taken(tmp_path):
    assert choice.choose(configured(tmp_path, 0, implementation="torch")) == "torch"
    for stage in range(4):
        assert choice.choose(configured(tmp_path, stage, implementation="deepspeed")) == "deepspeed"


def test_apex_needs_its_kernels_and_a_gpu(monkeypatch):
    def found(*names):
        monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: True if name in names else None)
        return choice.reasons("apex", name="adamw", stage=1, device=GPU)

    assert found() == ["apex is not installed"]
    assert found("apex") == ["apex is installed without its compiled kernels (amp_C)"]
    assert found("apex", "amp_C") == []
    assert choice.reasons("apex", name="adamw", stage=1, device=CPU) == ["it runs on CUDA devices, not on the CPU"]
    for name, stage in (("adamw", 0), ("adamw", 3), ("lamb", 0)):
        assert choice.reasons("apex", name=name, stage=stage, device=GPU) == []
    (told,) = choice.reasons("apex", name="lamb", stage=1, device=GPU)
    assert "trust ratios" in told


class Foreign(torch.optim.SGD):
    """An optimiser that knows nothing of flags, in the place of apex's or DeepSpeed's; keeps what it was built with."""

    def __init__(self, params, **options):
        self.options = options
        super().__init__(params, lr=options["lr"])


@pytest.mark.parametrize(
    ("implementation", "name", "module", "wanted"),
    [
        ("apex", "adamw", "apex.optimizers.FusedAdam", {"adam_w_mode": True}),
        ("apex", "lamb", "apex.optimizers.FusedLAMB", {"max_grad_norm": math.inf}),
        ("deepspeed", "adamw", "deepspeed.ops.adam.FusedAdam", {"adam_w_mode": True}),
        ("deepspeed", "lamb", "deepspeed.ops.lamb.FusedLamb", {}),
    ],
)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_foreign_optimisers_are_clipped_and_held_back(monkeypatch, implementation, name, module, wanted, per_tensor):
    path, cls = module.rsplit(".", 1)
    monkeypatch.setitem(sys.modules, path, types.SimpleNamespace(**{cls: Foreign}))
    optim = OptimConfig(name=name, betas=(0.8, 0.7), eps=1e-3, clip=1.0, clip_per_tensor=per_tensor)
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(9))]
    built = choice.build(implementation, optim, [{"params": parameters}], {})
    assert built.options == {"lr": 0.0, "betas": (0.8, 0.7), "eps": 1e-3, **wanted}
    built.param_groups[0]["lr"] = 1.0
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    assert guarded(built, optim).found_inf == 1
    built.step()
    assert not any(parameter.any() for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    guarded(built, optim)
    built.step()
    norms = [2.0, 3.0] if per_tensor else [13**0.5] * 2
    for parameter, norm in zip(parameters, norms, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, -1 / norm))


@pytest.mark.parametrize("stage", range(4))
def test_clipping_per_tensor_needs_a_limit(tmp_path, stage):
    with pytest.raises(ConfigError, match=r"without a limit does nothing: pass --optim\.clip"):
        choice.choose(configured(tmp_path, stage, clip_per_tensor=True))
    taken = choice.choose(configured(tmp_path, stage, clip=3.0, clip_per_tensor=True))
    assert taken == ("torch" if stage else "vitrail")


def test_gradients_in_bf16_need_shards(tmp_path):
    config = configured(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"reduce_dtype bf16 cannot run with train\.zero_stage 0: .*zero-stage 1, or"):
        choice.choose(replace(config, train=replace(config.train, reduce_dtype="bf16")))
    for stage in (1, 2, 3):
        assert choice.choose(training.tiny_config(tmp_path, zero_stage=stage, reduce_dtype="bf16")) == "torch"


@pytest.mark.parametrize("per_tensor", [False, True])
def test_deepspeed_clips_only_where_it_steps_and_by_the_common_norm(tmp_path, per_tensor):
    """In stage 0 it would read and write the gradients that the optimiser clips as it reads them."""
    configs = [configured(tmp_path, stage, clip=2.0, clip_per_tensor=per_tensor) for stage in range(4)]
    limits = [deepspeed_config(config, 1)["gradient_clipping"] for config in configs]
    assert limits == ([0.0] * 4 if per_tensor else [0.0, 2.0, 2.0, 2.0])


def test_overview_gives_every_implementation_a_state():
    rows = choice.overview(CPU)
    seen = [(name, stage) for name, stages, _ in rows for stage in stages.split(", ")]
    assert sorted(seen) == sorted(itertools.product(("adamw", "lars", "lamb", "sgd"), "0123"))
    for name, stages, states in rows:
        assert [implementation for implementation, _ in states] == list(choice.IMPLEMENTATIONS)
        active = [implementation for implementation, state in states if state == "active"]
        expected = "vitrail" if stages == "0" else "torch" if name in ("adamw", "sgd") else None
        assert active == ([expected] if expected else [])
        assert all(state for _, state in states)


def test_settings_reach_the_optimiser():
    weight = nn.Parameter(torch.ones(3))
    groups = [{"params": [weight], "weight_decay": 0.25}]
    optim = OptimConfig(
        betas=(0.8, 0.7), eps=1e-3, momentum=0.6, trust_coefficient=0.02, lars_variant="simclr", clip=2.0
    )
    for implementation, name in (
        *(("torch", name) for name in ("adamw", "sgd")),
        *(("vitrail", name) for name in ("adamw", "lars", "lamb")),
    ):
        built = choice.build(implementation, replace(optim, name=name), [dict(g) for g in groups], {})
        (group,) = built.param_groups
        wanted = {"weight_decay": 0.25, "lr": 0.0}
        if name == "lars":
            wanted |= {"momentum": 0.6, "trust_coefficient": 0.02, "eps": 1e-3, "lr_in_momentum": True}
        elif name == "sgd":
            wanted |= {"momentum": 0.6, "dampening": 0, "nesterov": False, "fused": True}
        else:
            wanted |= {"betas": (0.8, 0.7), "eps": 1e-3}
        assert {key: group[key] for key in wanted} == wanted
        if implementation == "vitrail":
            assert (built.max_grad_norm, built.clip_per_tensor, built.skip_nonfinite) == (2.0, False, True)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize(("clip", "per_tensor"), [(0.0, False), (0.5, False), (0.5, True), (100.0, True)])
def test_torchs_optimiser_is_told_to_clip(name, clip, per_tensor):
    """Its divisor and what the gradients are then make `g * min(1, clip / (norm + 1e-6))`."""
    params = [nn.Parameter(torch.zeros(size)) for size in (5, 1, 7)]
    built = choice.build("torch", OptimConfig(name=name), [{"params": params[:1]}, {"params": params[1:]}], {})
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) for p in params]
    for parameter, gradient in zip(params, gradients, strict=True):
        parameter.grad = gradient.clone()
    norms = guarded(built, OptimConfig(clip=clip, clip_per_tensor=per_tensor))
    common = torch.cat(gradients).double().norm().item()
    assert (norms.total.item(), norms.found_inf.item()) == (pytest.approx(common), 0.0)
    assert (built.found_inf if name == "adamw" else built.held_back).item() == 0.0
    for parameter, gradient in zip(params, gradients, strict=True):
        norm = gradient.double().norm().item() if per_tensor else common
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        taken = parameter.grad / getattr(built, "grad_scale", 1.0)
        torch.testing.assert_close(taken, gradient * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_torchs_optimiser_is_told_not_to_step(bad):
    parameter = nn.Parameter(torch.ones(4))
    built = choice.build("torch", OptimConfig(weight_decay=0.5, clip=1.0), [{"params": [parameter]}], {})
    built.param_groups[0]["lr"] = 1.0
    parameter.grad = torch.tensor([1.0, bad, 0.0, 0.0])
    assert guarded(built, OptimConfig(clip=1.0)).found_inf.item() == 1.0
    built.step()
    assert torch.equal(parameter, torch.ones(4))
    parameter.grad = torch.ones(4)
    guarded(built, OptimConfig(clip=1.0))
    built.step()
    assert (parameter < 1).all()


@pytest.mark.parametrize("bad_step", [0, 2])
def test_sgd_passes_over_a_step_with_its_momentum(bad_step):
    """Against the formula in float64. A first step that is skipped must leave no momentum either, or one of zeros."""
    optim = OptimConfig(name="sgd", momentum=0.9)
    weights = torch.linspace(-1, 1, 1000)
    parameter = nn.Parameter(weights.clone())
    built = choice.build("torch", optim, [{"params": [parameter], "weight_decay": 0.25}], {})
    built.param_groups[0]["lr"] = 0.5
    expected, velocity = weights.double(), torch.zeros(1000, dtype=torch.float64)
    for step in range(4):
        gradient = torch.sin(weights + step)
        parameter.grad = gradient.clone()
        if step == bad_step:
            parameter.grad[7] = math.inf
        else:
            velocity = 0.9 * velocity + gradient.double() + 0.25 * expected
            expected = expected - 0.5 * velocity
        before = parameter.detach().clone()
        guarded(built, optim)
        built.step()
        assert torch.equal(parameter, before) == (step == bad_step)
        assert bool(built.state[parameter]) == (step > 0 or bad_step > 0)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)
