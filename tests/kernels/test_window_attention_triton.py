"""The Triton kernels of windowed attention, in the interpreter where there is no GPU."""

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from ladder import Problem, check_accuracy, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded
from swin_windows import eager, windows

from vitrail.kernels import explain, window_attention
from vitrail.kernels.launch import launches_of

KERNEL = "vitrail.kernels.window_attention.kernel"
GRADIENT = "vitrail.kernels.window_attention.gradient"
TILED_GRADIENT = "vitrail.kernels.window_attention.tiled_gradient"
LAYOUT = "vitrail.kernels.window_attention.layout"
TOKENS = "vitrail.kernels.window_attention.tokens"
WHOLE = [  # all keys of a window in one tile: small windows, in float32 only the smallest
    ((7, 7), 7, 0, 16, torch.float16),
    ((14, 7), 7, 3, 32, torch.float16),
    ((9, 5), 7, 3, 16, torch.float16),
    ((9, 5), 7, 3, 16, torch.bfloat16),
    ((3, 3), 7, 0, 32, torch.float16),
    ((6, 7), 6, 3, 64, torch.float16),
    ((8, 12), 8, 4, 16, torch.float16),
    ((5, 4), 4, 1, 48, torch.float32),
    ((5, 7), 5, 2, 16, torch.float32),
    ((2, 1), 1, 0, 16, torch.float32),
]
TILED = [
    ((9, 5), 7, 3, 16, torch.float32),
    ((3, 3), 7, 0, 32, torch.float32),
    ((14, 14), 14, 7, 16, torch.float32),
    ((6, 6), 14, 0, 32, torch.float32),
    ((3, 15), 14, 7, 16, torch.float16),
    ((16, 5), 16, 8, 16, torch.float32),
    ((9, 10), 9, 4, 16, torch.float32),
]


def problem(size: tuple[int, int], window: int, shift: int, width: int, dtype: torch.dtype, **options) -> Problem:
    """A call in a dtype, with a bias for the padding if there is any."""
    padded = any(side % window for side in size)
    options = {"batch": 1 if max(size) > 9 else 2, "heads": 1 if window > 8 else 2, **options}
    return windows(size, window, shift, width=width, bias=padded, **options).to(dtype)


@pytest.fixture
def few_programs(monkeypatch):
    """Lets every program go through several windows, of which there are few here."""
    module = importlib.import_module(KERNEL)
    monkeypatch.setattr(module, "RESIDENT", 4)
    monkeypatch.setattr(module, "PROGRAMS", 4)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("shape", [*WHOLE, *TILED], ids=str)
def test_values_and_gradients(shape):
    check_accuracy(window_attention, eager, problem(*shape), shape[-1], "triton")


def test_many_windows_in_as_many_programs():
    case = problem((4, 9), 6, 3, 16, torch.float32, batch=2, heads=1)
    check_accuracy(window_attention, eager, case, torch.float32, "triton")


@pytest.mark.usefixtures("few_programs")
def test_sums_are_kept_in_float32():
    """The table's gradient, and the padding's, where only what is attended to is in half precision."""
    case = problem((9, 12), 7, 3, 16, torch.float16)
    case = replace(case.to(torch.float32), differentiable=("bias_table", "qkv_bias"))

    def call(qkv, **rest):
        return window_attention(qkv.half(), **rest).float()

    truth, baseline = (evaluate(eager, case.to(dtype)) for dtype in (torch.float64, torch.float32))
    got = evaluate(partial(call, impl="triton"), case.to(torch.float32, kernel_device()))
    for name in ("gradient of bias_table", "gradient of qkv_bias"):
        limit = 3 * (baseline[name] - truth[name]).norm() + 1e-6 * truth[name].norm()
        assert got[name].dtype == torch.float32
        assert (got[name].cpu() - truth[name]).norm() <= limit, name


def test_triton_stays_inside_its_buffers():
    for shape in (WHOLE[4], ((4, 7), 6, 3, 16, torch.float32)):
        check_guarded(window_attention, problem(*shape, batch=1, heads=1))


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("shape", [WHOLE[2], ((4, 7), 6, 2, 16, torch.float32)], ids=str)
def test_runs_give_the_same_bits(shape):
    case = problem(*shape, batch=1).to(shape[-1], kernel_device())
    expected = evaluate(partial(window_attention, impl="triton"), case)
    for _ in range(2):
        again = evaluate(partial(window_attention, impl="triton"), case)
        assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize("shape", [WHOLE[7], TILED[1]], ids=str)
def test_strides_and_long_offsets(shape, monkeypatch):
    """Rows that are parts of wider ones, maps in another order; 64-bit offsets give the same bits."""
    case = problem(*shape).to(shape[-1], kernel_device())
    expected = evaluate(partial(window_attention, impl="triton"), case)

    def call(qkv, bias_table, **rest):
        view = torch.cat([qkv, qkv], dim=-1)[..., : qkv.shape[-1]].transpose(0, 1).contiguous().transpose(0, 1)
        table = torch.cat([bias_table, bias_table], dim=1)[:, : bias_table.shape[1]]
        out = window_attention(view.transpose(1, 2).contiguous().transpose(1, 2), table, impl="triton", **rest)
        return torch.cat([out, out], dim=-1)[..., : out.shape[-1]]

    for name, value in evaluate(call, case).items():
        assert torch.equal(value, expected[name]), name
    monkeypatch.setattr(importlib.import_module(LAYOUT), "needs_int64", lambda *tensors: True)
    for name, value in evaluate(partial(window_attention, impl="triton"), case).items():
        assert torch.equal(value, expected[name]), name


def test_no_image():
    for shape in (WHOLE[2], TILED[0]):
        case = problem(*shape, batch=0).to(shape[-1], kernel_device())
        got = evaluate(partial(window_attention, impl="triton"), case)
        assert all(value.count_nonzero() == 0 for value in got.values())
        assert got["output 0"].shape == (0, *shape[0], 32)


def recorded(call: str, precision: str = "highest") -> dict[str, object]:
    """The launches of a representative call by kernel."""
    module = importlib.import_module(KERNEL)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        launches = launches_of(module, module.representative_calls()[call](device="meta"))
    finally:
        torch.set_float32_matmul_precision(before)
    return {launch.kernel.__name__: launch for launch in launches}


def test_the_precision_of_float32_products_is_the_users_choice():
    for precision, expected in (("highest", "ieee"), ("high", "tf32")):
        launches = recorded("fp32 w7 shifted", precision)
        assert {one.options.get("PRECISION", expected) for one in launches.values()} == {expected}


def test_launches():
    """Swin's first stage at batch 128: what is launched, and that partial sums are far smaller than the maps."""
    launches = recorded("bf16 w7 shifted")
    assert launches.keys() == {
        "forward_kernel",
        "window_backward_kernel",
        "sum_partials_kernel",
        "table_backward_kernel",
    }
    assert launches["window_backward_kernel"].grid == (264,)
    launches = recorded("bf16 w14 shifted")
    assert launches.keys() >= {"forward_kernel", "query_backward_kernel", "key_backward_kernel"}
    partials = launches["sum_partials_kernel"].args[0]
    assert partials.shape == (22, 3 * 196 * 208)
    assert partials.nbytes < 0.05 * 128 * 56 * 56 * 288 * 2


def test_reasons():
    assert explain(window_attention, **problem(*WHOLE[0]).to(torch.float16, kernel_device()).inputs)["triton"] == []
    with pytest.raises(RuntimeError, match="heads are 8 wide"):
        window_attention(
            **problem((7, 7), 7, 0, 8, torch.float32).to(torch.float32, kernel_device()).inputs, impl="triton"
        )


def check_both_ways() -> None:
    """Checks a call of two windows for one program, in float16 with all keys of a window at once, then in tiles."""
    module = importlib.import_module(KERNEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RESIDENT", 1)
        patch.setattr(module, "PROGRAMS", 1)
        for dtype in (torch.float16, torch.float32):
            case = problem((4, 9), 6, 2, 16, dtype, batch=1, heads=1)
            check_accuracy(window_attention, eager, case, dtype, "triton")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop the last key", KERNEL, "slot < TOKENS, key_region", "slot < TOKENS - 1, key_region"),
        Fault("surplus keys count", KERNEL, "tl.where(slot < TOKENS, key_region, -1)", "key_region"),
        Fault("mask off", KERNEL, "region[:, None] == key_region[None, :]", "(key_region >= 0)[None, :]"),
        Fault("the same window again", KERNEL, "split_window(window, sizes)", "split_window(first, sizes)"),
        Fault("no rescaling", KERNEL, "mean * rescale[:, None]", "mean"),
        Fault("binary logarithm kept", KERNEL, "tl.log2(total)) * LN2", "tl.log2(total))"),
        Fault("sums of one program", KERNEL, "out.view(-1))", "out.view(-1), 0.5)"),
        Fault("padded keys' gradient to values", KERNEL, "values.copy_(sums[:, 1])", "values.copy_(sums[:, 0])"),
        Fault("shift the other way", TOKENS, "SHIFT - sizes[2] * WINDOW, SHIFT)", "SHIFT - sizes[2] * WINDOW, 0)"),
        Fault("regions by rows alone", TOKENS, " + beside.to(tl.int32)", ""),
        Fault("biases of columns reversed", TOKENS, "1) + position % WINDOW", "1) - position % WINDOW"),
        Fault("padding holds zeros", LAYOUT, "padded and qkv_bias.numel() > 0", "False"),
        Fault(
            "padding is masked", TOKENS, "return row, column, real, region", "return row, column, real, region * real"
        ),
        Fault("drop half of a window's sums", GRADIENT, "            else:\n                sums1 += change\n", ""),
        Fault(
            "drop a tile's sums",
            TILED_GRADIENT,
            "part == 2:\n                sums2 +=",
            "part == 2:\n                sums3 +=",
        ),
        Fault("no row sum", GRADIENT, " - tl.sum(weight * change, 0)[None, :]", ""),
        Fault("no row sum for queries", TILED_GRADIENT, " - mean[:, None]", ""),
        Fault("no row sum for keys", TILED_GRADIENT, " - mean[None, :]", ""),
        Fault("no scale of a query's gradient", TILED_GRADIENT, "to_query * scale, HEAD", "to_query, HEAD"),
        Fault("table transposed", GRADIENT, "row * WINDOW + column", "column * WINDOW + row"),
        Fault(
            "surplus keys count for queries", TILED_GRADIENT, "tl.where(slot < TOKENS, key_region, -1)", "key_region"
        ),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    later = (GRADIENT, TILED_GRADIENT, KERNEL)
    check_noticed(
        replace(fault, reload=later[later.index(fault.module) + 1 :] if fault.module in later else later),
        tmp_path,
        check_both_ways,
    )
