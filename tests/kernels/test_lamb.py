"""LAMB: the op over lists, and the optimiser."""

import copy
import functools
import math

import pytest
import torch
from lists import (
    BOTH,
    IMPLS,
    clones,
    give_gradients,
    on_gpu,
    optimizer_lists,
    parameters,
    same,
    spacing,
    without_extension,
)

from vitrail.kernels import FusedLAMB, explain, lamb_
from vitrail.kernels.multi_tensor_norm.op import multi_tensor_norm

LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.95), 1e-6, 0.05
OPTIONS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
FREE = {**OPTIONS, "max_grad_norm": None}
lists = functools.partial(optimizer_lists, 2)
FORMS = (
    {},
    {"grad_averaging": False},
    {"weight_decay": 0.0},
    {"weight_decay": 0.0, "use_nvlamb": True},
    {"adapt": False},
)


class Loop:
    """LAMB as the paper's algorithm with bias correction, tensor by tensor; `scale` multiplies the gradients."""

    def __init__(self, params, *, grad_averaging=True, weight_decay=DECAY, use_nvlamb=False, adapt=True):
        self.params, self.decay, self.steps = params, weight_decay, 0
        self.gain = 1 - BETAS[0] if grad_averaging else 1.0
        self.adapts = adapt and (weight_decay != 0 or use_nvlamb)
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def step(self, scale=1.0, lr=LR):
        self.steps += 1
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            g = p.grad * scale
            m.copy_(BETAS[0] * m + self.gain * g)
            v.copy_(BETAS[1] * v + (1 - BETAS[1]) * g**2)
            m_hat, v_hat = m / (1 - BETAS[0] ** self.steps), v / (1 - BETAS[1] ** self.steps)
            update = m_hat / (v_hat.sqrt() + EPS) + self.decay * p
            trust = p.norm() / update.norm() if self.adapts and p.norm() > 0 and update.norm() > 0 else 1.0
            p -= lr * trust * update


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_reference_is_the_formula(form, clip):
    """In float64, with tensors of zeros and gradients of zeros, over two groups clipped together."""
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    ours[4].data.zero_()
    theirs[4].data.zero_()
    groups = [{"params": ours[:3]}, {"params": ours[3:]}]
    optimizer = FusedLAMB(groups, **{**OPTIONS, **form}, max_grad_norm=clip, impl="reference")
    other = Loop(theirs, **form)
    for step in range(5):
        give_gradients(step, ours, theirs)
        ours[1].grad.zero_()
        theirs[1].grad.zero_()
        norm = torch.cat([p.grad.flatten() for p in theirs]).norm()
        for group in optimizer.param_groups:
            group["lr"] = LR / (1 + step)
        optimizer.step()
        # The scale is kept in float32.
        scale = 1.0 if clip is None else (clip / (norm.float() + 1e-6)).double()
        other.step(scale, lr=LR / (1 + step))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, right, rtol=1e-12 if clip is None else 1e-6, atol=1e-13 if clip is None else 1e-8
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_many_steps_against_float64(impl, form):
    """The error is that of the formula in float32."""
    shapes = ((7, 11), (300,), (40, 50))
    ours, theirs = parameters(shapes), parameters(shapes)
    truth = parameters(shapes, dtype=torch.float64)
    optimizer = FusedLAMB(ours, **{**FREE, **form}, impl=impl)
    others = Loop(theirs, **form), Loop(truth, **form)
    for step in range(300):
        give_gradients(step, ours, theirs, truth)
        for other in (optimizer, *others):
            other.step()
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        allowed = 1.5 * (other.detach().double() - right.detach()).norm() + 1e-7 * right.detach().norm()
        assert (mine.detach().double() - right.detach()).norm() <= allowed


@pytest.mark.parametrize("impl", IMPLS)
def test_the_length_of_a_step_is_a_share_of_the_weights(impl):
    """A property that any wrong norm breaks: |step| = lr |p| for each tensor."""
    params = parameters()
    before = clones(params)
    optimizer = FusedLAMB(params, **OPTIONS, impl=impl)
    give_gradients(0, params)
    optimizer.step()
    for param, start in zip(params, before, strict=True):
        length, share = (param.detach() - start).double().norm(), LR * start.double().norm()
        assert length == pytest.approx(share.item(), rel=2e-5), param.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_without_ratios_it_is_adamw(impl):
    ours, theirs = parameters(), parameters()
    lamb = FusedLAMB(ours, **FREE, adapt=False, impl=impl)
    adamw = torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(10):
        give_gradients(step, ours, theirs)
        lamb.step()
        adamw.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(lamb.state[mine][key], adamw.state[other][key], rtol=1e-6, atol=1e-7)


@without_extension
@pytest.mark.parametrize("form", FORMS)
def test_awkward_sizes_against_the_reference(form):
    """Ratios may differ by some units in the last place, since norms are added up in another order."""
    ours, theirs, before = lists(), lists(), lists()
    scales = torch.linspace(0.1, 2, len(ours[0]))
    for given, impl in ((ours, "cuda"), (theirs, "reference")):
        lamb_(*given, **{**OPTIONS, **form}, scales=scales, impl=impl)
    assert same(ours[1], before[1])
    assert same(ours[4], theirs[4])
    for index, (mine, other) in enumerate(zip(ours[0], theirs[0], strict=True)):
        # Adam's direction and the decay may cancel in an update: its error is that of the larger part.
        allowed = spacing(other) + 2e-6 * (other - before[0][index]).abs() + 2e-6 * LR * before[0][index].norm()
        assert ((mine - other).abs() <= allowed).all(), index
        assert not torch.equal(mine, before[0][index])
    for key in (2, 3):
        for mine, other in zip(ours[key], theirs[key], strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-7, atol=2e-7)


@without_extension
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad_dtype", BOTH)
def test_bf16_parameters_are_widened_and_rounded_once(form, grad_dtype):
    narrow = lists(dtypes=(torch.bfloat16,), grad_dtypes=(grad_dtype,))
    wide = [[tensor.to(torch.float32, copy=True) for tensor in tensors] for tensors in narrow]
    for given in (narrow, wide):
        lamb_(*given, **{**OPTIONS, **form}, impl="cuda")
    assert same(narrow[0], [tensor.bfloat16() for tensor in wide[0]])
    for index in (2, 3, 4):
        assert same(narrow[index], wide[index])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_bf16_moments_are_rounded_before_they_are_used(impl, form):
    """Moments moved by hand and rounded; from them the step that float32 moments of these values would take."""
    given = lists(state_dtypes=(torch.bfloat16,))
    starts = clones(given[0])
    means, squares = ([tensor.float() for tensor in given[index]] for index in (2, 3))
    lamb_(*given, **{**OPTIONS, **form}, impl=impl)
    gain = 1.0 if form.get("grad_averaging") is False else 1 - BETAS[0]
    decay = form.get("weight_decay", DECAY)
    adapts = form.get("adapt", True) and (decay != 0 or form.get("use_nvlamb", False))
    for index, (param, start, grad) in enumerate(zip(given[0], starts, given[1], strict=True)):
        mean, square = BETAS[0] * means[index] + gain * grad, BETAS[1] * squares[index] + (1 - BETAS[1]) * grad**2
        for stored, value in ((given[2][index], mean), (given[3][index], square)):
            assert stored.dtype == torch.bfloat16
            assert ((stored.double() - value) / value).abs().max() < 2**-8 + 1e-4  # half a unit in the last place
        step = given[4][index].item()
        m, v = given[2][index].double() / (1 - BETAS[0] ** step), given[3][index].double() / (1 - BETAS[1] ** step)
        update = m / (v.sqrt() + EPS) + decay * start.double()
        ratio = start.double().norm() / update.norm() if adapts else 1.0
        expected = start.double() - LR * ratio * update
        torch.testing.assert_close(param.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_clipped_to_a_norm_of_1_unless_told_otherwise(impl):
    ours, theirs = parameters(), parameters()
    inside, before = FusedLAMB(ours, **OPTIONS, impl=impl), FusedLAMB(theirs, **FREE, impl=impl)
    give_gradients(0, ours, theirs)
    norm = multi_tensor_norm([p.grad for p in ours], impl=impl).total
    assert norm > 100
    inside.step()
    for param in theirs:
        param.grad.mul_(1.0 / (norm + 1e-6))
    before.step()
    assert same(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_gradients_spoil_their_element(impl):
    params = parameters()
    optimizer = FusedLAMB(params, **OPTIONS, impl=impl)
    give_gradients(0, params)
    params[1].grad[3, 5] = math.nan
    optimizer.step()
    assert [int(p.isnan().sum()) for p in params] == [0, 1, 0, 0, 0, 0, 0]
    assert params[1][3, 5].isnan()


def test_states_of_adamw_are_taken():
    """Its groups know none of LAMB's own options."""
    ours, theirs = parameters(), parameters()
    lamb, adamw = FusedLAMB(ours, **FREE, use_nvlamb=True), torch.optim.AdamW(theirs, **OPTIONS)
    give_gradients(0, theirs)
    adamw.step()
    lamb.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert lamb.param_groups[0]["use_nvlamb"] is True
    give_gradients(1, ours)
    lamb.step()
    assert {lamb.state[p]["step"].item() for p in ours} == {2}


def test_a_bf16_second_moment_does_not_fall():
    """What the README warns of, and what a smaller second beta changes."""
    for beta, falls in ((0.999, False), (0.95, True)):
        param = torch.nn.Parameter(torch.ones(4, 4))
        optimizer = FusedLAMB([param], betas=(0.9, beta), state_dtype=torch.bfloat16)
        param.grad = torch.ones(4, 4)
        optimizer.step()
        first = optimizer.state[param]["exp_avg_sq"].clone()
        param.grad.zero_()
        optimizer.step()
        assert (optimizer.state[param]["exp_avg_sq"] < first).all() == falls


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: FusedLAMB(p, betas=(0.9, 1.0)), ValueError, r"betas must be in \[0, 1\)"),
        (lambda p: FusedLAMB(p, eps=-1.0), ValueError, "eps and weight_decay must not be negative"),
        (lambda p: FusedLAMB(p, state_dtype=torch.float16), TypeError, "state_dtype must be torch.float32"),
        (lambda p: lamb_(p, p, [], p, [], lr=1.0, impl="reference"), ValueError, "exp_avgs holds 0 tensors"),
    ],
)
def test_wrong_options_say_what_is_wrong(build, error, message):
    with pytest.raises(error, match=message):
        build(parameters(((3,),)))


@without_extension
def test_explain_knows_the_op():
    params, steps = clones(parameters(((3,),))), [torch.zeros(())]
    moments = [[torch.zeros(3)] for _ in range(2)]
    assert explain("lamb_", params, params, *moments, steps, lr=0.1) == {"cuda": [], "reference": []}
    moments[1] = [torch.zeros(3, dtype=torch.bfloat16)]
    (reason,) = explain("lamb_", params, params, *moments, steps, lr=0.1)["cuda"]
    assert reason.startswith("exp_avgs[0] is float32, exp_avg_sqs[0] is bfloat16; give both the same dtype")


@on_gpu
@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_computes_as_the_cpu(shift, form):
    """The same bits but for the bias corrections, powers that may differ in the last place."""
    mixed = {"grad_dtypes": BOTH, "state_dtypes": (torch.float32, torch.float32, torch.bfloat16)}
    here, there = lists(**mixed), lists(**mixed, shift=shift, device="cuda")
    for _ in range(3):
        for given in (here, there):
            lamb_(*given, **{**OPTIONS, **form}, impl="cuda")
    for mine, other in zip(here[0], there[0], strict=True):
        torch.testing.assert_close(mine, other.cpu(), rtol=1e-6, atol=1e-6)
    for index in (2, 3, 4):
        assert same(here[index], [tensor.cpu() for tensor in there[index]])
