from functools import partial

import pytest
import torch
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate

from vitrail.engine.models.block import GELULinear
from vitrail.kernels import bias_gelu, explain, extension
from vitrail.kernels.bias_gelu.op import OP

needs_native = pytest.mark.skipif(
    extension.missing() is not None or not torch.cpu._is_avx512_bf16_supported(),
    reason="no extension, or a CPU without AVX-512 BF16",
)
SHAPES = ((1, 16), (3, 48), (70, 32), (2, 5, 64), (4, 0, 16))


def sums(*shape: int) -> Problem:
    """A call on random values, far enough from zero that tails matter."""
    generator = torch.Generator().manual_seed(shape[0])
    inputs = {"x": 3 * torch.randn(shape, generator=generator), "bias": torch.randn(shape[-1], generator=generator)}
    return Problem(inputs, differentiable=("x", "bias"))


def eager(x, bias):
    """By the distribution itself; torch's GELU is the reference's."""
    y = x + bias
    return y * torch.special.ndtr(y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(dtype):
    for shape in (*SHAPES, (7, 5)):
        check_accuracy(bias_gelu, eager, sums(*shape), dtype, "reference")


@needs_native
def test_the_extension():
    for shape in SHAPES:
        check_accuracy(bias_gelu, eager, sums(*shape), torch.bfloat16, "cuda")


@needs_native
def test_every_value_of_bfloat16():
    """All of them that are finite: the value, and the slope as the gradient for a gradient of one."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].view(-1, 16)
    bias = torch.zeros(16)
    problem = Problem({"x": x, "bias": bias}, differentiable=("x",))
    exact = x.double().requires_grad_()
    y = eager(exact, bias.double())
    y.sum().backward()
    leaf = x.clone().requires_grad_()
    out = bias_gelu(leaf, bias, impl="cuda")
    out.backward(torch.ones_like(out))
    for got, expected in ((out, y), (leaf.grad, exact.grad)):
        ok = (got.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6
        assert ok.all(), problem.inputs["x"][~ok]


@needs_native
def test_what_is_not_finite():
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([float("nan"), float("inf")])
    out = bias_gelu(x, torch.zeros(16), impl="cuda")
    assert out[0, 0].isnan()
    assert out[0, 1] == float("inf")
    assert not out[0, 2:].any()


@needs_native
def test_the_number_of_threads_does_not_change_a_bit():
    problem, threads, results = sums(70, 32).to(torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(evaluate(partial(bias_gelu, impl="cuda"), problem))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value)


def test_gradcheck_and_registration():
    check_gradients(bias_gelu, sums(3, 5))
    for dtype in (torch.bfloat16, torch.float32):
        check_ops(bias_gelu, sums(3, 16).to(dtype))
        check_compiled(bias_gelu, sums(3, 16).to(dtype))
    check_compiled(bias_gelu, *(sums(n, 16) for n in (4, 5, 7)))


def test_the_layer_is_a_linear_one_and_a_gelu():
    torch.manual_seed(0)
    layer, plain = GELULinear(24, 32).double(), torch.nn.Linear(24, 32).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    found, expected = layer(x), torch.nn.functional.gelu(plain(x))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 16, dtype=torch.int64)}, TypeError, "x must be of a floating dtype"),
        ({"x": torch.ones(16)}, ValueError, r"x must have shape \[..., 16\], .* got \[16\]"),
        ({"x": torch.ones(2, 17)}, ValueError, r"the last size that of the bias, got \[2, 17\]"),
        ({"bias": torch.ones(1, 16)}, ValueError, r"bias must have shape \[C\]"),
        ({"impl": "triton"}, RuntimeError, "the op has no 'triton' implementation"),
    ],
)
def test_bad_calls(changes, error, message):
    with pytest.raises(error, match=message):
        bias_gelu(**{**sums(3, 16).inputs, **changes})


@needs_native
def test_what_the_cpu_takes(monkeypatch):
    good = sums(3, 16).to(torch.bfloat16)
    assert explain(bias_gelu, **good.inputs) == {"cuda": [], "reference": []}
    turned = Problem({"x": good.inputs["x"].t().contiguous().t(), "bias": good.inputs["bias"]})
    for refused, message in (
        (sums(3, 16), "x is float32; the kernel takes bfloat16"),
        (sums(3, 24).to(torch.bfloat16), "there are 24 columns"),
        (turned, "x has strides [1, 3]; the kernel takes adjacent values"),
    ):
        (reason,) = explain(bias_gelu, **refused.inputs)["cuda"]
        assert message in reason
    (reason,) = OP.implementation("cuda").why_not("forward", (torch.empty(2, 16, device="meta"), torch.empty(16)))
    assert "has the CPU's side alone" in reason
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    (reason,) = explain(bias_gelu, **good.inputs)["cuda"]
    assert "no AVX-512 with BF16" in reason


@needs_native
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(3, 16), "grad_x must be bfloat16, got float32"),
        (1, torch.ones(0, 16), r"bias_parts must have shape \[parts, 16\]"),
        (1, torch.ones(2, 15), "bias_parts must hold 32 adjacent values"),
        (2, torch.ones(2, 16, dtype=torch.bfloat16), "grad must hold 48 adjacent values"),
        (3, torch.ones(3, 32, dtype=torch.bfloat16), "x must have 16 columns"),
        (4, torch.ones(24), "whose size is a multiple of 16, got sizes"),
        (4, torch.ones(16, dtype=torch.bfloat16), "bias must be float32"),
    ],
)
def test_the_extension_checks_what_it_gets(position, value, message):
    half = partial(torch.ones, 3, 16, dtype=torch.bfloat16)
    arguments: list = [half(), torch.ones(2, 16), half(), half(), torch.ones(16)]
    extension.ops().bias_gelu_backward_out(*arguments)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        extension.ops().bias_gelu_backward_out(*arguments)
