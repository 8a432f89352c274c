"""AdamW with a moving average: the op over lists, and the optimiser."""

import copy
import math

import pytest
import torch
from lists import (
    IMPLS,
    SHAPES,
    clones,
    give_gradients,
    parameters,
    randoms,
    same,
    spacing,
    threads,
    without_extension,
)

from vitrail.kernels import FusedAdamWEMA, adamw_ema_, explain

LR, BETAS, EPS, DECAY, MOMENTUM = 3e-3, (0.9, 0.95), 1e-8, 0.05, 0.99
OPTIONS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}


def with_teacher(params, **options):
    """The optimiser with a copy of its parameters as teacher; and that."""
    teacher = clones(params)
    pairs = dict(zip(params, teacher, strict=True))
    return FusedAdamWEMA(params, **{**OPTIONS, "teacher": pairs, "ema_momentum": MOMENTUM, **options}), teacher


@without_extension
@threads(1)
def test_it_is_torchs_fused_adamw_and_lerp_bit_for_bit():
    """Over many steps, without any tolerance: weights, moments and averages.

    Sizes are multiples of the CPU's vectors, and one thread works: PyTorch rounds the elements behind its last vector
    differently.
    """
    shapes = ((64,), (64, 128), (0, 4), (20_480,), (16, 4, 8, 8))
    ours, theirs = parameters(shapes), parameters(shapes)
    fused, teacher = with_teacher(ours, impl="cuda")
    torchs, averages = torch.optim.AdamW(theirs, **OPTIONS, fused=True), clones(theirs)
    for step in range(100):
        give_gradients(step, ours, theirs)
        fused.step()
        torchs.step()
        torch._foreach_lerp_(averages, [p.detach() for p in theirs], 1 - MOMENTUM)
    assert same(ours, theirs)
    assert same(teacher, averages)
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(fused.state[mine][key], torchs.state[other][key])


def within_an_ulp(left, right, before):
    """Whether values agree to a unit in the last place, plus two of the step for the roundings in it."""
    size = torch.maximum(right.abs(), before.abs())
    return bool(((left - right).abs() <= spacing(size) + 2 * spacing(torch.tensor(LR))).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_one_step_is_torchs_default_adamw_within_an_ulp(impl):
    """PyTorch's loop takes its square root from a library that does not round it to nearest."""
    ours, theirs = parameters(), parameters()
    fused, teacher = with_teacher(ours, impl=impl)
    torchs = torch.optim.AdamW(theirs, **OPTIONS, foreach=False)
    averages, before = clones(theirs), clones(theirs)
    give_gradients(0, ours, theirs)
    fused.step()
    torchs.step()
    torch._foreach_lerp_(averages, [p.detach() for p in theirs], 1 - MOMENTUM)
    for mine, other, start in zip([*ours, *teacher], [*theirs, *averages], before * 2, strict=True):
        assert within_an_ulp(mine.detach(), other.detach(), start)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_thousand_steps_against_float64(impl):
    """The error is that of PyTorch's own float32, and no bf16 average could follow."""
    shapes = ((7, 11), (300,))
    ours, theirs = parameters(shapes), parameters(shapes)
    truth = parameters(shapes, dtype=torch.float64)
    fused, teacher = with_teacher(ours, impl=impl, ema_momentum=0.9999)
    exact, exact_teacher = with_teacher(truth, impl="reference", ema_momentum=0.9999)
    torchs = torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(1000):
        give_gradients(step, ours, theirs, truth)
        for optimizer in (fused, torchs, exact):
            optimizer.step()
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        allowed = 1.5 * (other.detach().double() - right.detach()).norm() + 1e-9
        assert (mine.detach().double() - right.detach()).norm() <= allowed
    for mine, right in zip(teacher, exact_teacher, strict=True):
        assert (mine.double() - right).norm() <= 5e-6 * right.norm()


def test_the_reference_is_the_formula():
    """Against AdamW written out in float64 for single numbers."""
    params, grads = [torch.tensor([0.7, -1.3], dtype=torch.float64)], [torch.tensor([0.2, 0.5], dtype=torch.float64)]
    m, v, t = ([torch.zeros(2, dtype=torch.float64)] for _ in range(3))
    steps = [torch.zeros(())]
    p, first, second, average = [0.7, -1.3], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for step in (1, 2, 3):
        adamw_ema_(params, grads, m, v, steps, **OPTIONS, teachers=t, ema_momentum=0.9, impl="reference")
        for i, g in enumerate((0.2, 0.5)):
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * g
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * g * g
            ratio = first[i] / (1 - BETAS[0] ** step) / (math.sqrt(second[i] / (1 - BETAS[1] ** step)) + EPS)
            p[i] = p[i] - LR * DECAY * p[i] - LR * ratio
            average[i] = 0.9 * average[i] + 0.1 * p[i]
    assert params[0].tolist() == pytest.approx(p, rel=1e-12)
    assert t[0].tolist() == pytest.approx(average, rel=1e-12)
    assert steps[0] == 3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "kinds", [("teacher", "param", "teacher copy"), ("param",), ("teacher", "param"), ("teacher", "teacher copy"), ()]
)
def test_copies_are_what_they_copy(impl, kinds):
    params = parameters()
    teacher = clones(params)
    empty = [[torch.full_like(p, math.nan, dtype=torch.bfloat16) for p in params] for _ in range(2)]
    pairs = {
        "teacher": dict(zip(params, teacher, strict=True)) if "teacher" in kinds else None,
        "param_copies": dict(zip(params, empty[0], strict=True)) if "param" in kinds else None,
        "teacher_copies": dict(zip(params, empty[1], strict=True)) if "teacher copy" in kinds else None,
    }
    fused = FusedAdamWEMA(params, **OPTIONS, **pairs, ema_momentum=MOMENTUM, impl=impl)
    alone = parameters()
    plain, plain_teacher = with_teacher(alone, impl=impl)
    for step in range(3):
        give_gradients(step, params, alone)
        fused.step()
        plain.step()
    assert same(params, alone)
    assert same(teacher, plain_teacher if "teacher" in kinds else clones(parameters()))
    if "param" in kinds:
        assert same(empty[0], [p.bfloat16() for p in params])
    if "teacher copy" in kinds:
        assert same(empty[1], [t.bfloat16() for t in teacher])


@without_extension
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_bf16_parameters_are_rounded_once_and_averaged_as_stored(grad_dtype):
    params = parameters(dtype=torch.bfloat16)
    grads = [g.to(grad_dtype) for g in randoms(SHAPES, seed=9)]
    teacher, wide = [p.detach().float() for p in params], [p.detach().float() for p in params]
    results = []
    for impl, values in (("cuda", params), ("reference", wide)):
        m, v = [torch.zeros_like(w) for w in wide], [torch.zeros_like(w) for w in wide]
        steps = [torch.zeros(()) for _ in wide]
        for _ in range(2):
            for value in values if impl == "reference" else []:
                value.copy_(value.bfloat16())
            averages = {"teachers": teacher, "ema_momentum": 0.5} if impl == "cuda" else {}
            adamw_ema_([p.detach() for p in values], grads, m, v, steps, **OPTIONS, **averages, impl=impl)
        results.append([value.detach().bfloat16() for value in values])
    assert same(*results)
    again, moved = [p.detach().float() for p in parameters(dtype=torch.bfloat16)], parameters(dtype=torch.bfloat16)
    optimizer = FusedAdamWEMA(moved, **OPTIONS, impl="cuda")
    for _ in range(2):
        for param, grad in zip(moved, grads, strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()
        again = [torch.lerp(a, p.detach().float(), 0.5) for a, p in zip(again, moved, strict=True)]
    if grad_dtype == torch.bfloat16:
        assert same(teacher, again)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_gradients_spoil_their_element_and_its_average(impl):
    params = parameters()
    optimizer, teacher = with_teacher(params, impl=impl)
    give_gradients(0, params)
    params[1].grad[3, 5] = math.nan
    optimizer.step()
    assert params[1][3, 5].isnan()
    assert teacher[1][3, 5].isnan()
    assert [int(p.isnan().sum()) for p in params] == [int(t.isnan().sum()) for t in teacher] == [0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_teachers_of_parameters_without_gradient_move(impl):
    params = parameters()
    optimizer, teacher = with_teacher(params, impl=impl)
    for average in teacher:
        average.zero_()
    give_gradients(0, params)
    params[0].grad = params[4].grad = None
    before = clones(params)
    optimizer.step()
    for index in (0, 4):
        assert torch.equal(teacher[index], torch.lerp(torch.zeros_like(before[index]), before[index], 1 - MOMENTUM))
    assert torch.equal(teacher[1], torch.lerp(torch.zeros_like(before[1]), params[1].detach(), 1 - MOMENTUM))


@pytest.mark.parametrize("impl", IMPLS)
def test_some_parameters_with_and_some_without_teacher(impl):
    params, others = parameters(), parameters()
    teacher = {params[i]: params[i].detach().clone() for i in (1, 4)}
    optimizer = FusedAdamWEMA(params, **OPTIONS, teacher=teacher, max_grad_norm=3.0, clip_per_tensor=True, impl=impl)
    everyone, averages = with_teacher(others, ema_momentum=0.996, max_grad_norm=3.0, clip_per_tensor=True, impl=impl)
    give_gradients(0, params, others)
    optimizer.step()
    everyone.step()
    assert same(params, others)
    assert same(teacher.values(), [averages[1], averages[4]])


@pytest.mark.parametrize("impl", IMPLS)
def test_states_travel_to_and_from_torchs_adamw(impl):
    ours, theirs = parameters(), parameters()
    fused, torchs = FusedAdamWEMA(ours, **OPTIONS, impl=impl), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(4):
        if step == 2:  # exchange
            states = copy.deepcopy(fused.state_dict()), copy.deepcopy(torchs.state_dict())
            for target, state in ((torchs, states[0]), (fused, states[1])):
                groups = zip(state["param_groups"], target.state_dict()["param_groups"], strict=True)
                state["param_groups"] = [{**own, "params": group["params"]} for group, own in groups]
                target.load_state_dict(state)
        give_gradients(step, ours, theirs)
        fused.step()
        torchs.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        assert fused.state[mine]["step"] == 4


@pytest.mark.parametrize("impl", IMPLS)
def test_the_averages_momentum_may_be_a_tensor(impl):
    ours, theirs = parameters(), parameters()
    momentum = torch.tensor(MOMENTUM, dtype=torch.float64)
    tensors, teacher = with_teacher(ours, ema_momentum=momentum, impl=impl)
    numbers, averages = with_teacher(theirs, impl=impl)
    for step in range(3):
        momentum.fill_(1 - 0.1**step)
        numbers.param_groups[0]["ema_momentum"] = 1 - 0.1**step
        give_gradients(step, ours, theirs)
        tensors.step()
        numbers.step()
    assert same(ours, theirs)
    assert same(teacher, averages)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: FusedAdamWEMA(p, betas=(0.9, 1.0)), ValueError, r"betas must be in \[0, 1\)"),
        (lambda p: FusedAdamWEMA(p, weight_decay=-0.1), ValueError, "weight_decay must not be negative"),
        (lambda p: FusedAdamWEMA(p, ema_momentum=1.5), ValueError, r"ema_momentum must be in \[0, 1\], got 1.5"),
        (
            lambda p: FusedAdamWEMA(p, teacher={p[0]: torch.zeros(4)}),
            ValueError,
            r"shape \[4\] for a parameter of \[3\]",
        ),
        (
            lambda p: FusedAdamWEMA(p, teacher={p[0]: torch.zeros(3, dtype=torch.bfloat16)}),
            TypeError,
            "teacher must be torch.float32 or torch.float64, got torch.bfloat16",
        ),
        (
            lambda p: FusedAdamWEMA(p, teacher={p[0]: torch.zeros(3, requires_grad=True)}),
            ValueError,
            "requires a gradient",
        ),
        (
            lambda p: FusedAdamWEMA(p, teacher_copies={p[0]: torch.zeros(3, dtype=torch.bfloat16)}),
            ValueError,
            "parameters that have no teacher",
        ),
    ],
)
def test_wrong_options_say_what_is_wrong(build, error, message):
    with pytest.raises(error, match=message):
        build(parameters(((3,),)))


@without_extension
def test_explain_knows_the_op():
    params = clones(parameters(((3,),)))
    state = [[torch.zeros(3)] for _ in range(2)]
    reasons = explain("adamw_ema_", params, params, *state, [torch.zeros(())], lr=0.1)
    assert reasons == {"cuda": [], "reference": []}
    reasons = explain("adamw_ema_", params, params, *state, [torch.zeros((), dtype=torch.int64)], lr=0.1)
    assert reasons["cuda"] == ["a step must be float32, got int64; convert it first"]
