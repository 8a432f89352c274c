import math
import sys
from functools import partial

import pytest
import torch
from dense_losses import clip
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded

from vitrail.kernels import CLIPLoss, UnsupportedError, explain
from vitrail.kernels import clip_loss as public
from vitrail.kernels.clip_loss import op

OP = op.__name__
LOW = [torch.bfloat16, torch.float16]
RUNS = [("reference", torch.float64)]
RUNS += [(impl, dtype) for impl in ("reference", "triton") for dtype in (torch.float32, *LOW)]
NAMES = ("a", "b", "logit_scale")


def clip_loss(*args, **kwargs):
    """The module's present function, which a planted fault replaces."""
    return sys.modules[OP].clip_loss(*args, **kwargs)


def problem(count: int = 7, width: int = 40, noise: float = 3.0, scale: float = 14.0) -> Problem:
    generator = torch.Generator().manual_seed(count)
    a = torch.randn(count, width, generator=generator)
    b = a + noise * torch.randn(count, width, generator=generator)
    return Problem({"a": a, "b": b, "logit_scale": torch.tensor(scale)}, NAMES)


@pytest.mark.parametrize("scale", [14.0, 50.0])
@pytest.mark.parametrize(("impl", "dtype"), RUNS)
def test_accuracy(impl, dtype, scale):
    for count, width in ((7, 40), (33, 64)):
        # Features that have little in common: the loss is of the size of the logits, whose rounding then is its own.
        case = problem(count, width, noise=30.0, scale=scale)
        check_accuracy(clip_loss, partial(clip, low=dtype), case, dtype, impl)


@settings(max_examples=30, deadline=None)
@given(
    count=st.sampled_from([1, 2, 3, 7, 33, 65]),
    width=st.sampled_from([16, 40, 64]),
    scale=st.floats(0.5, 100),
    impl=st.sampled_from(["reference", "triton"]),
)
def test_any_size_and_scale(count, width, scale, impl):
    """The loss is a difference of logits, so that rounding is relative to the largest logit."""
    case = problem(count, width, scale=scale).to(torch.float32, kernel_device())
    got = evaluate(partial(clip_loss, impl=impl), case)
    for name, expected in evaluate(clip, case.to(torch.float64)).items():
        limit = 2e-6 * scale
        if name in ("gradient of a", "gradient of b"):
            limit *= max(expected.norm().item(), scale)
        assert (got[name].cpu() - expected).norm() <= limit, name


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_number_is_a_scale_without_gradient(impl):
    case = problem().to(torch.float32, kernel_device())
    number = Problem({**case.inputs, "logit_scale": 14.0}, ("a", "b"))
    learned = evaluate(partial(clip_loss, impl=impl), case)
    for name, value in evaluate(partial(clip_loss, impl=impl), number).items():
        assert torch.equal(value, learned[name])


def test_the_scale_keeps_its_dtype():
    case = problem().to(torch.bfloat16)
    case.inputs["logit_scale"] = torch.tensor(14.0)
    got = evaluate(clip_loss, case)
    assert got["gradient of logit_scale"].dtype == torch.float32
    assert got["gradient of a"].dtype == torch.bfloat16
    case.inputs["logit_scale"] = torch.tensor(14.0, dtype=torch.float64)
    assert evaluate(clip_loss, case)["gradient of logit_scale"].dtype == torch.float64


def test_the_logarithm_of_the_scale_is_learned():
    """As CLIP does: the gradient of log_scale is that of the scale times the scale."""
    case = problem().to(torch.float64)
    log_scale = case.inputs["logit_scale"].log().requires_grad_()
    loss = clip_loss(case.inputs["a"], case.inputs["b"], log_scale.exp())
    (gradient,) = torch.autograd.grad(loss, log_scale)
    case.inputs["logit_scale"] = log_scale.detach().exp()
    once = evaluate(clip, Problem(case.inputs, ("logit_scale",)))["gradient of logit_scale"] * log_scale.exp()
    factor = torch.randint(-16, 17, (), generator=torch.Generator().manual_seed(1)) / 8  # the ladder's upstream
    torch.testing.assert_close(gradient * factor, once.detach())


def test_gradients():
    for count, width, scale in ((1, 3, 2.0), (2, 5, 14.0), (7, 8, 3.0), (5, 4, 70.0)):
        check_gradients(clip_loss, problem(count, width, scale=scale))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("names", [("a",), ("b",), ("logit_scale",), ("b", "logit_scale"), ()])
def test_gradients_of_some(names, impl):
    case = problem().to(torch.float32, kernel_device())
    every = evaluate(partial(clip_loss, impl=impl), case)
    some = evaluate(partial(clip_loss, impl=impl), Problem(case.inputs, names))
    assert len(some) == 1 + len(names)
    torch.testing.assert_close(some, {name: every[name] for name in some})
    with torch.no_grad():
        assert torch.equal(clip_loss(**case.inputs, impl=impl), some["output 0"])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_gradient_scales_with_its_upstream(impl):
    for dtype in (torch.float32, torch.float16):
        case = problem().to(dtype, kernel_device())
        once = evaluate(partial(clip_loss, impl=impl), case)
        often = evaluate(lambda impl=impl, **inputs: 1024 * clip_loss(**inputs, impl=impl), case)
        for name in ("gradient of a", "gradient of b", "gradient of logit_scale"):
            torch.testing.assert_close(often[name].float(), 1024 * once[name].float(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_of_zeros_give_finite_results(impl):
    case = problem().to(torch.float32, kernel_device())
    case.inputs["a"][2] = 0
    case.inputs["b"][5] = 0
    got = evaluate(partial(clip_loss, impl=impl), case)
    assert all(value.isfinite().all() for value in got.values())
    torch.testing.assert_close(got["output 0"], clip(**case.inputs), rtol=1e-5, atol=1e-5)


def test_the_module_is_the_function():
    case = problem()
    module = CLIPLoss(temperature=0.1)
    loss = module(case.inputs["a"], case.inputs["b"])
    torch.testing.assert_close(loss, public(case.inputs["a"], case.inputs["b"], 10.0))
    loss.backward()
    assert module.log_scale.grad is not None


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("low", LOW)
def test_autocast_rounds_the_products_only(low, impl):
    """Unit features are rounded to autocast's dtype; the loss and the gradient of float32 features stay float32."""
    case = problem(33).to(torch.float32, kernel_device())
    with torch.autocast(kernel_device().type, low):
        got = evaluate(partial(clip_loss, impl=impl), case)
    expected = evaluate(partial(clip, low=low), case)
    exact = evaluate(clip, case)
    for name, value in got.items():
        assert value.dtype == torch.float32
        error, rounding = ((value - other[name]).norm() for other in (expected, exact))
        if impl == "reference":  # a kernel rounds the weights of its second product, too
            assert error <= 1e-5 * expected[name].norm()
            assert rounding > 4 * error
        assert error <= 2e-2 * expected[name].norm()


@pytest.mark.parametrize(("count", "width"), [(3, 16), (33, 40)])
def test_triton_stays_inside_its_buffers(count, width):
    check_guarded(clip_loss, problem(count, width).to(torch.float32))


def test_ops():
    check_ops(clip_loss, problem())
    check_ops(clip_loss, problem(1, 16).to(torch.bfloat16))


def test_compilation():
    check_compiled(public, problem())
    check_compiled(public, problem().to(torch.bfloat16))
    check_compiled(public, problem(5), problem(9), problem(12))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("one direction twice", OP, "row_pass(b, all_a,", "row_pass(a, all_b,"),
        Fault("positive of another row", OP, "b.to(a_lse.dtype)).sum(1)", "b.to(a_lse.dtype).roll(1, 0)).sum(1)"),
        Fault("positive without the scale", OP, "- factor * cosine", "- cosine"),
        Fault("sum of the directions", OP, "(a_lse + b_lse) / 2", "(a_lse + b_lse)"),
        Fault("gradient's positive counted once", OP, "(mean - 2 * wide", "(mean - wide"),
        Fault("gradient's positive of the same side", OP, "wide[1 - index]", "wide[index]"),
        Fault("gradient of keys dropped", OP, ".add_(as_key)", ""),
        Fault(
            "log-sum-exps of the wrong side",
            OP,
            "((a, all_b, b_lse, a_mean), (b, all_a, a_lse, b_mean))",
            "((a, all_b, a_lse, a_mean), (b, all_a, b_lse, b_mean))",
        ),
        Fault(
            "means of the wrong side",
            OP,
            "((a, all_b, b_lse, a_mean), (b, all_a, a_lse, b_mean))",
            "((a, all_b, b_lse, b_mean), (b, all_a, a_lse, a_mean))",
        ),
        Fault("no half in the gradient", OP, "factor / (2 * rows)", "factor / rows"),
        Fault("no scale in the gradient", OP, "factor / (2 * rows)", "1 / (2 * rows)"),
        Fault("upstream gradient ignored by keys", OP, "as_key *= upstream", "as_key *= 1"),
        Fault("upstream gradient ignored by queries", OP, ".mul_(grad)", ""),
        Fault("upstream gradient ignored by the scale", OP, "(expected - cosine) * grad", "(expected - cosine)"),
        Fault("scale's gradient of one side", OP, "(wide[1] * b_mean)", "(wide[0] * a_mean)"),
        Fault("scale's positive dropped", OP, "(expected - cosine)", "expected"),
        Fault("features not normalised", OP, "_CLIP.apply(unit_rows(a), unit_rows(b)", "_CLIP.apply(a, unit_rows(b)"),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    check_noticed(
        fault, tmp_path, lambda: check_accuracy(clip_loss, clip, problem(noise=30.0, scale=3.0), torch.float64)
    )


ONES = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.ones(4, 9)}, ValueError, r"a and b must have the same shape.*got \[4, 9\] and \[4, 8\]"),
        ({"b": torch.ones(5, 8)}, ValueError, r"a and b must have the same shape.*got \[4, 8\] and \[5, 8\]"),
        ({"a": torch.ones(8)}, ValueError, r"a must have shape \[N, d\], got \[8\]"),
        ({"b": ONES.long()}, TypeError, "b must be of a floating dtype, got torch.int64; convert"),
        ({"b": ONES.half()}, TypeError, "a is torch.float32 and b torch.float16; convert one"),
        ({"a": ONES[:0], "b": ONES[:0]}, ValueError, "a has no row.*skip the empty batch"),
        ({"a": ONES.to("meta")}, ValueError, r"got a on meta, b on cpu; move them with .to\(device\)"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be a finite positive number, got 0.0"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale must be a finite positive number, got -1.0"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be a finite positive number, got nan"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale must be a finite positive number, got inf"),
        ({"logit_scale": torch.ones(1)}, ValueError, r"logit_scale must have shape \[\], got \[1\]"),
        ({"logit_scale": torch.tensor(3)}, TypeError, "logit_scale must be of a floating dtype, got torch.int64"),
        ({"logit_scale": torch.ones((), device="meta")}, ValueError, "got a on cpu, logit_scale on meta; move them"),
        ({"group": "WORLD"}, TypeError, "group must be a torch.distributed process group or None.*got 'WORLD'"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto'.*got 'fast'"),
        ({"impl": "cuda"}, UnsupportedError, "no 'cuda' implementation"),
    ],
)
def test_errors_name_the_value_and_the_remedy(change, error, message):
    with pytest.raises(error, match=message):
        public(**{"a": ONES, "b": ONES, **change})


def test_explain():
    case = problem().to(torch.float32, kernel_device())
    assert explain(public, **case.inputs) == {"triton": [], "reference": []}
    reasons = explain("clip_loss", **problem(2, 600).to(torch.float64, kernel_device()).inputs)["triton"]
    assert any("queries are 600 wide" in reason for reason in reasons)
    assert any("queries is float64" in reason for reason in reasons)
