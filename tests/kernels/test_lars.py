"""LARS: the op over lists, and the optimiser in the forms that other codes give it."""

import copy
import math

import pytest
import torch
from lists import CHUNK, IMPLS, clones, randoms, same, without_extension

from vitrail.kernels import FusedLARS, UnsupportedError, explain, extension, lars_
from vitrail.kernels.lars.optimizer import VARIANTS
from vitrail.kernels.multi_tensor_norm.clip import clip_scales
from vitrail.kernels.multi_tensor_norm.op import multi_tensor_norm

SHAPES = ((3,), (64, 129), (0, 4), (1, 1), (100, 200), (5, 3, 7, 7), (2, CHUNK + 1))
LR, MOMENTUM, DECAY = 0.3, 0.9, 0.05
OPTIONS = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
BOTH = (torch.float32, torch.bfloat16)


def parameters(shapes=SHAPES, seed=0, dtype=torch.float32):
    return [torch.nn.Parameter(tensor) for tensor in randoms(shapes, seed=seed, dtypes=(dtype,))]


def give_gradients(step, *lists):
    """Puts the same gradients of this step on the parameters of every list."""
    for params in lists:
        for param, grad in zip(params, randoms([p.shape for p in params], seed=100 + step), strict=True):
            param.grad = grad.to(param.dtype)


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
    ours, theirs = parameters(), parameters()
    for params in (ours, theirs):
        params[:] = [torch.nn.Parameter(p.detach().double()) for p in params]
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
    ours, theirs = parameters(), parameters()
    for params in (ours, theirs):
        params[:] = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
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
def test_without_ratios_it_is_torchs_sgd_bit_for_bit(request):
    """Sizes are multiples of the CPU's vectors: PyTorch rounds the elements behind its last vector differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
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
    ours, theirs, truth = parameters(shapes), parameters(shapes), parameters(shapes)
    truth = [torch.nn.Parameter(p.detach().double()) for p in truth]
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


def lists(*, seed=0, dtypes=(torch.float32,), grad_dtypes=(torch.float32,), **options):
    """Parameters, gradients and momenta of awkward sizes."""
    return (
        randoms(seed=seed, dtypes=dtypes, **options),
        randoms(seed=seed + 1, dtypes=grad_dtypes, **options),
        randoms(seed=seed + 2, **options),
    )


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
        last = torch.nextafter(other.abs(), torch.tensor(math.inf)) - other.abs()
        allowed = last + 1e-6 * (other - before[0][index]).abs() + 1e-7 * LR
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
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_each_tensor_is_as_if_it_were_alone_whatever_its_alignment(impl, shift):
    mixed = {"dtypes": BOTH, "grad_dtypes": (torch.float32, torch.float32, torch.bfloat16)}
    together, apart = lists(**mixed, shift=shift), lists(**mixed)
    lars_(*together, **OPTIONS, impl=impl)
    for param, grad, momentum in zip(*apart, strict=True):
        lars_([param], [grad], [momentum], **OPTIONS, impl=impl)
    if impl == "cuda" or shift == 0:  # PyTorch's own reductions see where a tensor begins
        assert same(together[0], apart[0])
        assert same(together[2], apart[2])
    for mine, other in zip(together[2], apart[2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@without_extension
def test_results_do_not_depend_on_threads_or_runs():
    threads = torch.get_num_threads()
    results = []
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 2)
            params = parameters()
            optimizer = FusedLARS(params, **OPTIONS, max_grad_norm=2.0, impl="cuda")
            give_gradients(0, params)
            optimizer.step()
            results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_flag_and_the_loss_scale_of_a_gradient_scaler(impl):
    ours, theirs = parameters(), parameters()
    scaled, plain = FusedLARS(ours, **OPTIONS, impl=impl), FusedLARS(theirs, **OPTIONS, impl=impl)
    give_gradients(0, ours, theirs)
    for param in ours:
        param.grad.mul_(1024)
    before = clones(ours)
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    scaled.step()
    assert same(ours, before)
    assert all(scaled.state[p]["momentum_buffer"].count_nonzero() == 0 for p in ours)
    scaled.found_inf = torch.tensor(0.0)
    scaled.step()
    plain.step()
    assert same(ours, theirs)  # 1024 is a power of two
    assert not same(ours, before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_clipping_inside_is_clipping_before(impl, per_tensor):
    """Vectors and matrices are two calls: each must get its own factors."""
    ours, theirs = parameters(), parameters()
    inside = FusedLARS(ours, **OPTIONS, max_grad_norm=5.0, clip_per_tensor=per_tensor, impl=impl)
    before = FusedLARS(theirs, **OPTIONS, impl=impl)
    for step in range(3):
        give_gradients(step, ours, theirs)
        grads = clones(p.grad for p in ours)
        inside.step()
        assert same([p.grad for p in ours], grads)  # gradients are not written
        scales = clip_scales(multi_tensor_norm(grads, impl=impl), 5.0, per_tensor=per_tensor)
        assert per_tensor == (scales.unique().numel() > 1)
        for param, scale in zip(theirs, scales.expand(len(theirs)), strict=True):
            param.grad.mul_(scale)
        before.step()
    assert same(ours, theirs)


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

    params = parameters()
    optimizer = FusedLARS(params, **OPTIONS, variant=variant, skip_nonfinite=True, impl=impl)
    before = clones(params)
    give_gradients(0, params)
    params[1].grad[3, 5] = math.inf
    optimizer.step()
    assert optimizer.norms.found_inf == 1
    assert same(params, before)


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


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_without_gradient_stay(impl):
    params = parameters()
    optimizer = FusedLARS([{"params": []}, {"params": params}], **OPTIONS, max_grad_norm=1.0, impl=impl)
    before = clones(params)
    optimizer.step()
    assert same(params, before)
    give_gradients(0, params)
    params[0].grad = params[4].grad = None
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [i in (0, 2, 4) for i in range(7)]
    assert params[0] not in optimizer.state


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_state_goes_on_as_the_saved_one(impl, variant):
    whole, first = parameters(), parameters()
    optimizers = [FusedLARS(params, **OPTIONS, variant=variant, impl=impl) for params in (whole, first)]
    for step in range(4):
        if step == 2:
            second = [torch.nn.Parameter(p.detach().clone()) for p in first]
            resumed = FusedLARS(second, lr=1.0, impl=impl)
            resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
            first, optimizers[1] = second, resumed
        give_gradients(step, whole, first)
        for optimizer in optimizers:
            optimizer.step()
    assert same(whole, first)


def test_momenta_of_bf16_parameters_stay_float32_when_loaded():
    params, others = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    optimizer, other = FusedLARS(params, **OPTIONS), FusedLARS(others, **OPTIONS)
    give_gradients(0, params)
    optimizer.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded = [other.state[p]["momentum_buffer"] for p in others]
    assert {momentum.dtype for momentum in loaded} == {torch.float32}
    assert same(loaded, [optimizer.state[p]["momentum_buffer"] for p in params])


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_have_their_own_options_and_may_be_added(impl):
    ours, theirs = parameters(), parameters()
    optimizer = FusedLARS([{"params": ours[:2], "exclude_1d": False}], **OPTIONS, impl=impl)
    optimizer.add_param_group({"params": ours[2:], "lr": 0.1, "denominator": "parts", "lr_in_momentum": True})
    give_gradients(0, ours, theirs)
    optimizer.step()
    for index, param in enumerate(theirs):
        options = {} if index < 2 else {"lr": 0.1, "denominator": "parts", "lr_in_momentum": True}
        lars_([param], [param.grad], [torch.zeros_like(param)], **{**OPTIONS, **options}, impl=impl)
    assert same(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_learning_rate_may_be_a_tensor(impl, variant):
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(LR, dtype=torch.float64)
    tensors = FusedLARS(ours, lr, MOMENTUM, DECAY, variant=variant, impl=impl)
    numbers = FusedLARS(theirs, LR, MOMENTUM, DECAY, variant=variant, impl=impl)
    for step in range(3):
        lr.fill_(LR / (step + 1))
        numbers.param_groups[0]["lr"] = LR / (step + 1)
        give_gradients(step, ours, theirs)
        tensors.step()
        numbers.step()
    assert same(ours, theirs)


@without_extension
def test_transposed_parameters_run_in_the_kernel_and_others_in_the_reference(caplog):
    def make():
        weight = torch.nn.Parameter(randoms(((6, 4),), seed=1)[0].t())
        weight.grad = randoms(((6, 4),), seed=2)[0].t()
        return weight

    ours, theirs, other = make(), make(), make()
    FusedLARS([ours], **OPTIONS, impl="cuda").step()
    theirs_momentum = [torch.zeros(4, 6)]
    lars_([straight := theirs.detach().contiguous()], [theirs.grad.contiguous()], theirs_momentum, **OPTIONS)
    torch.testing.assert_close(ours.detach(), straight, rtol=1e-6, atol=1e-7)
    other.grad = torch.zeros(6, 8)[:, ::2].t().copy_(theirs.grad)
    with pytest.raises(UnsupportedError, match=r"grads\[0\] has sizes .* give both the same layout"):
        FusedLARS([other], **OPTIONS, impl="cuda").step()
    FusedLARS([other], **OPTIONS).step()
    torch.testing.assert_close(other.detach(), straight, rtol=1e-6, atol=1e-7)
    assert "lars_ (forward): reference, not cuda, because grads[0] has sizes" in caplog.text


@without_extension
def test_more_tensors_than_a_launch_carries_and_autograd_learns_of_the_change():
    params, grads = randoms([2] * 2100, seed=1), randoms([2] * 2100, seed=2)
    others, momenta = clones(params), [[torch.zeros(2) for _ in params] for _ in range(2)]
    version = params[0]._version
    lars_(params, grads, momenta[0], **OPTIONS, impl="cuda")
    lars_(others, grads, momenta[1], **OPTIONS, impl="reference")
    assert params[0]._version > version
    assert grads[0]._version == 1  # from when it was made
    torch.testing.assert_close(torch.stack(params), torch.stack(others), rtol=1e-6, atol=1e-7)


def test_the_closure_is_called_with_gradients_enabled():
    params = parameters(((3, 2),))
    optimizer = FusedLARS(params, **OPTIONS)

    def closure():
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    before = clones(params)
    assert optimizer.step(closure) == (before[0] ** 2).sum()
    assert not same(params, before)


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"FusedLARS takes dense gradients, got layout torch\.sparse_coo"):
        FusedLARS(table.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: FusedLARS(p, lr=-1.0), ValueError, "lr must not be negative, got -1"),
        (lambda p: FusedLARS(p, lr=1.0, momentum=-1), ValueError, "momentum and weight_decay must not be negative"),
        (lambda p: FusedLARS(p, lr=1.0, weight_decay=-0.1), ValueError, "got 0.9 and -0.1"),
        (lambda p: FusedLARS(p, lr=1.0, trust_coefficient=0.0), ValueError, "trust_coefficient must be positive"),
        (lambda p: FusedLARS(p, lr=1.0, variant="moco"), ValueError, "variant must be one of 'moco_v3', 'simclr'"),
        (lambda p: FusedLARS(p, lr=1.0, denominator="x"), ValueError, "must be one of 'sum', 'parts', got 'x'"),
        (lambda p: FusedLARS([{"params": p, "denominator": "x"}], lr=1.0), ValueError, "got 'x'"),
        (lambda p: FusedLARS(p, lr=1.0, impl="fast"), ValueError, "impl must be one of"),
        (lambda p: FusedLARS([torch.zeros(2, dtype=torch.complex64)], lr=1.0), TypeError, "real floating dtype"),
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


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and bool(extension.reasons(torch.device("cuda"))),
        reason="needs the compiled extension",
    ),
]


def marked(test):
    """A test for a GPU alone."""
    for mark in on_gpu:
        test = mark(test)
    return test


@marked
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


@marked
def test_a_captured_step_follows_the_rate_and_the_flag():
    given, other = lists(device="cuda"), lists(device="cuda")
    lr, found_inf = torch.tensor(LR, dtype=torch.float64, device="cuda"), torch.zeros((), device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):  # fails on any host synchronisation
        lars_(*given, **{**OPTIONS, "lr": lr}, found_inf=found_inf, impl="cuda")
    for rate, flag in ((LR, 0.0), (2.0, 1.0), (0.1, 0.0)):
        lr.fill_(rate)
        found_inf.fill_(flag)
        graph.replay()
        if not flag:
            lars_(*other, **{**OPTIONS, "lr": rate}, impl="cuda")
    torch.cuda.synchronize()
    assert all(same(mine, theirs) for mine, theirs in zip(given, other, strict=True))


@marked
def test_nothing_waits_for_the_device():
    """With factors of their own for vectors and matrices, which are two calls."""
    params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters()]
    optimizer = FusedLARS(params, **OPTIONS, max_grad_norm=1.0, clip_per_tensor=True, skip_nonfinite=True, impl="cuda")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
