from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate, upstream
from torch.utils.flop_counter import FlopCounterMode

from vitrail.kernels import UnsupportedError, explain, extension, packed_attention
from vitrail.kernels.packed_attention import (
    chunked,
    flops,  # noqa: F401 - has its operations counted
)
from vitrail.kernels.packed_attention.op import OP

needs_native = pytest.mark.skipif(
    extension.missing() is not None or not torch.cpu._is_avx512_bf16_supported(),
    reason="no extension, or a CPU without AVX-512 BF16",
)
NATIVE = pytest.param("cuda", marks=needs_native)


def attention(
    tokens: tuple[int, int] = (6, 6),
    *,
    heads: int = 2,
    width: int = 16,
    batch: int = 3,
    bias: bool = False,
    **more: object,
) -> Problem:
    """A call on random values with some queries and keys, from one tensor where these are as many as those."""
    queries, keys = tokens
    generator = torch.Generator().manual_seed(queries + keys)
    draw, channels = partial(torch.randn, generator=generator), heads * width
    inputs = {"qkv": draw(batch, queries, 3 * channels)}
    if queries != keys:
        inputs = {"qkv": draw(batch, queries, channels), "kv": draw(batch, keys, 2 * channels)}
    if bias:
        inputs["bias"] = draw(heads, queries, keys)
    return Problem({**inputs, "num_heads": heads, **more}, differentiable=tuple(inputs))


def eager(qkv, kv=None, *, num_heads, bias=None, scale=None):
    q, k, v = qkv.chunk(3, -1) if kv is None else (qkv, *kv.chunk(2, -1))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias[None], scale=scale)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(impl, bias, dtype):
    for tokens in ((6, 6), (1, 9), (7, 3), (17, 17), (5, 1)):
        for width in (1, 5, 16):
            check_accuracy(packed_attention, eager, attention(tokens, width=width, bias=bias), dtype, impl)
    check_accuracy(packed_attention, eager, attention(scale=0.7, bias=bias), dtype, impl)


@pytest.mark.parametrize("block_bytes", [1, 1500, 1 << 20])  # an image, two and all three of 6 tokens
def test_any_number_of_images_at_a_time(monkeypatch, block_bytes):
    monkeypatch.setattr(chunked, "BLOCK_BYTES", block_bytes)
    for tokens in ((6, 6), (1, 4)):
        for bias in (False, True):
            check_accuracy(packed_attention, eager, attention(tokens, bias=bias), torch.float64, "chunked")


@pytest.mark.parametrize("impl", ["reference", NATIVE])
def test_bfloat16(impl):
    """Blocks of 6 queries and of 16, 32, 48 and 64 columns, and what is left of each."""
    for tokens in ((6, 6), (1, 1), (1, 197), (13, 5), (50, 50), (65, 65), (197, 197), (64, 80), (3, 33), (20, 130)):
        for heads, width in ((1, 16), (3, 32), (2, 64), (1, 80), (2, 48), (1, 128)):
            check_accuracy(packed_attention, eager, attention(tokens, heads=heads, width=width), torch.bfloat16, impl)
    check_accuracy(packed_attention, eager, attention((20, 20), scale=0.05), torch.bfloat16, impl)


@needs_native
def test_scores_far_apart():
    """Weights that vanish, and scores that would overflow an exponential."""
    problem = attention((40, 40), width=32, scale=40.0)
    check_accuracy(packed_attention, eager, problem, torch.bfloat16, "cuda")


@needs_native
def test_the_number_of_threads_does_not_change_a_bit():
    problem, threads, results = attention((50, 50), width=64, batch=5).to(torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(evaluate(partial(packed_attention, impl="cuda"), problem))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value)


@needs_native
def test_a_nan_reaches_the_tokens_of_its_image_and_head_alone():
    problem = attention((20, 20), heads=2, width=16).to(torch.bfloat16)
    problem.inputs["qkv"][1, 7, 2 * 32 + 3] = float("nan")  # a value of the first head
    out = packed_attention(**problem.inputs, impl="cuda")
    assert out[1, :, 3].isnan().all()
    assert out.isnan().sum() == 20


@needs_native
def test_views_of_larger_tensors():
    """The extension reads what a projection of more has left, wherever it lies."""
    problem = attention((20, 20), heads=2, width=16).to(torch.bfloat16)
    qkv = problem.inputs["qkv"]
    view = torch.full((4, 25, 120), float("nan"), dtype=torch.bfloat16)[1:, 2:22, 8:104].copy_(qkv)
    expected = evaluate(partial(packed_attention, impl="cuda"), problem)
    view.requires_grad_()
    out = packed_attention(view, num_heads=2, impl="cuda")
    out.backward(upstream(out))
    assert torch.equal(out, expected["output 0"])
    assert torch.equal(view.grad, expected["gradient of qkv"])


def test_gradcheck_and_registration():
    for problem in (attention(), attention((2, 5), width=3, bias=True)):
        check_gradients(partial(packed_attention, impl="chunked"), problem)
        check_gradients(partial(packed_attention, impl="reference"), problem)
        check_ops(packed_attention, problem.to(torch.bfloat16))
        check_compiled(packed_attention, problem.to(torch.bfloat16))
    check_compiled(packed_attention, *(attention((n, n), batch=n) for n in (4, 5, 7)))


def test_nothing_of_the_size_of_the_scores_is_kept():
    qkv, saved = torch.randn(2, 64, 48, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        packed_attention(qkv, num_heads=2)
    assert saved == [qkv.shape]


def test_chunked_in_bf16_is_as_exact_as_plain_products():
    torch.manual_seed(0)
    qkv = torch.randn(4, 50, 3 * 96).bfloat16()
    truth = eager(qkv.double(), num_heads=3)
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    plain = (((q * 32**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    error = (packed_attention(qkv, num_heads=3, impl="chunked").double() - truth).abs().max()
    assert error <= 1.5 * (plain.double() - truth).abs().max()


def test_the_gradient_of_a_bias_is_summed_in_its_own_dtype():
    torch.manual_seed(0)
    qkv, bias = torch.randn(64, 5, 24).bfloat16(), torch.randn(2, 5, 5, requires_grad=True)
    packed_attention(qkv, num_heads=2, bias=bias).sum().backward()
    exact = bias.detach().double().requires_grad_()
    packed_attention(qkv.double(), num_heads=2, bias=exact).sum().backward()
    assert bias.grad.dtype == torch.float32
    torch.testing.assert_close(bias.grad.double(), exact.grad, rtol=0.03, atol=0.03 * exact.grad.abs().max().item())


def test_its_operations_are_counted():
    """Two products forward; backward the scores once more, and four."""
    for tokens, product in (((6, 6), 2 * 3 * 6 * 6 * 32), ((2, 5), 2 * 3 * 2 * 5 * 32)):
        with FlopCounterMode(display=False) as counter:
            evaluate(packed_attention, attention(tokens))
        assert counter.get_total_flops() == 7 * product


def test_autocast_converts_what_is_projected():
    problem = attention()
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_attention(**problem.inputs)
        assert packed_attention(**problem.to(torch.float64).inputs).dtype == torch.float64
    assert torch.equal(out, packed_attention(**problem.to(torch.bfloat16).inputs))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": torch.ones(1, 2, 6, dtype=torch.int64)}, TypeError, "qkv must be of a floating dtype"),
        ({"qkv": torch.ones(2, 6)}, ValueError, r"qkv must have shape \[B, N, 3D\]"),
        ({"num_heads": 5}, ValueError, r"qkv has 96 channels, expected a multiple of 3 \* num_heads = 15"),
        ({"num_heads": 0}, ValueError, "queries, keys and values of every head"),
        ({"kv": torch.ones(3, 4, 96)}, ValueError, r"kv must have shape \[3, M, 192\], got \[3, 4, 96\]"),
        ({"kv": torch.ones(3, 4, 192).bfloat16()}, TypeError, "kv is torch.bfloat16, but qkv torch.float32"),
        ({"kv": torch.ones(3, 0, 192)}, ValueError, "nothing to attend to"),
        ({"bias": torch.ones(2, 6, 5)}, ValueError, r"bias must have shape \[2, 6, 6\], got \[2, 6, 5\]"),
        ({"impl": "flash"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_calls(changes, error, message):
    with pytest.raises(error, match=message):
        packed_attention(**{**attention().inputs, **changes})


@needs_native
def test_what_the_cpu_takes(monkeypatch):
    good = attention().to(torch.bfloat16)
    assert explain(packed_attention, **good.inputs) == {"cuda": [], "chunked": [], "reference": []}
    odd = torch.ones(3, 6, 97, dtype=torch.bfloat16)[..., :96]
    for refused, message in (
        (attention(), "qkv is float32; the kernel takes bfloat16"),
        (attention(width=8).to(torch.bfloat16), "heads are 8 wide"),
        (attention(bias=True).to(torch.bfloat16), "adds no bias"),
        (Problem({"qkv": odd, "num_heads": 2}), r"strides \[582, 97, 1\] .* even ones"),
    ):
        (reason,) = explain(packed_attention, **refused.inputs)["cuda"]
        assert message.split(" .* ")[-1].replace("\\", "") in reason
    (reason,) = OP.implementation("cuda").why_not("forward", (torch.empty(1, 2, 48, device="meta"), None, None, 1, 1.0))
    assert "has the CPU's side alone" in reason
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    (reason,) = explain(packed_attention, **good.inputs)["cuda"]
    assert "no AVX-512 with BF16" in reason
    with pytest.raises(UnsupportedError, match="no AVX-512 with BF16"):
        packed_attention(**good.inputs, impl="cuda")


@needs_native
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(2, 3, 1, 16), "out must be bfloat16, got float32"),
        (0, torch.ones(2, 4, 1, 16, dtype=torch.bfloat16), r"out must have shape \[2, 3, 1, 16\]"),
        (1, torch.ones(2, 3, 1, 8, dtype=torch.bfloat16), "heads are 8 wide; the op takes multiples of 16"),
        (1, torch.ones(2, 3, 16, dtype=torch.bfloat16), r"q and k must have shape \[B, N, heads, width\]"),
        (2, torch.ones(2, 0, 1, 16, dtype=torch.bfloat16), "there are no keys to attend to"),
        (3, torch.ones(2, 4, 1, 16, dtype=torch.bfloat16), r"v must have shape \[2, 5, 1, 16\]"),
        (3, torch.ones(2, 5, 1, 32, dtype=torch.bfloat16)[..., ::2], "v has strides"),
    ],
)
def test_the_extension_checks_what_it_gets(position, value, message):
    tokens = (3, 3, 5, 5)
    arguments: list = [torch.ones(2, count, 1, 16, dtype=torch.bfloat16) for count in tokens]
    extension.ops().attention_out(*arguments, 0.25)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        extension.ops().attention_out(*arguments, 0.25)
