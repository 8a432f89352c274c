import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from dense_losses import nt_xent
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded

from vitrail.kernels import NTXentLoss, UnsupportedError, explain
from vitrail.kernels import nt_xent_loss as public
from vitrail.kernels.nt_xent_loss import op

OP = op.__name__
LOW = [torch.bfloat16, torch.float16]
RUNS = [("reference", torch.float64)]
RUNS += [(impl, dtype) for impl in ("reference", "triton") for dtype in (torch.float32, *LOW)]
# One temperature for each variant of the row pass: cosines over it exceed 60, or do not.
TEMPERATURES = [0.1, 0.016]


def nt_xent_loss(*args, **kwargs):
    """The module's present function, which a planted fault replaces."""
    return sys.modules[OP].nt_xent_loss(*args, **kwargs)


def problem(count: int = 7, width: int = 40, noise: float = 3.0, **options: object) -> Problem:
    generator = torch.Generator().manual_seed(count)
    z1 = torch.randn(count, width, generator=generator)
    z2 = z1 + noise * torch.randn(count, width, generator=generator)
    return Problem({"z1": z1, "z2": z2, **options}, ("z1", "z2"))


def sine(shape, a, b):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (a * index + b).sin().float().view(shape).to(kernel_device())


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_golden(impl):
    """SimCLR's TensorFlow code adds the two directions, and computes twice this: 20.3458481."""
    loss = nt_xent_loss(sine((8, 16), 0.37, 0), sine((8, 16), 0.53, 1), 0.1, impl=impl)
    assert loss.item() == pytest.approx(10.1729240, abs=3e-6)
    assert 2 * loss.item() == pytest.approx(20.3458481, abs=6e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("impl", "dtype"), RUNS)
def test_accuracy(impl, dtype, temperature):
    for count, width in ((7, 40), (33, 64)):
        # Views that have little in common: the loss is of the size of the logits, whose rounding then is its own.
        case = problem(count, width, noise=30.0, temperature=temperature)
        check_accuracy(nt_xent_loss, partial(nt_xent, low=dtype), case, dtype, impl)


@settings(max_examples=30, deadline=None)
@given(
    count=st.sampled_from([1, 2, 3, 7, 33, 65]),
    width=st.sampled_from([16, 40, 64]),
    temperature=st.floats(0.012, 2),
    impl=st.sampled_from(["reference", "triton"]),
)
def test_any_size_and_temperature(count, width, temperature, impl):
    """The loss is a difference of logits, so that rounding is relative to the largest logit, 1 / temperature."""
    case = problem(count, width, temperature=temperature).to(torch.float32, kernel_device())
    got = evaluate(partial(nt_xent_loss, impl=impl), case)
    for name, expected in evaluate(nt_xent, case.to(torch.float64)).items():
        limit = 2e-6 / temperature
        if name.startswith("gradient"):
            limit *= max(expected.norm().item(), 1 / temperature)
        assert (got[name].cpu() - expected).norm() <= limit, name


def test_the_variants_meet():
    """On either side of the temperature at which the maximum is needed, the loss is the same function."""
    boundary = 1.01 / 60
    for impl in ("reference", "triton"):
        below, above = (
            evaluate(partial(nt_xent_loss, impl=impl), problem(temperature=boundary * factor).to(torch.float32))
            for factor in (1 - 1e-6, 1 + 1e-6)
        )
        for name, value in above.items():
            torch.testing.assert_close(below[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_one_image_has_no_negative(impl):
    case = problem(1, 16, temperature=0.5).to(torch.float32, kernel_device())
    for value in evaluate(partial(nt_xent_loss, impl=impl), case).values():
        assert value.abs().max() < 1e-5


def test_gradients():
    for count, width, temperature in ((1, 3, 0.5), (2, 5, 0.1), (7, 8, 0.3), (5, 4, 0.016)):
        check_gradients(nt_xent_loss, problem(count, width, temperature=temperature))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("names", [("z1",), ("z2",), ()])
def test_gradients_of_some(names, impl):
    case = problem().to(torch.float32, kernel_device())
    every = evaluate(partial(nt_xent_loss, impl=impl), case)
    some = evaluate(partial(nt_xent_loss, impl=impl), Problem(case.inputs, names))
    assert len(some) == 1 + len(names)
    torch.testing.assert_close(some, {name: every[name] for name in some})
    with torch.no_grad():
        assert torch.equal(nt_xent_loss(**case.inputs, impl=impl), some["output 0"])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_gradient_scales_with_its_upstream(impl):
    for dtype in (torch.float32, torch.float16):
        case = problem().to(dtype, kernel_device())
        once = evaluate(partial(nt_xent_loss, impl=impl), case)
        often = evaluate(lambda impl=impl, **inputs: 1024 * nt_xent_loss(**inputs, impl=impl), case)
        for name in ("gradient of z1", "gradient of z2"):
            torch.testing.assert_close(often[name].float(), 1024 * once[name].float(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_of_zeros_give_finite_results(impl):
    for temperature in TEMPERATURES:
        case = problem(temperature=temperature).to(torch.float32, kernel_device())
        case.inputs["z1"][2] = 0
        case.inputs["z2"][5] = 0
        got = evaluate(partial(nt_xent_loss, impl=impl), case)
        assert all(value.isfinite().all() for value in got.values())
        torch.testing.assert_close(got["output 0"], nt_xent(**case.inputs), rtol=1e-5, atol=1e-5)


def test_extreme_temperatures_stay_finite():
    for temperature in (1e-4, 1e3):
        got = evaluate(nt_xent_loss, problem(temperature=temperature).to(torch.float32))
        assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("temperature", [0.05, 0.07, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("count", "width"), [(1, 8), (2, 16), (17, 40), (64, 128), (200, 128)])
def test_equals_lightly(count, width, temperature):
    lightly = pytest.importorskip("lightly.loss").NTXentLoss(temperature=temperature)
    case = problem(count, width, temperature=temperature)
    theirs = evaluate(lambda z1, z2, temperature: lightly(z1, z2), case)
    ours = evaluate(nt_xent_loss, case)
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 3e-6 / temperature * max(expected.norm().item(), 0.1)


def test_the_module_is_the_function():
    case = problem(temperature=0.2)
    module = NTXentLoss(temperature=0.2)
    assert torch.equal(module(case.inputs["z1"], case.inputs["z2"]), public(**case.inputs))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("low", LOW)
def test_autocast_rounds_the_products_only(low, impl):
    """Unit features are rounded to autocast's dtype; the loss and the gradient of float32 features stay float32."""
    case = problem(33).to(torch.float32, kernel_device())
    with torch.autocast(kernel_device().type, low):
        got = evaluate(partial(nt_xent_loss, impl=impl), case)
    expected = evaluate(partial(nt_xent, low=low), case)
    exact = evaluate(nt_xent, case)
    for name, value in got.items():
        assert value.dtype == torch.float32
        error, rounding = ((value - other[name]).norm() for other in (expected, exact))
        if impl == "reference":  # a kernel rounds the weights of its second product, too
            assert error <= 1e-5 * expected[name].norm()
            assert rounding > 4 * error
        assert error <= 2e-2 * expected[name].norm()


def test_autocast_leaves_float64_alone():
    case = problem().to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(nt_xent_loss, case)
    torch.testing.assert_close(got, evaluate(nt_xent, case))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("count", "width"), [(3, 16), (33, 40)])
def test_triton_stays_inside_its_buffers(count, width, temperature):
    check_guarded(nt_xent_loss, problem(count, width, temperature=temperature).to(torch.float32))


def test_ops():
    check_ops(nt_xent_loss, problem())
    check_ops(nt_xent_loss, problem(1, 16).to(torch.bfloat16))


def test_compilation():
    check_compiled(public, problem())
    check_compiled(public, problem().to(torch.bfloat16))
    check_compiled(public, problem(5), problem(9), problem(12))


MODULE_FAULTS = [
    Fault("own view not excluded", OP, "*([rank * rows], cosines", "*([], cosines"),
    Fault("own view not excluded backward", OP, "[-ctx.rank * rows]", "[]"),
    Fault("positive of another image", OP, "(first * second)", "(first * second.roll(1, 0))"),
    Fault("gradient's positive of another image", OP, ".roll(rows // 2, 0)", ".roll(1, 0)"),
    Fault("gradient's positive counted once", OP, "(mean - 2 * positive)", "(mean - positive)"),
    Fault("gradient of keys dropped", OP, ".add_(as_key)", ""),
    Fault("gradient of queries dropped", OP, "(mean - 2 * positive)", "(-2 * positive)"),
    Fault("mean over images in the gradient", OP, "1 / (ctx.temperature * rows)", "2 / (ctx.temperature * rows)"),
    Fault("no temperature in the gradient", OP, "1 / (ctx.temperature * rows)", "1 / rows"),
    Fault("no temperature for the positive", OP, ".sum(1) / temperature", ".sum(1)"),
    Fault("scale for temperature", OP, "scale = as_scale(1 / temperature", "scale = as_scale(temperature"),
    Fault("upstream gradient ignored by keys", OP, "as_key *= factor", "as_key *= 1"),
    Fault("upstream gradient ignored by queries", OP, ".mul_(grad)", ""),
    Fault(
        "features not normalised",
        OP,
        "z = torch.cat([unit_rows(z1), unit_rows(z2)])\n    result",
        "z = torch.cat([z1, z2])\n    result",
    ),
    Fault("maximum not subtracted", OP, "[rank * rows], cosines_are_bounded(temperature)", "[rank * rows], True"),
]


@pytest.mark.parametrize("fault", MODULE_FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_are_noticed(fault, tmp_path):
    def check() -> None:
        for temperature in (0.3, 0.0005):  # e^2000 overflows float64
            check_accuracy(nt_xent_loss, nt_xent, problem(temperature=temperature), torch.float64)

    check_noticed(fault, tmp_path, check)


ONES = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z1": torch.ones(4, 9)}, ValueError, r"z1 and z2 must have the same shape.*got \[4, 9\] and \[4, 8\]"),
        ({"z2": torch.ones(5, 8)}, ValueError, r"z1 and z2 must have the same shape.*got \[4, 8\] and \[5, 8\]"),
        ({"z1": torch.ones(4, 8, 1)}, ValueError, r"z1 must have shape \[N, d\], got \[4, 8, 1\]"),
        ({"z2": ONES.long()}, TypeError, "z2 must be of a floating dtype, got torch.int64; convert"),
        ({"z2": ONES.half()}, TypeError, "z1 is torch.float32 and z2 torch.float16; convert one"),
        ({"z1": ONES[:0], "z2": ONES[:0]}, ValueError, "z1 has no row.*skip the empty batch"),
        ({"z1": ONES.to("meta")}, ValueError, r"got z1 on meta, z2 on cpu; move them with .to\(device\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite positive number, got 0.0"),
        ({"temperature": -0.1}, ValueError, "temperature must be a finite positive number, got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite positive number, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be a finite positive number, got inf"),
        ({"temperature": torch.tensor(0.1)}, TypeError, r"temperature must be a number, got tensor.*pass .item\(\)"),
        ({"group": "WORLD"}, TypeError, "group must be a torch.distributed process group or None.*got 'WORLD'"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto'.*got 'fast'"),
        ({"impl": "cuda"}, UnsupportedError, "no 'cuda' implementation"),
    ],
)
def test_errors_name_the_value_and_the_remedy(change, error, message):
    with pytest.raises(error, match=message):
        public(**{"z1": ONES, "z2": ONES, **change})


def test_explain():
    case = problem().to(torch.float32, kernel_device())
    assert explain(public, **case.inputs) == {"triton": [], "reference": []}
    reasons = explain("nt_xent_loss", **problem(2, 600).to(torch.float64, kernel_device()).inputs)["triton"]
    assert any("queries are 600 wide" in reason for reason in reasons)
    assert any("queries is float64" in reason for reason in reasons)


# In a process of its own: what earlier tests leave in the allocator would count.
MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from bench.memory import peak_of
from vitrail.kernels import nt_xent_loss

for count in map(int, sys.argv[2:]):
    z1, z2 = (torch.randn(count, 128).requires_grad_() for _ in range(2))
    print(peak_of(lambda: torch.autograd.grad(nt_xent_loss(z1, z2), (z1, z2)), torch.device("cpu")))
"""


@pytest.mark.slow
def test_memory_grows_linearly():
    """A dense form holds a float32 matrix of logits and one of their gradients at least; eager PyTorch several."""
    counts = [1024, 2048, 4096, 8192, 16384]  # images: two views of each
    harness = Path(__file__).parents[2] / "benchmarks" / "harness"
    # What the first call of all sets up does not count.
    command = [sys.executable, "-c", MEMORY, str(harness), *map(str, [256, *counts])]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()[1:]
    if "None" in printed:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    peaks = [int(value) for value in printed]
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (counts, peaks))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    print("peaks in MB:", [value / 1e6 for value in peaks], "slope", slope.item())
    assert slope <= 1.2
    for count, value in list(zip(counts, peaks, strict=True))[-2:]:
        dense = 2 * 4 * (2 * count) ** 2
        assert 20 * value <= dense
