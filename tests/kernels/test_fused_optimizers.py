"""What the fused optimisers have in common: each of them in every form, on the extension and on the reference."""

import copy
import math
from itertools import chain

import pytest
import torch
from lists import (
    BOTH,
    IMPLS,
    clones,
    give_gradients,
    optimizer_lists,
    parameters,
    randoms,
    same,
    threads,
    without_extension,
)

from vitrail.kernels import FusedAdamWEMA, FusedLAMB, FusedLARS, UnsupportedError, adamw_ema_, lamb_, lars_
from vitrail.kernels.lars.optimizer import VARIANTS
from vitrail.kernels.multi_tensor_norm.clip import clip_scales
from vitrail.kernels.multi_tensor_norm.op import multi_tensor_norm

OPTIONS = {  # which the ops take as well
    "AdamW": {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05},
    "LARS": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.05},
    "LAMB": {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.05},
}
CLASSES = {"AdamW": FusedAdamWEMA, "LARS": FusedLARS, "LAMB": FusedLAMB}
OPS = {"AdamW": adamw_ema_, "LARS": lars_, "LAMB": lamb_}
FORMS = {
    "AdamW": ("AdamW", {}),
    **{f"LARS of {variant}": ("LARS", {"variant": variant}) for variant in VARIANTS},
    "LAMB": ("LAMB", {}),
    "LAMB with bf16 moments": ("LAMB", {"state_dtype": torch.bfloat16}),
}
GROUPS = {  # options of two groups
    "AdamW": ({"weight_decay": 0.0}, {"lr": 1e-2}),
    "LARS": ({"exclude_1d": False}, {"lr": 0.1, "denominator": "parts", "lr_in_momentum": True}),
    "LAMB": ({}, {"lr": 0.1, "weight_decay": 0.0, "grad_averaging": False, "betas": (0.5, 0.9)}),
}
# AdamW computes each element by itself; norms are added up in an order that depends on the implementation.
TOLERANCES = {  # between two implementations
    "AdamW": {"rtol": 2**-23, "atol": 2e-9},
    "LARS": {"rtol": 1e-6, "atol": 1e-7},
    "LAMB": {"rtol": 1e-5, "atol": 1e-6},
}

every_impl = pytest.mark.parametrize("impl", IMPLS)
every_form = pytest.mark.parametrize("form", FORMS)
every_optimizer = pytest.mark.parametrize("name", CLASSES)


def build(name, params, **options):
    """The optimiser, and the averages that AdamW moves as well."""
    averages = clones(params) if name == "AdamW" else []
    if averages:
        options |= {"teacher": dict(zip(params, averages, strict=True)), "ema_momentum": 0.99}
    return CLASSES[name](params, **{**OPTIONS[name], **options}), averages


def states(optimizer):
    """All tensors of its state."""
    return [value for state in optimizer.state.values() for value in state.values()]


def new_states(name, params):
    """Moments of zeros and, but for LARS, steps from 0 to 6 in turn."""
    moments = [[torch.zeros_like(p) for p in params] for _ in range(1 if name == "LARS" else 2)]
    return moments if name == "LARS" else [*moments, [torch.tensor(float(i % 7)) for i in range(len(params))]]


@every_impl
@pytest.mark.parametrize("per_tensor", [False, True])
@every_optimizer
def test_clipping_inside_is_clipping_before(name, per_tensor, impl):
    """By the norm of all groups, or each gradient by its own; LARS makes two calls of the first group."""
    ours, theirs = parameters(), parameters()
    inside, before = (
        CLASSES[name]([{"params": p[:3]}, {"params": p[3:], "lr": 0.01}], **OPTIONS[name], **clipping, impl=impl)
        for p, clipping in (
            (ours, {"max_grad_norm": 5.0, "clip_per_tensor": per_tensor}),
            (theirs, {"max_grad_norm": None}),
        )
    )
    for step in range(3):
        give_gradients(step, ours, theirs)
        grads = clones(p.grad for p in ours)
        inside.step()
        assert same([p.grad for p in ours], grads)  # gradients are not written
        norms = multi_tensor_norm(grads, impl=impl)
        assert inside.norms.total == norms.total
        assert norms.total > 100
        scales = clip_scales(norms, 5.0, per_tensor=per_tensor)
        assert per_tensor == (scales.unique().numel() > 1)
        for param, scale in zip(theirs, scales.expand(len(theirs)), strict=True):
            param.grad.mul_(scale)
        before.step()
    assert same(ours, theirs)


@every_impl
@pytest.mark.parametrize("limit", [None, 5.0])
@every_optimizer
def test_the_flag_and_the_loss_scale_of_a_gradient_scaler(name, limit, impl):
    """1024 is a power of two: it changes no digits."""
    ours, theirs = parameters(), parameters()
    scaled, averages = build(name, ours, max_grad_norm=limit, impl=impl)
    plain, _ = build(name, theirs, max_grad_norm=limit, impl=impl)
    give_gradients(0, ours, theirs)
    for param in ours:
        param.grad.mul_(1024)
    before = clones([*ours, *averages])
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    scaled.step()
    assert same([*ours, *averages], before)
    assert {value.count_nonzero().item() for value in states(scaled)} == {0}
    scaled.found_inf = torch.tensor(0.0)
    scaled.step()
    plain.step()
    assert same(ours, theirs)
    assert not same(ours, before[: len(ours)])
    assert limit is None or scaled.norms.total == plain.norms.total


@every_impl
@every_form
def test_steps_of_infinite_gradients_can_be_skipped(form, impl):
    name, options = FORMS[form]
    params = parameters()
    optimizer, averages = build(name, params, **options, skip_nonfinite=True, impl=impl)
    before = clones([*params, *averages])
    give_gradients(0, params)
    params[1].grad[3, 5] = math.inf
    optimizer.step()
    assert optimizer.norms.found_inf == 1
    assert same([*params, *averages], before)
    assert {value.count_nonzero().item() for value in states(optimizer)} == {0}
    give_gradients(0, params)
    optimizer.step()
    assert optimizer.norms.found_inf == 0
    assert not same(params, before[: len(params)])


@every_impl
@every_optimizer
def test_parameters_without_gradient_stay(name, impl):
    params = parameters()
    before = clones(params)
    for limit in (None, 1.0):
        groups = [{"params": []}, {"params": params}]
        optimizer = CLASSES[name](groups, **OPTIONS[name], max_grad_norm=limit, impl=impl)
        optimizer.step()
        assert same(params, before)
    give_gradients(0, params)
    params[0].grad = params[4].grad = None
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [i in (0, 2, 4) for i in range(7)]
    assert [p in optimizer.state for p in params] == [i not in (0, 4) for i in range(7)]


@every_impl
@pytest.mark.parametrize("dtype", BOTH)
@every_form
def test_a_loaded_state_keeps_its_dtypes_and_goes_on_as_the_saved_one(form, dtype, impl):
    name, options = FORMS[form]
    whole, first = parameters(dtype=dtype), parameters(dtype=dtype)
    going, saved = (CLASSES[name](params, **OPTIONS[name], **options, impl=impl) for params in (whole, first))
    for step in range(2):
        give_gradients(step, whole, first)
        going.step()
        saved.step()
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = CLASSES[name](second, lr=1.0, impl=impl)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    dtypes = {value.dtype for state in resumed.state.values() for key, value in state.items() if key != "step"}
    assert dtypes == {options.get("state_dtype", torch.float32)}
    assert same(states(resumed), states(saved))
    for step in range(2, 4):
        give_gradients(step, whole, second)
        going.step()
        resumed.step()
    assert same(whole, second)
    assert [value.dtype for value in states(resumed)] == [value.dtype for value in states(going)]
    assert same(states(resumed), states(going))
    assert name == "LARS" or {resumed.state[p]["step"].item() for p in second} == {4}


@every_impl
@every_optimizer
def test_groups_have_their_own_options_and_may_be_added(name, impl):
    """Against the op for each tensor."""
    ours, theirs = parameters(), parameters()
    first, second = GROUPS[name]
    optimizer = CLASSES[name]([{"params": ours[:2], **first}], **OPTIONS[name], max_grad_norm=None, impl=impl)
    optimizer.add_param_group({"params": ours[2:], **second})
    moments = [new_states(name, [param]) for param in theirs]
    for step in range(3):
        optimizer.param_groups[0]["lr"] = rate = OPTIONS[name]["lr"] / (1 + step)
        give_gradients(step, ours, theirs)
        optimizer.step()
        for index, param in enumerate(theirs):
            options = {**OPTIONS[name], **({**first, "lr": rate} if index < 2 else second)}
            options.pop("exclude_1d", None)
            OPS[name]([param], [param.grad], *moments[index], **options, impl=impl)
    assert same(ours, theirs)


@every_impl
@every_form
def test_the_learning_rate_may_be_a_tensor(form, impl):
    name, options = FORMS[form]
    ours, theirs = parameters(), parameters()
    start = OPTIONS[name]["lr"]
    lr = torch.tensor(start, dtype=torch.float64)
    tensors, numbers = build(name, ours, lr=lr, **options, impl=impl), build(name, theirs, **options, impl=impl)
    for step in range(3):
        lr.fill_(start / (step + 1))
        numbers[0].param_groups[0]["lr"] = start / (step + 1)
        give_gradients(step, ours, theirs)
        tensors[0].step()
        numbers[0].step()
    assert same([*ours, *tensors[1]], [*theirs, *numbers[1]])


@without_extension
@every_optimizer
def test_transposed_parameters_run_in_the_kernel_and_others_in_the_reference(name, caplog):
    def make(transposed):
        weight, grad = (randoms(((6, 4),), seed=seed)[0].t() for seed in (1, 2))
        param = torch.nn.Parameter(weight if transposed else weight.contiguous())
        param.grad = grad if transposed else grad.contiguous()
        return param

    def step(param, **options):
        CLASSES[name]([param], **OPTIONS[name], **options).step()

    ours, straight, other = make(True), make(False), make(True)
    before = straight.detach().clone()
    step(ours, impl="cuda")
    step(straight, impl="cuda")
    assert not torch.equal(straight, before)
    close = TOLERANCES["AdamW"] if name == "AdamW" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(ours, straight, **close)
    assert name != "AdamW" or torch.equal(ours, straight)
    other.grad = torch.zeros(6, 8)[:, ::2].t().copy_(straight.grad)
    with pytest.raises(UnsupportedError, match=r"grads\[0\] has sizes .* give both the same layout"):
        step(other, max_grad_norm=None, impl="cuda")
    assert torch.equal(other, before)
    step(other)
    torch.testing.assert_close(other, straight, **close)
    assert f"{OPS[name].__name__} (forward): reference, not cuda, because grads[0] has sizes" in caplog.text


@without_extension
@every_optimizer
def test_results_do_not_depend_on_threads_or_runs(name):
    results = []
    for run in range(20):
        params = parameters()
        optimizer, averages = build(name, params, max_grad_norm=2.0, impl="cuda")
        give_gradients(0, params)
        with threads(1 + run % 2):
            optimizer.step()
        results.append([*params, *averages, *states(optimizer)])
    assert all(same(results[0], other) for other in results[1:])


@every_impl
@pytest.mark.parametrize("shift", [0, 1, 3])
@every_optimizer
def test_each_tensor_is_as_if_it_were_alone_whatever_its_alignment(name, shift, impl):
    """All mixtures of dtypes in one call."""
    mixed = {"dtypes": BOTH, "grad_dtypes": (torch.float32, torch.float32, torch.bfloat16)}
    if name == "LAMB":
        mixed["state_dtypes"] = (torch.float32, torch.float32, torch.float32, torch.bfloat16)
    moments = 1 if name == "LARS" else 2
    together, apart = optimizer_lists(moments, **mixed, shift=shift), optimizer_lists(moments, **mixed)
    OPS[name](*together, **OPTIONS[name], impl=impl)
    for alone in zip(*apart, strict=True):
        OPS[name](*([tensor] for tensor in alone), **OPTIONS[name], impl=impl)
    for mine, other in zip(chain(*together), chain(*apart), strict=True):
        if impl == "cuda" or shift == 0:
            assert torch.equal(mine, other)
        else:  # PyTorch's own loops see where a tensor begins
            tolerance = 1e-6 if mine.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=1e-6)


@without_extension
@every_optimizer
def test_more_tensors_than_a_launch_carries_and_autograd_learns_of_the_change(name):
    """2,100 tensors, more than the step counters of two launches, and different steps."""
    params, grads = randoms([2] * 2100, seed=1), randoms([2] * 2100, seed=2)
    others = clones(params)
    ours, theirs = new_states(name, params), new_states(name, params)
    changed = [params[0], params[-1], *(tensors[0] for tensors in ours)]
    versions, untouched = [tensor._version for tensor in changed], grads[0]._version
    OPS[name](params, grads, *ours, **OPTIONS[name], impl="cuda")
    OPS[name](others, grads, *theirs, **OPTIONS[name], impl="reference")
    assert all(tensor._version > version for tensor, version in zip(changed, versions, strict=True))
    assert grads[0]._version == untouched
    assert name == "LARS" or same(ours[-1], theirs[-1])
    torch.testing.assert_close(torch.stack(params), torch.stack(others), **TOLERANCES[name])


@every_optimizer
def test_the_closure_is_called_with_gradients_enabled(name):
    params = parameters(((3, 2),))
    optimizer, _ = build(name, params)

    def closure():
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    before = clones(params)
    assert optimizer.step(closure) == (before[0] ** 2).sum()
    assert not same(params, before)


@every_optimizer
def test_sparse_gradients_are_refused(name):
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    message = rf"{CLASSES[name].__name__} takes dense gradients, got layout torch\.sparse_coo .* shape \[5, 2\]"
    with pytest.raises(RuntimeError, match=message):
        CLASSES[name](table.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, or None"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
@every_optimizer
def test_wrong_options_say_what_is_wrong(name, options, message):
    with pytest.raises(ValueError, match=message):
        CLASSES[name](parameters(((3,),)), **{"lr": 0.1, **options})


@every_optimizer
def test_complex_parameters_are_refused(name):
    with pytest.raises(TypeError, match="real floating dtype"):
        CLASSES[name]([torch.zeros(2, dtype=torch.complex64)], lr=0.1)


@every_form
def test_a_copy_goes_on_as_the_original(form):
    """torch's own copies forget everything but states and groups."""
    name, options = FORMS[form]
    params = parameters(((3,), (7, 5)))
    optimizer, averages = build(name, params, max_grad_norm=0.5, clip_per_tensor=True, skip_nonfinite=True, **options)
    give_gradients(0, params)
    optimizer.step()
    others, other, other_averages = copy.deepcopy((params, optimizer, averages))
    for step in (1, 2):
        give_gradients(step, params, others)
        optimizer.step()
        other.step()
    assert same(params, others)
    assert same(states(optimizer), states(other))
    assert same(averages, other_averages)
    assert not averages or not same(averages, params)


@every_optimizer
def test_an_update_compiles_as_one_graph(name):
    def lists():
        params = randoms((5, (3, 4)), seed=1)
        return params, randoms((5, (3, 4)), seed=2), *new_states(name, params)

    def update(*given):
        OPS[name](*given, **OPTIONS[name])

    compiled, eager = lists(), lists()
    torch.compile(update, fullgraph=True)(*compiled)
    update(*eager)
    assert all(same(mine, other) for mine, other in zip(compiled, eager, strict=True))
    assert not same(compiled[0], lists()[0])
