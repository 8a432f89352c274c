import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded

from vitrail.kernels import UnsupportedError, explain
from vitrail.kernels.koleo_loss import op

OP = op.__name__
RUNS = [("reference", torch.float64)]
RUNS += [(impl, dtype) for impl in ("reference", "triton") for dtype in (torch.float32, torch.float16, torch.bfloat16)]


def koleo_loss(*args, **kwargs):
    """The module's present function, which a planted fault replaces."""
    return sys.modules[OP].koleo_loss(*args, **kwargs)


def problem(count: int = 9, width: int = 24, scale: float = 1.0, **options: object) -> Problem:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(count)) * scale
    return Problem({"x": x, **options}, ("x",))


def eager(x, eps=1e-8):
    """DINOv2's lines."""
    x = F.normalize(x, eps=eps, p=2, dim=-1)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(x, x[nearest], 2, eps) + eps).log().mean()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_golden(impl):
    x = (0.61 * torch.arange(128, dtype=torch.float64) + 0.2).sin().float().view(8, 16).to(kernel_device())
    assert koleo_loss(x, impl=impl).item() == pytest.approx(0.4350618, abs=2e-7)


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize(("impl", "dtype"), RUNS)
def test_accuracy(impl, dtype, eps):
    check_accuracy(koleo_loss, eager, problem(eps=eps), dtype, impl)


@settings(max_examples=15, deadline=None)
@given(
    count=st.sampled_from([2, 3, 9, 63, 65]), width=st.integers(8, 70), impl=st.sampled_from(["reference", "triton"])
)
def test_any_size(count, width, impl):
    check_accuracy(koleo_loss, eager, problem(count, width), torch.float32, impl)


def test_gradients():
    check_gradients(koleo_loss, problem())
    check_gradients(koleo_loss, problem(2, 5))
    check_gradients(koleo_loss, problem(eps=0.1))
    check_gradients(koleo_loss, problem(scale=0.01, eps=0.1))  # every norm is clamped


def test_both_ends_of_a_pair_get_a_gradient():
    """Rows 1 and 2 both have row 0 as their nearest neighbour, which is pushed away from both."""
    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.0, 0.6]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(koleo_loss(x), x)
    assert grad[0, 1] > 0 < grad[0, 2]  # descent lowers both coordinates of row 0
    torch.testing.assert_close((grad * x).sum(1), torch.zeros(3, dtype=torch.float64))  # nothing along a row


def test_duplicates_give_a_large_finite_loss_and_a_finite_gradient():
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    x[1] = x[0]
    x[2] = 0.0
    for values in (x, torch.ones(4, 16)):
        leaf = values.clone().requires_grad_()
        loss = koleo_loss(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite()
        assert grad.isfinite().all()
        torch.testing.assert_close(loss, eager(values))
    assert koleo_loss(torch.ones(4, 16)).item() == pytest.approx(-math.log(1e-8 * 4 + 1e-8), rel=1e-5)


@pytest.mark.parametrize("width", [2, 8, 64, 384])
@pytest.mark.parametrize("count", [2, 3, 17, 64, 200])
def test_equals_lightly(count, width):
    lightly = pytest.importorskip("lightly.loss").KoLeoLoss()
    case = problem(count, width)
    ours, theirs = evaluate(koleo_loss, case), evaluate(lightly, case)
    assert ours["output 0"].item() == pytest.approx(theirs["output 0"].item(), rel=5e-6, abs=1e-6)
    difference = (ours["gradient of x"] - theirs["gradient of x"]).norm()
    assert difference <= 5e-6 * theirs["gradient of x"].norm()


def test_triton_stays_inside_its_buffers():
    case = problem(65, 33)
    check_guarded(koleo_loss, Problem(case.inputs))


def test_ops_and_compilation():
    check_ops(koleo_loss, problem())
    check_compiled(op.koleo_loss, problem())
    check_compiled(partial(op.koleo_loss), problem(9), problem(12), problem(7))


def test_autocast_leaves_the_loss_in_float32():
    for case in (problem().to(torch.float32), problem().to(torch.bfloat16)):
        expected = evaluate(koleo_loss, case)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                got = evaluate(koleo_loss, case)
            assert got["output 0"].dtype == torch.float32
            assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "fault",
    [
        Fault("gradient to one end only", OP, " - scatter_rows(toward, index, len(x))", ""),
        Fault("gradient through the norm missing", OP, "toward - unit * along", "toward"),
        Fault("clamped norms have a gradient", OP, "norm >= eps", "norm >= 0"),
        Fault("wrong sign", OP, "(-grad / len(x))", "(grad / len(x))"),
        Fault("upstream gradient ignored", OP, "(-grad / len(x))", "(-1 / len(x))"),
        Fault("no eps in the difference", OP, "unit[index] + eps", "unit[index]"),
        Fault("no eps in the logarithm", OP, "(distance + eps).log()", "distance.log()"),
        Fault("no eps in its derivative", OP, "(distance * (distance + eps))", "(distance * distance)"),
        Fault("sum in place of mean", OP, ".log().mean()", ".log().sum()"),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    def twice(**inputs):
        return 3 * koleo_loss(**{name: value for name, value in inputs.items() if name != "impl"})

    def check() -> None:
        for case in (problem(eps=0.01), problem(scale=0.01, eps=0.1)):
            check_accuracy(twice, lambda **inputs: 3 * eager(**inputs), case, torch.float64)

    check_noticed(fault, tmp_path, check)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(1, 8), {}, ValueError, r"x has shape \[1, 8\]: no row has another row"),
        (torch.ones(0, 8), {}, ValueError, r"x has shape \[0, 8\]"),
        (torch.ones(8), {}, ValueError, r"x must have shape \[N, C\], got \[8\]"),
        (torch.ones(4, 8).long(), {}, TypeError, "x must be of a floating dtype"),
        (torch.ones(4, 8), {"impl": "fast"}, ValueError, "impl must be one of"),
        (torch.ones(4, 8), {"impl": "cuda"}, UnsupportedError, "no 'cuda' implementation"),
    ],
)
def test_errors_name_the_value_and_the_expectation(x, options, error, message):
    with pytest.raises(error, match=message):
        koleo_loss(x, **options)


def test_explain():
    x = torch.ones(4, 8, device=kernel_device())
    assert explain(koleo_loss, x, eps=1e-6) == {"triton": [], "reference": []}
    reasons = explain("koleo_loss", x.double())["triton"]
    assert any("student is float64" in reason for reason in reasons)
