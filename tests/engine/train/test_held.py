"""Parameters that are held: what each optimiser makes of them in one process, and what a method may not ask for."""

import types
from dataclasses import replace

import descent
import pytest
import torch

from vitrail.engine.train import OptimConfig
from vitrail.engine.train import optimizers as choice
from vitrail.engine.train.held import HeldParameters
from vitrail.engine.train.param_groups import HELD, parameter_groups, releases

RELEASED = descent.RELEASE * 16 / 12_000
OPTIMISERS = [("vitrail", "adamw"), ("vitrail", "lars"), ("vitrail", "lamb"), ("torch", "adamw"), ("torch", "sgd")]


class Counting(torch.optim.SGD):
    """Counts the steps of a group, as apex's AdamW does, and steps as far as the count says."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["lr"] = 1.0 / group["step"]
        super().step(closure)


def engine_of(method, tmp_path, implementation, name):
    optim = OptimConfig(name=name, weight_decay=0.1, decay="matrices")
    config = replace(descent.descent_config(tmp_path), optim=optim)
    groups = parameter_groups(method, config)
    if implementation == "counting":
        optimizer = Counting(groups, lr=1.0, momentum=0.9)
    else:
        optimizer = choice.build(implementation, optim, groups, {})
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    return types.SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 0)


def step(method, engine, goal):
    sum(network(goal) for network in method.children()).backward()
    norm = torch.cat([p.grad.flatten() for p in method.prototypes.parameters()]).norm()
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return norm


@pytest.mark.parametrize(("implementation", "name"), [*OPTIMISERS, ("counting", "sgd")])
def test_a_released_parameter_starts_afresh(tmp_path, implementation, name):
    method, fresh = descent.Descent(), descent.Descent()
    engine = engine_of(method, tmp_path, implementation, name)
    held = HeldParameters(method, engine)
    for epoch in (0.0, RELEASED / 2):
        held.update(epoch)
        assert step(method, engine, 0.3) == 0.0
    for parameter in method.prototypes.parameters():
        assert torch.equal(parameter, descent.start(parameter.shape))
        assert not engine.optimizer.state.get(parameter)
    assert not torch.equal(method.neck.weight, descent.start(method.neck.weight.shape))
    untouched = engine_of(fresh, tmp_path, implementation, name)
    held.update(RELEASED)
    for goal in (0.7, -0.2):
        assert step(method, engine, goal) == step(fresh, untouched, goal) > 0.0
    for parameter, other in zip(method.prototypes.parameters(), fresh.prototypes.parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert not torch.equal(parameter, descent.start(parameter.shape))


def test_each_is_released_in_its_own_epoch(tmp_path):
    method = descent.Descent()
    method.held = lambda: [
        (1.0, [*method.prototypes.parameters()]),
        (2.0, [method.prototypes.bias, method.neck.weight]),
        (0.0, [*method.encoder.parameters()]),
    ]
    engine = engine_of(method, tmp_path, "torch", "adamw")
    held = HeldParameters(method, engine)

    def moved(epoch):
        before = {name: p.detach().clone() for name, p in method.named_parameters()}
        held.update(epoch)
        step(method, engine, 0.3)
        return {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}

    everything = {name for name, _ in method.named_parameters()}
    late = {"prototypes.bias", "neck.weight"}
    assert moved(0.5) == everything - late - {"prototypes.weight"}
    assert moved(1.0) == everything - late
    assert moved(2.0) == everything


def test_what_is_not_trained_needs_no_holding(tmp_path):
    method = descent.Descent()
    method.prototypes.requires_grad_(False)
    held = HeldParameters(method, engine_of(method, tmp_path, "torch", "adamw"))
    held.update(0.0)
    assert not releases(method)
    assert not any(HELD in group for group in parameter_groups(method, descent.descent_config(tmp_path)))
