import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dense_losses import info_nce
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded

from vitrail.kernels import InfoNCELoss, UnsupportedError, explain
from vitrail.kernels import info_nce_loss as public
from vitrail.kernels.info_nce_loss import op

OP = op.__name__
LOW = [torch.bfloat16, torch.float16]
RUNS = [("reference", torch.float64)]
RUNS += [(impl, dtype) for impl in ("reference", "triton") for dtype in (torch.float32, *LOW)]
# One temperature for each variant of the row pass: cosines over it exceed 60, or do not.
TEMPERATURES = [0.2, 0.016]
QUEUES = [None, 50]


def info_nce_loss(*args, **kwargs):
    """The module's present function, which a planted fault replaces."""
    return sys.modules[OP].info_nce_loss(*args, **kwargs)


def problem(
    count: int = 7, width: int = 40, noise: float = 3.0, queue: int | None = None, **options: object
) -> Problem:
    generator = torch.Generator().manual_seed(count)
    q = torch.randn(count, width, generator=generator)
    k = q + noise * torch.randn(count, width, generator=generator)
    if queue is not None:
        options["queue"] = F.normalize(torch.randn(queue, width, generator=generator), dim=1)
    return Problem({"q": q, "k": k, **options}, ("q",))


def sine(shape, a, b):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (a * index + b).sin().float().view(shape).to(kernel_device())


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("temperature", "expected"), [(0.2, 1.7430754), (1.0, 4.4833732)])
def test_golden(temperature, expected, impl):
    """MoCo v3's `contrastive_loss` is this times twice the temperature."""
    loss = info_nce_loss(sine((8, 16), 0.37, 0), sine((8, 16), 0.53, 1), temperature, impl=impl)
    assert 2 * temperature * loss.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("impl", "dtype"), RUNS)
def test_accuracy(impl, dtype, temperature, queue):
    for count, width in ((7, 40), (33, 64)):
        # Keys that have little in common with queries: the loss is of the size of the logits, whose rounding is its.
        case = problem(count, width, noise=30.0, queue=queue, temperature=temperature)
        check_accuracy(info_nce_loss, partial(info_nce, low=dtype), case, dtype, impl)


@settings(max_examples=30, deadline=None)
@given(
    count=st.sampled_from([1, 2, 3, 7, 33, 65]),
    width=st.sampled_from([16, 40, 64]),
    queue=st.sampled_from([None, 1, 2, 33, 200]),
    temperature=st.floats(0.012, 2),
    impl=st.sampled_from(["reference", "triton"]),
)
def test_any_size_and_temperature(count, width, queue, temperature, impl):
    """The loss is a difference of logits, so that rounding is relative to the largest logit, 1 / temperature."""
    case = problem(count, width, queue=queue, temperature=temperature).to(torch.float32, kernel_device())
    got = evaluate(partial(info_nce_loss, impl=impl), case)
    for name, expected in evaluate(info_nce, case.to(torch.float64)).items():
        limit = 2e-6 / temperature
        if name.startswith("gradient"):
            limit *= max(expected.norm().item(), 1 / temperature)
        assert (got[name].cpu() - expected).norm() <= limit, name


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_an_empty_queue_has_no_negative(impl):
    case = problem(5, 16, queue=0).to(torch.float32, kernel_device())
    for value in evaluate(partial(info_nce_loss, impl=impl), case).values():
        assert value.abs().max() < 1e-6


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_queue_is_taken_as_it_is(impl):
    """Rows of a length other than 1 are not normalised, and not promised to be bounded."""
    case = problem(queue=50).to(torch.float32, kernel_device())
    case.inputs["queue"] *= 30
    torch.testing.assert_close(
        evaluate(partial(info_nce_loss, impl=impl), case), evaluate(info_nce, case), rtol=1e-4, atol=1e-4
    )


def test_a_queue_may_be_of_another_dtype():
    case = problem(queue=50)
    low = {**case.inputs, "q": case.inputs["q"].bfloat16(), "k": case.inputs["k"].bfloat16()}
    assert info_nce_loss(**low).item() == pytest.approx(info_nce(**case.inputs).item(), rel=2e-2)


def test_gradients():
    for count, width, temperature, queue in ((1, 3, 0.5, 4), (2, 5, 0.1, None), (7, 8, 0.3, 9), (5, 4, 0.016, None)):
        check_gradients(info_nce_loss, problem(count, width, queue=queue, temperature=temperature))


@pytest.mark.parametrize("queue", QUEUES)
def test_keys_get_no_gradient(queue):
    inputs = {name: value.requires_grad_() for name, value in problem(queue=queue).inputs.items() if value is not None}
    loss = info_nce_loss(**inputs)
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True] + [False] * (len(inputs) - 1)
    del inputs["q"]
    assert not info_nce_loss(problem().inputs["q"], **inputs).requires_grad
    with torch.no_grad():
        assert torch.equal(info_nce_loss(problem().inputs["q"], **inputs), loss)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("queue", QUEUES)
def test_the_gradient_scales_with_its_upstream(queue, impl):
    case = problem(queue=queue).to(torch.float32, kernel_device())
    once = evaluate(partial(info_nce_loss, impl=impl), case)["gradient of q"]
    often = evaluate(lambda **inputs: 1024 * info_nce_loss(**inputs, impl=impl), case)["gradient of q"]
    torch.testing.assert_close(often, 1024 * once, rtol=1e-6, atol=0)


def test_the_gradient_comes_twice_from_a_retained_graph():
    """It is computed forward; backward must not change what is kept."""
    q = problem().inputs["q"].requires_grad_()
    loss = info_nce_loss(q, problem().inputs["k"])
    first, second = (torch.autograd.grad(3 * loss, q, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_of_zeros_give_finite_results(impl, queue):
    for temperature in TEMPERATURES:
        case = problem(temperature=temperature, queue=queue).to(torch.float32, kernel_device())
        case.inputs["q"][2] = 0
        case.inputs["k"][5] = 0
        got = evaluate(partial(info_nce_loss, impl=impl), case)
        assert all(value.isfinite().all() for value in got.values())
        torch.testing.assert_close(got["output 0"], info_nce(**case.inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("count", "width", "queue"), [(1, 8, 16), (17, 40, 64), (64, 128, 1024), (200, 128, 256)])
def test_equals_lightly_with_a_memory_bank(count, width, queue, temperature):
    """Its memory bank is the queue, of which it enqueues the keys after a loss, as MoCo does."""
    losses = pytest.importorskip("lightly.loss")
    lightly = losses.NTXentLoss(temperature=temperature, memory_bank_size=(queue, width))
    for step in range(3):  # so that the last queue holds keys of the first
        generator = torch.Generator().manual_seed(step)
        q, k = (torch.randn(count, width, generator=generator) for _ in range(2))
        case = Problem({"q": q, "k": k, "queue": lightly.memory_bank.bank.clone()}, ("q",))
        ours = evaluate(partial(info_nce_loss, temperature=temperature), case)
        theirs = evaluate(lambda q, k, queue: lightly(q, k), case)
        for name, expected in theirs.items():
            assert (ours[name] - expected).norm() <= 3e-6 / temperature * max(expected.norm().item(), 0.1)


def test_the_module_is_the_function():
    case = problem(queue=50)
    assert torch.equal(InfoNCELoss(temperature=0.1)(**case.inputs), public(**case.inputs, temperature=0.1))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("low", LOW)
def test_autocast_rounds_the_products_only(low, impl):
    """Unit features are rounded to autocast's dtype; the loss and the gradient of float32 features stay float32."""
    case = problem(33).to(torch.float32, kernel_device())
    with torch.autocast(kernel_device().type, low):
        got = evaluate(partial(info_nce_loss, impl=impl), case)
    expected = evaluate(partial(info_nce, low=low), case)
    exact = evaluate(info_nce, case)
    for name, value in got.items():
        assert value.dtype == torch.float32
        error, rounding = ((value - other[name]).norm() for other in (expected, exact))
        if impl == "reference":  # a kernel rounds the weights of its second product, too
            assert error <= 1e-5 * expected[name].norm()
            assert rounding > 4 * error
        assert error <= 2e-2 * expected[name].norm()


def test_autocast_rounds_a_queue_of_float32():
    case = problem(queue=50).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(info_nce_loss, case)
    case.inputs["queue"] = case.inputs["queue"].bfloat16().float()
    torch.testing.assert_close(got, evaluate(partial(info_nce, low=torch.bfloat16), case), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize(("count", "width"), [(3, 16), (33, 40)])
def test_triton_stays_inside_its_buffers(count, width, queue):
    check_guarded(info_nce_loss, problem(count, width, queue=queue).to(torch.float32))


@pytest.mark.parametrize("queue", QUEUES)
def test_ops(queue):
    check_ops(info_nce_loss, problem(queue=queue))
    check_ops(info_nce_loss, problem(1, 16, queue=queue).to(torch.bfloat16))


@pytest.mark.parametrize("queue", QUEUES)
def test_compilation(queue):
    check_compiled(public, problem(queue=queue))
    check_compiled(public, problem(queue=queue).to(torch.bfloat16))
    check_compiled(public, problem(5, queue=queue), problem(9, queue=queue), problem(12, queue=queue))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(
            "positive of another image",
            OP,
            "queries.to(lse.dtype) * positive",
            "queries.to(lse.dtype) * positive.roll(1, 0)",
        ),
        Fault("gradient's positive of another image", OP, "mean - positive if", "mean - positive.roll(1, 0) if"),
        Fault("gradient's positive dropped", OP, "mean - positive if", "mean if"),
        Fault("no temperature for the positive", OP, ".sum(1) / temperature", ".sum(1)"),
        Fault("scale for temperature", OP, "scale = as_scale(1 / temperature", "scale = as_scale(temperature"),
        Fault("no temperature in the gradient", OP, "1 / (temperature * q.shape[0])", "1 / q.shape[0]"),
        Fault("sum in place of mean in the gradient", OP, "1 / (temperature * q.shape[0])", "1 / temperature"),
        Fault("upstream gradient ignored", OP, "gradient * (grad * ctx.factor)", "gradient * ctx.factor"),
        Fault("positive not in the queue's softmax", OP, "torch.logaddexp(lse, logit)", "lse"),
        Fault("queue's softmax not rescaled", OP, "(negatives - lse).exp()[:, None]", "1"),
        Fault("queries not normalised", OP, "unit_rows(q), unit_rows(k.detach())", "q, unit_rows(k.detach())"),
        Fault("keys not normalised", OP, "unit_rows(q), unit_rows(k.detach())", "unit_rows(q), k.detach()"),
        Fault("queue said to be bounded", OP, "bounded = queue is None and", "bounded = queue is not None or"),
        Fault("keys in place of the queue", OP, "if queue is None else queue.to(dtype)", ""),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    def check() -> None:
        for queue in QUEUES:
            for temperature in (0.3, 0.0005):  # e^2000 overflows float64
                case = problem(temperature=temperature, queue=queue, noise=30.0)
                check_accuracy(info_nce_loss, info_nce, case, torch.float64)

    check_noticed(fault, tmp_path, check)


ONES = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(4, 9)}, ValueError, r"q and k must have the same shape.*got \[4, 9\] and \[4, 8\]"),
        ({"k": torch.ones(5, 8)}, ValueError, r"q and k must have the same shape.*got \[4, 8\] and \[5, 8\]"),
        ({"q": torch.ones(8)}, ValueError, r"q must have shape \[N, d\], got \[8\]"),
        ({"k": ONES.long()}, TypeError, "k must be of a floating dtype, got torch.int64; convert"),
        ({"k": ONES.half()}, TypeError, "q is torch.float32 and k torch.float16; convert one"),
        ({"q": ONES[:0], "k": ONES[:0]}, ValueError, "q has no row.*skip the empty batch"),
        ({"q": ONES.to("meta")}, ValueError, r"got q on meta, k on cpu; move them with .to\(device\)"),
        ({"queue": torch.ones(5, 9)}, ValueError, r"queue must have shape \[M, 8\], got \[5, 9\]"),
        ({"queue": torch.ones(5, 8).long()}, TypeError, "queue must be of a floating dtype"),
        ({"queue": torch.ones(5, 8, device="meta")}, ValueError, "got q on cpu, queue on meta; move them"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite positive number, got 0.0"),
        ({"temperature": -0.1}, ValueError, "temperature must be a finite positive number, got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite positive number, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be a finite positive number, got inf"),
        ({"temperature": torch.tensor(0.1)}, TypeError, r"temperature must be a number, got tensor.*pass .item\(\)"),
        ({"group": 3}, TypeError, "group must be a torch.distributed process group or None.*got 3"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto'.*got 'fast'"),
        ({"impl": "cuda"}, UnsupportedError, "no 'cuda' implementation"),
    ],
)
def test_errors_name_the_value_and_the_remedy(change, error, message):
    with pytest.raises(error, match=message):
        public(**{"q": ONES, "k": ONES, **change})


@pytest.mark.parametrize("queue", QUEUES)
def test_explain(queue):
    case = problem(queue=queue).to(torch.float32, kernel_device())
    assert explain(public, **case.inputs) == {"triton": [], "reference": []}
    reasons = explain("info_nce_loss", **problem(2, 600, queue=queue).to(torch.float64, kernel_device()).inputs)
    assert any("queries are 600 wide" in reason for reason in reasons["triton"])
    assert any("queries is float64" in reason for reason in reasons["triton"])
