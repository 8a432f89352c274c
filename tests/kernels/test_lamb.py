"""LAMB: the op over lists, and the optimiser."""

import copy
import math

import pytest
import torch
from lists import CHUNK, IMPLS, clones, randoms, same, without_extension

from vitrail.kernels import FusedLAMB, UnsupportedError, explain, extension, lamb_
from vitrail.kernels.multi_tensor_norm.op import multi_tensor_norm

SHAPES = ((3,), (64, 129), (0, 4), (1,), (20_000,), (5, 3, 7, 7), (2, CHUNK + 1))
LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.95), 1e-6, 0.05
OPTIONS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
FREE = {**OPTIONS, "max_grad_norm": None}
BOTH = (torch.float32, torch.bfloat16)
FORMS = (
    {},
    {"grad_averaging": False},
    {"weight_decay": 0.0},
    {"weight_decay": 0.0, "use_nvlamb": True},
    {"adapt": False},
)


def parameters(shapes=SHAPES, seed=0, dtype=torch.float32):
    return [torch.nn.Parameter(tensor) for tensor in randoms(shapes, seed=seed, dtypes=(dtype,))]


def give_gradients(step, *lists):
    """Puts the same gradients of this step on the parameters of every list."""
    for params in lists:
        for param, grad in zip(params, randoms([p.shape for p in params], seed=100 + step), strict=True):
            param.grad = grad.to(param.dtype)


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
    ours, theirs = ([torch.nn.Parameter(p.detach().double()) for p in parameters()] for _ in range(2))
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
    ours, theirs, truth = parameters(shapes), parameters(shapes), parameters(shapes)
    truth = [torch.nn.Parameter(p.detach().double()) for p in truth]
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


def lists(*, dtypes=(torch.float32,), grad_dtypes=(torch.float32,), state_dtypes=(torch.float32,), **options):
    """Parameters, gradients, moments and steps of awkward sizes."""
    squares = [tensor.abs_() for tensor in randoms(seed=3, dtypes=state_dtypes, **options)]
    return (
        randoms(seed=0, dtypes=dtypes, **options),
        randoms(seed=1, dtypes=grad_dtypes, **options),
        randoms(seed=2, dtypes=state_dtypes, **options),
        squares,
        [torch.tensor(float(index % 5)) for index in range(len(squares))],
    )


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
        last = torch.nextafter(other.abs(), torch.tensor(math.inf)) - other.abs()
        # Adam's direction and the decay may cancel in an update: its error is that of the larger part.
        allowed = last + 2e-6 * (other - before[0][index]).abs() + 2e-6 * LR * before[0][index].norm()
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
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_each_tensor_is_as_if_it_were_alone_whatever_its_alignment(impl, shift):
    mixed = {
        "dtypes": BOTH,
        "grad_dtypes": (torch.float32, torch.float32, torch.bfloat16),
        "state_dtypes": (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    }
    together, apart = lists(**mixed, shift=shift), lists(**mixed)
    lamb_(*together, **OPTIONS, impl=impl)
    for alone in zip(*apart, strict=True):
        lamb_(*([tensor] for tensor in alone), **OPTIONS, impl=impl)
    if impl == "cuda" or shift == 0:  # PyTorch's own loops see where a tensor begins
        assert all(same(mine, other) for mine, other in zip(together, apart, strict=True))
    for mine, other in zip(together[0], apart[0], strict=True):
        tolerance = 1e-6 if mine.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=1e-6)


@without_extension
def test_results_do_not_depend_on_threads_or_runs():
    threads = torch.get_num_threads()
    results = []
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 2)
            params = parameters()
            optimizer = FusedLAMB(params, **OPTIONS, impl="cuda")
            give_gradients(0, params)
            optimizer.step()
            results.append([*params, *(optimizer.state[p]["exp_avg_sq"] for p in params)])
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_flag_and_the_loss_scale_of_a_gradient_scaler(impl):
    ours, theirs = parameters(), parameters()
    scaled, plain = FusedLAMB(ours, **FREE, impl=impl), FusedLAMB(theirs, **FREE, impl=impl)
    give_gradients(0, ours, theirs)
    for param in ours:
        param.grad.mul_(1024)
    before = clones(ours)
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    scaled.step()
    assert same(ours, before)
    states = [scaled.state[p] for p in ours]
    assert all(state[key].count_nonzero() == 0 for state in states for key in ("step", "exp_avg", "exp_avg_sq"))
    scaled.found_inf = torch.tensor(0.0)
    scaled.step()
    plain.step()
    assert same(ours, theirs)  # 1024 is a power of two
    assert not same(ours, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_clipped_by_the_norm_of_all_groups(impl):
    ours, theirs = parameters(), parameters()
    inside = FusedLAMB([{"params": ours[:3]}, {"params": ours[3:], "lr": 0.01}], **OPTIONS, impl=impl)
    before = FusedLAMB([{"params": theirs[:3]}, {"params": theirs[3:], "lr": 0.01}], **FREE, impl=impl)
    for step in range(3):
        give_gradients(step, ours, theirs)
        grads = clones(p.grad for p in ours)
        inside.step()
        assert same([p.grad for p in ours], grads)  # gradients are not written
        norm = multi_tensor_norm(grads, impl=impl).total
        assert inside.norms.total == norm
        assert norm > 100
        for param in theirs:
            param.grad.mul_(1.0 / (norm + 1e-6))
        before.step()
    assert same(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_gradients_spoil_their_element_unless_skipped(impl):
    params = parameters()
    optimizer = FusedLAMB(params, **OPTIONS, impl=impl)
    give_gradients(0, params)
    params[1].grad[3, 5] = math.nan
    optimizer.step()
    assert [int(p.isnan().sum()) for p in params] == [0, 1, 0, 0, 0, 0, 0]
    assert params[1][3, 5].isnan()

    params = parameters()
    optimizer = FusedLAMB(params, **OPTIONS, skip_nonfinite=True, impl=impl)
    before = clones(params)
    give_gradients(0, params)
    params[1].grad[3, 5] = math.inf
    optimizer.step()
    assert optimizer.norms.found_inf == 1
    assert same(params, before)
    assert all(optimizer.state[p]["step"] == 0 for p in params)


@pytest.mark.parametrize("impl", IMPLS)
def test_parameters_without_gradient_stay(impl):
    params = parameters()
    optimizer = FusedLAMB([{"params": []}, {"params": params}], **OPTIONS, impl=impl)
    before = clones(params)
    optimizer.step()
    assert same(params, before)
    give_gradients(0, params)
    params[0].grad = params[4].grad = None
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [i in (0, 2, 4) for i in range(7)]
    assert params[0] not in optimizer.state


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", BOTH)
def test_a_loaded_state_goes_on_as_the_saved_one(impl, state_dtype, dtype):
    whole, first = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizers = [FusedLAMB(params, **OPTIONS, state_dtype=state_dtype, impl=impl) for params in (whole, first)]
    for step in range(4):
        if step == 2:
            second = [torch.nn.Parameter(p.detach().clone()) for p in first]
            resumed = FusedLAMB(second, lr=1.0, state_dtype=state_dtype, impl=impl)
            resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
            first, optimizers[1] = second, resumed
        give_gradients(step, whole, first)
        for optimizer in optimizers:
            optimizer.step()
    assert same(whole, first)
    state = optimizers[1].state[first[0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (state_dtype or torch.float32)
    assert state["step"] == 4


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


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_have_their_own_options_and_may_be_added(impl):
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.1, "weight_decay": 0.0, "grad_averaging": False, "betas": (0.5, 0.9)}
    optimizer = FusedLAMB([{"params": ours[:2]}], **FREE, impl=impl)
    optimizer.add_param_group({"params": ours[2:], **options})
    give_gradients(0, ours, theirs)
    optimizer.step()
    for index, param in enumerate(theirs):
        moments = [[torch.zeros_like(param)] for _ in range(2)]
        own = {**OPTIONS, **(options if index >= 2 else {})}
        lamb_([param], [param.grad], *moments, [torch.zeros(())], **own, impl=impl)
    assert same(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_learning_rate_may_be_a_tensor(impl):
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(LR, dtype=torch.float64)
    tensors = FusedLAMB(ours, lr, impl=impl)
    numbers = FusedLAMB(theirs, LR, impl=impl)
    for step in range(3):
        lr.fill_(LR / (step + 1))
        numbers.param_groups[0]["lr"] = LR / (step + 1)
        give_gradients(step, ours, theirs)
        tensors.step()
        numbers.step()
    assert same(ours, theirs)


@without_extension
def test_transposed_parameters_run_in_the_kernel_and_others_in_the_reference(caplog):
    def make(transposed):
        weight, grad = randoms(((6, 4),), seed=1)[0], randoms(((6, 4),), seed=2)[0]
        param = torch.nn.Parameter(weight.t() if transposed else weight.t().contiguous())
        param.grad = grad.t() if transposed else grad.t().contiguous()
        return param

    ours, straight, other = make(True), make(False), make(True)
    FusedLAMB([ours], **OPTIONS, impl="cuda").step()
    FusedLAMB([straight], **OPTIONS, impl="cuda").step()
    torch.testing.assert_close(ours, straight, rtol=1e-6, atol=1e-7)
    other.grad = torch.zeros(6, 8)[:, ::2].t().copy_(straight.grad)
    with pytest.raises(UnsupportedError, match=r"grads\[0\] has sizes .* give both the same layout"):
        FusedLAMB([other], **FREE, impl="cuda").step()
    FusedLAMB([other], **OPTIONS).step()
    torch.testing.assert_close(other, straight, rtol=1e-6, atol=1e-7)
    assert "lamb_ (forward): reference, not cuda, because grads[0] has sizes" in caplog.text


@without_extension
def test_more_tensors_than_a_launch_carries_and_autograd_learns_of_the_change():
    """2,100 tensors, more than the step counters of two launches."""
    params, grads = randoms([2] * 2100, seed=1), randoms([2] * 2100, seed=2)
    others = clones(params)
    states = [[[torch.zeros(2) for _ in params] for _ in range(2)] for _ in range(2)]
    steps = [[torch.tensor(float(i % 7)) for i in range(2100)] for _ in range(2)]
    version = params[0]._version
    lamb_(params, grads, *states[0], steps[0], **OPTIONS, impl="cuda")
    lamb_(others, grads, *states[1], steps[1], **OPTIONS, impl="reference")
    assert params[0]._version > version
    assert same(*steps)
    torch.testing.assert_close(torch.stack(params), torch.stack(others), rtol=1e-5, atol=1e-6)


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


def test_the_closure_is_called_with_gradients_enabled():
    params = parameters(((3, 2),))
    optimizer = FusedLAMB(params, **OPTIONS)

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
    with pytest.raises(RuntimeError, match=r"FusedLAMB takes dense gradients, got layout torch\.sparse_coo"):
        FusedLAMB(table.parameters()).step()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: FusedLAMB(p, lr=-1.0), ValueError, "lr must not be negative, got -1"),
        (lambda p: FusedLAMB(p, betas=(0.9, 1.0)), ValueError, r"betas must be in \[0, 1\)"),
        (lambda p: FusedLAMB(p, eps=-1.0), ValueError, "eps and weight_decay must not be negative"),
        (lambda p: FusedLAMB(p, state_dtype=torch.float16), TypeError, "state_dtype must be torch.float32"),
        (lambda p: FusedLAMB(p, max_grad_norm=0.0), ValueError, "max_grad_norm must be positive, or None"),
        (lambda p: FusedLAMB(p, impl="fast"), ValueError, "impl must be one of"),
        (lambda p: FusedLAMB([torch.zeros(2, dtype=torch.complex64)]), TypeError, "real floating dtype"),
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
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_computes_as_the_cpu(shift, form):
    """The same bits but for the bias corrections, powers that may differ in the last place."""
    mixed = {"grad_dtypes": BOTH, "state_dtypes": (torch.float32, torch.float32, torch.bfloat16)}
    here, there = lists(**mixed), lists(**mixed, shift=shift, device="cuda")
    there = (*there[:4], [step.cuda() for step in there[4]])
    for _ in range(3):
        for given in (here, there):
            lamb_(*given, **{**OPTIONS, **form}, impl="cuda")
    for mine, other in zip(here[0], there[0], strict=True):
        torch.testing.assert_close(mine, other.cpu(), rtol=1e-6, atol=1e-6)
    for index in (2, 3, 4):
        assert same(here[index], [tensor.cpu() for tensor in there[index]])


@marked
def test_a_captured_step_follows_the_rate_and_the_flag():
    given, other = ((*made[:4], [step.cuda() for step in made[4]]) for made in (lists(device="cuda") for _ in range(2)))
    lr, found_inf = torch.tensor(LR, dtype=torch.float64, device="cuda"), torch.zeros((), device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):  # fails on any host synchronisation
        lamb_(*given, **{**OPTIONS, "lr": lr}, found_inf=found_inf, impl="cuda")
    for rate, flag in ((LR, 0.0), (2.0, 1.0), (0.1, 0.0)):
        lr.fill_(rate)
        found_inf.fill_(flag)
        graph.replay()
        if not flag:
            lamb_(*other, **{**OPTIONS, "lr": rate}, impl="cuda")
    torch.cuda.synchronize()
    assert all(same(mine, theirs) for mine, theirs in zip(given, other, strict=True))


@marked
def test_nothing_waits_for_the_device():
    params = [torch.nn.Parameter(p.detach().cuda()) for p in parameters()]
    optimizer = FusedLAMB(params, **OPTIONS, skip_nonfinite=True, impl="cuda")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
