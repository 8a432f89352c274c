"""LARS: the op over lists, and the optimiser in the forms that other codes give it."""

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
    threads,
    without_extension,
)

from vitrail.kernels import FusedLARS, explain, lars_
from vitrail.kernels.lars.optimizer import VARIANTS

LR, MOMENTUM, DECAY = 0.3, 0.9, 0.05
OPTIONS = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
lists = functools.partial(optimizer_lists, 1)


def wave(shape, factor, offset=0.0):
    """sin(factor i + offset) of the flat index i, computed in float64."""
    values = torch.sin(factor * torch.arange(math.prod(shape), dtype=torch.float64) + offset)
    return values.float().view(shape)


@torch.no_grad()
def loop(params, momenta, *, variant, lr, momentum, decay, trust=0.001, eps=1e-8):
    """One step of a variant, tensor by tensor, as the codes that they are named after put it."""
    for p, v in zip(params, momenta, strict=True):
        update, rate = p.grad, 1.0
        if variant in ("moco_v3", "simclr") and p.ndim > 1:
            update = update + decay * p
            if p.norm() > 0 and update.norm() > 0:
                rate = trust * p.norm() / update.norm()
        adapts = (variant == "lightly" and decay != 0) or (variant == "solo" and p.ndim != 1)
        if adapts and p.norm() != 0 and update.norm() != 0:
            rate = trust * p.norm() / (update.norm() + decay * p.norm() + eps)
            if variant == "solo":
                rate = min(rate / lr, 1)
            update = update + decay * p
        if variant == "simclr":
            v.mul_(momentum).add_(lr * rate * update)
            p.sub_(v)
        else:
            v.mul_(momentum).add_(rate * update)
            p.sub_(lr * v)


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_values_of_moco_v3(impl):
    """Recorded from the class LARS in MoCo v3's official code."""
    weight, bias = torch.nn.Parameter(wave((3, 4), 0.7)), torch.nn.Parameter(wave((4,), 0.9))
    optimizer = FusedLARS([weight, bias], lr=0.3, weight_decay=1e-6, impl=impl)
    for weights, biases in (
        ((-1.1898510e-4, 0.6440139, 0.9851832), (-0.16939275, 0.56604075)),
        ((-3.4505702e-4, 0.6436267, 0.9846767), (-0.49123895, 0.15319705)),
    ):
        weight.grad, bias.grad = wave((3, 4), 0.33, 0.4), wave((4,), 0.21, 0.6)
        optimizer.step()
        assert weight.flatten()[:3].tolist() == pytest.approx(weights, rel=1e-6, abs=2e-11)
        assert bias[:2].tolist() == pytest.approx(biases, rel=3e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("trust", [0.001, 0.5])
def test_the_reference_is_each_codes_loop(variant, decay, trust):
    """In float64, with tensors of zeros and gradients of zeros; a trust of 0.5 makes the clipped ratio 1."""
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    for params in (ours, theirs):
        params[5].data.zero_()
    momenta = [torch.zeros_like(p) for p in theirs]
    options = {"momentum": MOMENTUM, "weight_decay": decay, "trust_coefficient": trust}
    optimizer = FusedLARS(ours, lr=LR, **options, variant=variant, impl="reference")
    for step in range(5):
        rate = optimizer.param_groups[0]["lr"] = LR / (1 + step)
        give_gradients(step, ours, theirs)
        if step < 2:
            ours[1].grad.zero_()
            theirs[1].grad.zero_()
        optimizer.step()
        loop(theirs, momenta, variant=variant, lr=rate, momentum=MOMENTUM, decay=decay, trust=trust)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["reference in float64", pytest.param("cuda", marks=without_extension)])
def test_it_is_lightlys_class(kind):
    lars = pytest.importorskip("lightly.utils.lars").LARS
    impl, dtype, tolerance = (kind, torch.float32, 2e-6) if kind == "cuda" else ("reference", torch.float64, 1e-12)
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    for params in (ours, theirs):
        params[4].data.zero_()
    groups = [[{"params": p[:2], "weight_decay": 0.0}, {"params": p[2:]}] for p in (ours, theirs)]
    mine = FusedLARS(groups[0], **OPTIONS, variant="lightly", impl=impl)
    lightlys = lars(groups[1], **OPTIONS)
    for step in range(5):
        give_gradients(step, ours, theirs)
        if step == 3:
            ours[5].grad.zero_()
            theirs[5].grad.zero_()
        mine.step()
        lightlys.step()
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        error = (one.detach() - other.detach()).norm()
        assert error <= tolerance * other.detach().norm(), index
        momentum = lightlys.state[other]["momentum_buffer"]
        assert (mine.state[one]["momentum_buffer"] - momentum).norm() <= tolerance * momentum.norm(), index


def test_states_of_lightly_are_taken():
    """Its groups know none of the options that make a variant."""
    lars = pytest.importorskip("lightly.utils.lars").LARS
    ours, theirs = parameters(), parameters()
    mine, lightlys = FusedLARS(ours, **OPTIONS, variant="lightly"), lars(theirs, **OPTIONS)
    give_gradients(0, theirs)
    lightlys.step()
    for one, other in zip(ours, theirs, strict=True):
        one.data.copy_(other)
    mine.load_state_dict(copy.deepcopy(lightlys.state_dict()))
    assert mine.param_groups[0]["denominator"] == "parts"
    give_gradients(1, ours, theirs)
    mine.step()
    lightlys.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


@without_extension
@threads(1)
def test_without_ratios_it_is_torchs_sgd_bit_for_bit():
    """Sizes are multiples of the CPU's vectors: PyTorch rounds the elements behind its last vector differently."""
    shapes = ((64,), (64, 128), (0, 4), (20_480,), (16, 4, 8, 8))
    ours, theirs = clones(parameters(shapes)), parameters(shapes)
    momenta = [torch.zeros_like(p) for p in ours]
    sgd = torch.optim.SGD(theirs, **OPTIONS, foreach=False)
    for step in range(50):
        give_gradients(step, theirs)
        lars_(ours, [p.grad for p in theirs], momenta, **OPTIONS, adapt=False, impl="cuda")
        sgd.step()
    assert same(ours, theirs)
    assert same(momenta, [sgd.state[p]["momentum_buffer"] for p in theirs])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_many_steps_against_float64(impl, variant):
    """The error is that of the loop in float32."""
    shapes = ((7, 11), (300,), (40, 50))
    ours, theirs = parameters(shapes), parameters(shapes)
    truth = parameters(shapes, dtype=torch.float64)
    momenta = [[torch.zeros_like(p) for p in params] for params in (theirs, truth)]
    optimizer = FusedLARS(ours, **OPTIONS, trust_coefficient=0.01, variant=variant, impl=impl)
    for step in range(300):
        give_gradients(step, ours, theirs, truth)
        optimizer.step()
        for params, buffers in zip((theirs, truth), momenta, strict=True):
            loop(params, buffers, variant=variant, lr=LR, momentum=MOMENTUM, decay=DECAY, trust=0.01)
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        allowed = 1.5 * (other.detach().double() - right.detach()).norm() + 1e-7 * right.detach().norm()
        assert (mine.detach().double() - right.detach()).norm() <= allowed


@without_extension
@pytest.mark.parametrize("denominator", ["sum", "parts"])
@pytest.mark.parametrize("lr_in_momentum", [False, True])
@pytest.mark.parametrize("clip_ratio", [False, True])
def test_awkward_sizes_against_the_reference(denominator, lr_in_momentum, clip_ratio):
    """Ratios may differ by some units in the last place, since norms are added up in another order."""
    options = {"denominator": denominator, "lr_in_momentum": lr_in_momentum, "clip_ratio": clip_ratio}
    ours, theirs, before = lists(), lists(), lists()
    scales = torch.linspace(0.1, 2, len(ours[0]))
    for given, impl in ((ours, "cuda"), (theirs, "reference")):
        lars_(*given, **OPTIONS, trust_coefficient=0.1, scales=scales, **options, impl=impl)
    assert same(ours[1], before[1])
    for index, (mine, other) in enumerate(zip(ours[0], theirs[0], strict=True)):
        allowed = spacing(other) + 1e-6 * (other - before[0][index]).abs() + 1e-7 * LR
        assert ((mine - other).abs() <= allowed).all(), index
        torch.testing.assert_close(ours[2][index], theirs[2][index], rtol=1e-6, atol=3e-7)
        assert not torch.equal(mine, before[0][index])


@without_extension
@pytest.mark.parametrize("denominator", ["sum", "parts"])
@pytest.mark.parametrize("grad_dtype", BOTH)
def test_bf16_is_widened_and_rounded_once(denominator, grad_dtype):
    narrow = lists(dtypes=(torch.bfloat16,), grad_dtypes=(grad_dtype,))
    wide = [[tensor.to(torch.float32, copy=True) for tensor in tensors] for tensors in narrow]
    for given in (narrow, wide):
        lars_(*given, **OPTIONS, trust_coefficient=0.1, denominator=denominator, impl="cuda")
    assert same(narrow[0], [tensor.bfloat16() for tensor in wide[0]])
    assert same(narrow[2], wide[2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("variant", "spoilt"), [("moco_v3", 1), ("simclr", 1), ("lightly", 64 * 129), ("solo", 8256)])
def test_nan_gradients_go_where_the_formula_takes_them(impl, variant, spoilt):
    params = parameters()
    optimizer = FusedLARS(params, **OPTIONS, variant=variant, impl=impl)
    give_gradients(0, params)
    params[1].grad[3, 5] = math.nan
    optimizer.step()
    assert [int(p.isnan().sum()) for p in params] == [0, spoilt, 0, 0, 0, 0, 0]
    assert params[1][3, 5].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_learning_rate_with_a_clipped_ratio(impl):
    """The ratio over a rate of zero is infinite, hence 1."""
    params = parameters()
    before = clones(params)
    optimizer = FusedLARS(params, lr=0.0, weight_decay=DECAY, variant="solo", impl=impl)
    give_gradients(0, params)
    optimizer.step()
    assert same(params, before)
    for param in params:
        expected = param.grad if param.ndim < 2 else param.grad + DECAY * param.detach()
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], expected)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: FusedLARS(p, lr=1.0, momentum=-1), ValueError, "momentum and weight_decay must not be negative"),
        (lambda p: FusedLARS(p, lr=1.0, weight_decay=-0.1), ValueError, "got 0.9 and -0.1"),
        (lambda p: FusedLARS(p, lr=1.0, trust_coefficient=0.0), ValueError, "trust_coefficient must be positive"),
        (lambda p: FusedLARS(p, lr=1.0, variant="moco"), ValueError, "variant must be one of 'moco_v3', 'simclr'"),
        (lambda p: FusedLARS(p, lr=1.0, denominator="x"), ValueError, "must be one of 'sum', 'parts', got 'x'"),
        (lambda p: FusedLARS([{"params": p, "denominator": "x"}], lr=1.0), ValueError, "got 'x'"),
        (lambda p: lars_(p, p, [], lr=1.0, impl="reference"), ValueError, "momentum_buffers holds 0 tensors"),
    ],
)
def test_wrong_options_say_what_is_wrong(build, error, message):
    with pytest.raises(error, match=message):
        build(parameters(((3,),)))


@without_extension
def test_explain_knows_the_op():
    params, momenta = clones(parameters(((3,),))), [torch.zeros(3)]
    assert explain("lars_", params, params, momenta, lr=0.1) == {"cuda": [], "reference": []}
    (reason,) = explain("lars_", params, params, [torch.zeros(3).double()], lr=0.1)["cuda"]
    assert reason == "momentum_buffers[0] must be float32, got float64; convert it first"


@on_gpu
@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("denominator", ["sum", "parts"])
def test_a_gpu_has_the_bits_of_the_cpu(shift, denominator):
    """Nothing but sums in a fixed order, products, quotients and roots, all of them rounded to nearest."""
    mixed = {"dtypes": BOTH, "grad_dtypes": (torch.float32, torch.float32, torch.bfloat16)}
    here, there = lists(**mixed), lists(**mixed, shift=shift, device="cuda")
    for _ in range(3):
        for given in (here, there):
            lars_(*given, **OPTIONS, denominator=denominator, impl="cuda")
    for mine, other in zip(here, there, strict=True):
        assert same(mine, [tensor.cpu() for tensor in other])
