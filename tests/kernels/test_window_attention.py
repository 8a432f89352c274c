import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate
from ladder_faults import Fault, check_noticed
from swin_windows import eager, region_mask, windows
from swin_windows import relative_index as eager_index

from vitrail.kernels import explain, extension, window_attention
from vitrail.kernels.window_attention.op import OP
from vitrail.kernels.window_attention.reference import Run, _fold, _whole_bias, relative_index, runs, tiles

NATIVE = pytest.param("cuda", marks=pytest.mark.skipif(extension.missing() is not None, reason="no extension"))
REFERENCE = "vitrail.kernels.window_attention.reference"
HALF = (torch.float16, torch.bfloat16)
SIZES = ((7, 7), (14, 14), (6, 6), (3, 3), (12, 9), (24, 24), (56, 28), (5, 17))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [7, 14, 6, 16, 8])
def test_values_and_gradients(window, shifted):
    for number, size in enumerate(SIZES):
        bias = number % 3 > 0 or size == (24, 24)
        width = (16, 32, 64, 128)[number % 4]
        case = windows(size, window, window // 2 if shifted else 0, width=width, batch=1, bias=bias)
        if bias and all(side % window == 0 for side in size):  # the formula has no gradient without padding
            case = replace(case, differentiable=("qkv", "bias_table"))
        check_accuracy(window_attention, eager, case, torch.float64)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        *(("reference", dtype) for dtype in (torch.float32, *HALF)),
        *(pytest.param("cuda", dtype, marks=NATIVE.marks) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_accuracy_in_every_dtype(impl, dtype):
    for size, window, shift in (((14, 14), 7, 3), ((14, 14), 7, 0), ((9, 12), 7, 3), ((6, 6), 7, 3), ((24, 24), 14, 7)):
        case = windows(size, window, shift, width=32)
        if size == (14, 14):
            case = replace(case, differentiable=("qkv", "bias_table"))
        check_accuracy(window_attention, eager, case, dtype, impl)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("impl", [NATIVE])
@pytest.mark.parametrize("window", [7, 14, 6, 16, 8])
def test_float32(window, impl, shifted):
    for number, size in enumerate(SIZES):
        bias = number % 3 > 0 or size == (24, 24)
        case = windows(size, window, window // 2 if shifted else 0, width=(16, 32, 48, 128)[number % 4], bias=bias)
        if bias and all(side % window == 0 for side in size):
            case = replace(case, differentiable=("qkv", "bias_table"))
        check_accuracy(window_attention, eager, case, torch.float32, impl)


@pytest.mark.parametrize("impl", [NATIVE])
def test_parts_of_several_images(impl):
    """With many heads the backward pass takes several images at a time; two and three of five here."""
    check_accuracy(window_attention, eager, windows((5, 3), 4, 1, heads=24, batch=5), torch.float32, impl)


@pytest.mark.parametrize("impl", [NATIVE])
def test_the_number_of_threads_does_not_change_a_bit(impl):
    case = windows((24, 20), shift=3, width=32, batch=5).to(torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(partial(window_attention, impl=impl), case))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(value, results[0][name]) for name, value in result.items())


@pytest.mark.parametrize("impl", ["reference", NATIVE])
def test_a_nan_stays_in_its_rectangle_and_large_scores_are_finite(impl):
    case = windows((14, 14), shift=3, width=16).inputs
    case["qkv"][:, 0, 0] = torch.nan
    out = window_attention(**case, impl=impl)
    assert out[:, :3, :3].isnan().all()
    assert out[:, 3:].isfinite().all()
    assert out[:, :, 3:].isfinite().all()
    large = windows((9, 9), width=16, scale=300.0).to(torch.float32)
    for name, value in evaluate(partial(window_attention, impl=impl), large).items():
        assert value.isfinite().all(), name


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.integers(1, 9),
    shift=st.integers(0, 8),
    heads=st.integers(1, 3),
    width=st.integers(1, 9),
    batch=st.integers(1, 3),
    scale=st.sampled_from([None, 0.0, 1.5]),
)
def test_any_size(size, window, shift, heads, width, batch, scale):
    case = windows(size, window, shift % window, heads, width, batch, scale=scale)
    if all(side % window == 0 for side in size):
        case = replace(case, differentiable=("qkv", "bias_table"))
    check_accuracy(window_attention, eager, case, torch.float64)


def test_no_image():
    case = windows(batch=0)
    for name, value in evaluate(window_attention, case).items():
        assert value.count_nonzero() == 0, name


def test_the_index_of_relative_positions():
    """Numbers from the published model with windows of 7."""
    for index in (relative_index(7, torch.device("cpu")), eager_index(7)):
        assert index[0, :9].tolist() == [84, 83, 82, 81, 80, 79, 78, 71, 70]
        assert (index[48, 0].item(), index[0, 48].item(), index.sum().item()) == (168, 0, 201_684)
    for window in (1, 6, 14):
        assert torch.equal(relative_index(window, torch.device("cpu")), eager_index(window))


@pytest.mark.parametrize("window", [1, 2, 7])
def test_folding_is_the_transpose_of_unfolding(window):
    """Small integers, whose sums are exact."""
    table = torch.randint(-8, 9, ((2 * window - 1) ** 2, 3)).double()
    whole = _whole_bias(table, window)
    grad = torch.randint(-8, 9, whole.shape).double()
    expected = torch.zeros_like(table)
    expected.index_add_(0, eager_index(window).flatten(), grad.flatten(3).flatten(1, 2).flatten(1).t())
    assert torch.equal(_fold(grad), expected)


@pytest.mark.parametrize(
    ("window", "shift", "canvas", "masked"),
    [
        (7, 3, 56, 18_240),
        (7, 3, 28, 8_832),
        (7, 3, 14, 4_128),
        (7, 3, 7, 1_776),
        (14, 7, 56, 144_060),
        (14, 7, 28, 67_228),
        (14, 7, 14, 28_812),
    ],
)
def test_as_many_pairs_are_kept_apart_as_the_published_masks_hold(window, shift, canvas, masked):
    pairs = (canvas // window) ** 2 * window**4
    seen = sum(
        some.rows.count * some.columns.count * (some.rows.real * some.columns.real) ** 2
        for some in tiles(canvas, canvas, window, shift)
    )
    assert pairs - seen == masked == region_mask(canvas, canvas, window, shift).sum()


def test_segments():
    assert runs(56, 7, 0) == [Run(0, 8, 7, 7)]
    assert runs(56, 7, 3) == [Run(0, 1, 3, 3), Run(3, 7, 7, 7), Run(52, 1, 4, 4)]
    assert runs(24, 7, 3) == [Run(0, 1, 3, 3), Run(3, 3, 7, 7)]  # the last segment is padding alone
    assert runs(6, 7, 3) == [Run(0, 1, 3, 3), Run(3, 1, 3, 4)]
    assert runs(3, 14, 0) == [Run(0, 1, 3, 14)]


def test_gradients_in_float64():
    """Padding, shift, a map that is no square; and the edges of the map in windows of their own."""
    check_gradients(window_attention, windows((3, 5), 4, 1, width=3))
    check_gradients(window_attention, windows((4, 3), 2, 1, heads=1, width=2, batch=1, bias=False))


def test_ops_and_compilation():
    for case in (windows(), windows((7, 7), shift=0, bias=False)):
        check_ops(window_attention, case.to(torch.bfloat16))
        check_compiled(window_attention, case)
    check_compiled(partial(window_attention), *(windows(batch=batch) for batch in (2, 3, 5)))


@pytest.mark.parametrize("impl", ["reference", NATIVE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_runs_give_the_same_bits(dtype, impl):
    case, function = windows((24, 20), shift=3, width=32, batch=4).to(dtype), partial(window_attention, impl=impl)
    expected = evaluate(function, case)
    for _ in range(20):
        assert all(torch.equal(value, expected[name]) for name, value in evaluate(function, case).items())


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_takes_qkv_and_leaves_the_table(dtype):
    case = windows(width=32)
    rounded = Problem({**case.inputs, "qkv": case.inputs["qkv"].to(dtype)}, case.differentiable)
    expected = evaluate(window_attention, rounded)
    with torch.autocast("cpu", dtype):
        got = evaluate(window_attention, case)
    assert got["output 0"].dtype == dtype
    assert got["gradient of bias_table"].dtype == got["gradient of qkv_bias"].dtype == torch.float32
    assert got["gradient of qkv"].dtype == torch.float32
    for name, value in expected.items():
        assert torch.equal(got[name].to(value.dtype), value), name
    with torch.autocast("cpu", dtype):
        assert window_attention(**case.to(torch.float64).inputs).dtype == torch.float64


def test_any_strides():
    case = windows()
    expected = evaluate(window_attention, case)
    qkv = case.inputs["qkv"]
    wide = torch.cat([qkv, qkv], dim=-1)
    layouts = {
        "part of wider rows": lambda x: torch.cat([x, wide], dim=-1)[..., : x.shape[-1]],
        "channels first": lambda x: x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
    }
    for name, layout in layouts.items():

        def call(qkv, layout=layout, **rest):
            view = layout(qkv)
            assert not view.is_contiguous()
            out = window_attention(view, **rest)
            assert out.is_contiguous()
            return out.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # whose gradient is not contiguous either

        for part, value in evaluate(call, case).items():
            torch.testing.assert_close(value, expected[part], msg=f"{name}: {part}")


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_lie_as_a_compiler_expects(impl, dtype):
    """A compiled backward relies on the strides that the op has promised: contiguous ones."""
    case = windows()
    given = {name: x.to(dtype).requires_grad_() for name, x in case.inputs.items() if name in case.differentiable}
    options = {name: x for name, x in case.inputs.items() if name not in given}
    out = window_attention(**given, **options, impl=impl)
    gradients = torch.autograd.grad(out, list(given.values()), torch.ones_like(out))
    assert all(gradient.is_contiguous() for gradient in gradients)


def test_some_gradients_only():
    case = windows()
    expected = evaluate(window_attention, case)
    for name in case.differentiable:
        alone = evaluate(window_attention, replace(case, differentiable=(name,)))
        assert torch.equal(alone[f"gradient of {name}"], expected[f"gradient of {name}"])


def test_what_is_saved():
    """The inputs, the result and its log-sum-exp: nothing that grows with the square of a window."""
    case = windows((14, 14), width=32)
    inputs = {name: value.requires_grad_() for name, value in case.inputs.items() if name in case.differentiable}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        window_attention(**{**case.inputs, **inputs})
    tokens = 2 * 14 * 14
    own = [
        tensor.numel() for tensor in saved if all(tensor.data_ptr() != value.data_ptr() for value in inputs.values())
    ]
    assert sorted(own) == [tokens * 2, tokens * 2 * 32]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": torch.ones(2, 9, 12, 96, dtype=torch.int64)}, TypeError, "qkv must be of a floating dtype"),
        ({"qkv": torch.ones(2, 108, 96)}, ValueError, r"qkv must have shape \[B, H, W, 3C\], got \[2, 108, 96\]"),
        ({"num_heads": 5}, ValueError, r"qkv has 96 channels, expected a multiple of 3 \* num_heads = 15"),
        ({"num_heads": 4}, ValueError, r"bias_table must have shape \[169, 4\].*got \[169, 2\]"),
        ({"window_size": 6, "shift": 0}, ValueError, r"bias_table must have shape \[121, 2\].*is window_size=6 right"),
        ({"window_size": 17}, ValueError, "window_size must be between 1 and 16, got 17"),
        ({"shift": 7}, ValueError, "shift must be between 0 and window_size - 1 = 6, got 7"),
        ({"shift": -1}, ValueError, "shift must be between 0 and window_size - 1 = 6, got -1"),
        ({"qkv_bias": torch.ones(32)}, ValueError, r"qkv_bias must have shape \[96\], got \[32\]"),
        ({"bias_table": torch.ones(2)}, ValueError, r"bias_table must have shape \[\(2w-1\)², heads\], got \[2\]"),
        ({"bias_table": torch.ones(169, 2, device="meta")}, ValueError, "all tensors must be on one device"),
        ({"impl": "eager"}, ValueError, "impl must be one of"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        window_attention(**{**windows().inputs, **changes})


@pytest.mark.skipif(extension.missing() is not None, reason="no extension")
def test_what_the_cpu_takes():
    case = windows(width=32)
    assert explain(window_attention, **case.inputs)["cuda"] == []
    half, narrow = case.to(torch.float16), windows(width=8)
    for refused, message in ((half, "qkv is float16; the kernel takes bfloat16"), (narrow, "heads are 8 wide")):
        (reason,) = explain(window_attention, **refused.inputs)["cuda"]
        assert message in reason
    elsewhere = [torch.empty(1, 7, 7, 96, device="meta"), *(torch.empty(0, device="meta") for _ in range(2))]
    (reason,) = OP.implementation("cuda").why_not("forward", (*elsewhere, 7, 0, 2, 1.0))
    assert "has the CPU's side alone" in reason


@pytest.mark.skipif(extension.missing() is not None, reason="no extension")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(1, 3, 3, 16, dtype=torch.bfloat16), "out must be float32, got bfloat16"),
        (0, torch.ones(1, 3, 4, 16), r"out must have shape \[1, 3, 3, 16\], got \[1, 3, 4, 16\]"),
        (1, torch.ones(1, 1, 3, 4), "lse must hold 9 adjacent values"),
        (2, torch.ones(1, 3, 3, 45), "qkv has 45 channels"),
        (2, torch.ones(1, 3, 48, 3).mT, r"qkv has strides .* pass qkv.contiguous\(\)"),
        (2, torch.ones(1, 3, 3, 48).half(), "qkv must be bfloat16 or float32, got float16"),
        (3, torch.ones(8, 1), "bias_table must have 9 rows"),
        (4, torch.ones(47), "qkv_bias must hold 48 adjacent values"),
        (5, [0, 1, 2, 2], "rows ends at 2, expected 3"),
        (5, [0, 1, 3, 3], "rows has a run of 1 segments of 3 and 3 tokens at 0"),
        (6, [1, 1, 2, 2], "columns has a run of 1 segments of 2 and 2 tokens at 1, expected one at 0"),
        (9, 0, "parts must be positive, got 0"),
        (6, [0, 1, 2], "columns must hold start, count, tokens and padded tokens"),
    ],
)
def test_the_extension_checks_what_it_gets(position, value, message):
    runs_of_three = [0, 1, 2, 2, 2, 1, 1, 2]
    tensors = (
        torch.ones(1, 3, 3, 16),
        torch.ones(1, 1, 3, 3),
        torch.ones(1, 3, 3, 48),
        torch.ones(9, 1),
        torch.ones(48),
    )
    arguments = [*tensors, runs_of_three, runs_of_three, 2, 1.0, 1]
    extension.ops().window_attention_out(*arguments)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        extension.ops().window_attention_out(*arguments)


def test_reasons_against_triton():
    reasons = explain(window_attention, **windows(width=8).to(torch.float64).inputs)
    assert reasons["reference"] == []
    said = "; ".join(reasons["triton"])
    assert "qkv is float64; the kernel takes float16, bfloat16, float32" in said
    assert "heads are 8 wide; the kernel takes 16 to 128 in steps of 16" in said


@pytest.mark.parametrize(
    "fault",
    [
        Fault("shift the other way", REFERENCE, "range(shift or window,", "range((window - shift) % window or window,"),
        Fault("query and key swapped", REFERENCE, "axis[:, None] - axis + window", "axis - axis[:, None] + window"),
        Fault("padded keys hold zeros", REFERENCE, "qkv_bias if qkv_bias.numel() else", "qkv_bias * 0 if True else"),
        Fault("padded keys count once", REFERENCE, "torch.logsumexp(pads, 2,", "torch.amax(pads, 2,"),
        Fault(
            "all of a padded gradient to each",
            REFERENCE,
            "grad[..., -1:] * self.share",
            "grad[..., -1:] * (self.share > 0)",
        ),
        Fault("tokens as padding", REFERENCE, "some.tokens(pads).fill_(-torch.inf)", "pass"),
        Fault("last images missing", REFERENCE, "range(0, batch, step))", "range(0, batch - 1, step))"),
        Fault("no scale in the gradient", REFERENCE, "beta=0, alpha=scale", "beta=0, alpha=1"),
        Fault("no row sum", REFERENCE, ".view(weights.shape), delta)", ".view(weights.shape), delta * 0)"),
        Fault("no gradient of padded values", REFERENCE, "grad_bias[number] +=", "grad_bias[1] +="),
        Fault("offsets of columns reversed", REFERENCE, "rows[:, :, column].flip(2)", "rows[:, :, column]"),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    def check() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module(REFERENCE), "PIECE", 1)
            for case in (windows((10, 8), 4, 1), windows((9, 6), 4, 0), windows((6, 6), 7, 3)):
                check_accuracy(window_attention, eager, case, torch.float64)

    check_noticed(fault, tmp_path, check)
