"""The row pass and the column pass of a softmax, which have no gradients of their own."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.kernels import explain
from vitrail.kernels.launch import record_launches
from vitrail.kernels.passes import CHUNK_BYTES
from vitrail.kernels.softmax_col_pass import softmax_col_pass
from vitrail.kernels.softmax_row_pass import softmax_row_pass

ROW = "vitrail.kernels.softmax_row_pass.kernel"
COL = "vitrail.kernels.softmax_col_pass.kernel"
TILES = "vitrail.kernels.tiles"
REDUCTION = "vitrail.kernels.reduction"
PASSES = "vitrail.kernels.passes"
ROW_REFERENCE = "vitrail.kernels.softmax_row_pass.reference"
COL_REFERENCE = "vitrail.kernels.softmax_col_pass.reference"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def row_problem(
    rows: int = 65, count: int = 130, width: int = 16, value_width: int = 0, bias: bool = False, **options: Any
) -> Problem:
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(rows + count))
    inputs = {"queries": randn(rows, width), "keys": randn(count, width), "scale": 0.3, **options}
    if value_width:
        inputs["values"] = randn(count, value_width)
    if bias:
        inputs["bias"] = randn(count)
    return Problem(inputs)


def col_problem(
    rows: int = 130,
    count: int = 65,
    width: int = 16,
    x_width: int = 0,
    bias: bool = False,
    weight: bool = False,
    **options: Any,
) -> Problem:
    case = row_problem(rows, count, width, 0, bias, **options)
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(rows))
    # The very log-sum-exp, so that probabilities are such; of a row without a key it is -inf.
    lse, _ = eager_row(**case.to(torch.float64).inputs)
    case.inputs["lse"] = lse.float()
    if x_width:
        case.inputs["x"] = randn(rows, x_width)
    if weight:
        case.inputs["weight"] = randn(rows).clamp(-2, 2)
    return case


def dense_logits(queries, keys, scale, bias, exclude):
    logits = queries @ keys.T * scale
    if bias is not None:
        logits = logits + bias
    rows, columns = torch.arange(len(queries))[:, None], torch.arange(len(keys))[None, :]
    for offset in exclude:
        logits = logits.masked_fill(columns - rows.to(columns.device) == offset, -torch.inf)
    return logits


def eager_row(queries, keys, values=None, *, scale=1.0, bias=None, exclude=(), bounded=False, output=True):
    """The log-sum-exp and the softmax times the values, with every logit in memory."""
    logits = dense_logits(queries, keys, scale, bias, exclude)
    values = keys if values is None else values
    mean = torch.softmax(logits, 1).nan_to_num(0.0) @ values
    return torch.logsumexp(logits, 1), mean if output else mean[:0]


def eager_col(queries, keys, lse, x=None, *, weight=None, scale=1.0, bias=None, exclude=()):
    """The transposed softmax times the rows, with every probability in memory."""
    logits = dense_logits(queries, keys, scale, bias, exclude)
    probabilities = torch.where(lse[:, None].isneginf(), 0.0, torch.exp(logits - lse[:, None]))
    if weight is not None:
        probabilities = probabilities * weight[:, None]
    return probabilities.T @ (queries if x is None else x)


def finite(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces -inf, of rows without a key, by a number that errors can be measured against."""

    def wrapped(**inputs: Any) -> Any:
        lse, output = function(**inputs)
        return torch.where(lse.isneginf(), -7.0, lse), output

    return wrapped


def check_close(function: Callable[..., Any], eager: Callable[..., Any], case: Problem) -> None:
    """Checks the kernel where what matters is which terms are summed.

    Of a few numbers the eager formula in float32 can be right by luck. So the bound is absolute here: 60 roundings of
    float32, of logits and exponents of up to about 30, of the sum of the terms' magnitudes, which may cancel.
    """
    exact = case.to(torch.float32).to(torch.float64)
    truth = evaluate(eager, exact)
    summed = "x" if "lse" in case.inputs else "values"
    rows = exact.inputs.get(summed)
    rows = exact.inputs["queries" if summed == "x" else "keys"] if rows is None else rows
    absolute = exact.inputs | {summed: rows.abs()}
    if "weight" in absolute:
        absolute["weight"] = absolute["weight"].abs()
    magnitude = evaluate(eager, replace(exact, inputs=absolute))
    for name, got in evaluate(partial(function, impl="triton"), case.to(torch.float32, kernel_device())).items():
        bound = 60 * 2**-24 * magnitude[name].abs().clamp(min=1.0 if got.ndim == 1 else 0.0)
        error = (got.cpu().double() - truth[name]).abs()
        assert got.shape == truth[name].shape
        assert (error <= bound + 1e-30).all(), f"{name} is off by {(error - bound).max():.2g} more than allowed"


check_row = partial(check_accuracy, finite(softmax_row_pass), finite(eager_row))
check_col = partial(check_accuracy, softmax_col_pass, eager_col)

ROW_CASES = [
    {},
    {"value_width": 40, "bias": True},
    {"bounded": True, "exclude": (0,)},
    {"exclude": (3, -5), "bias": True, "output": False},
]
COL_CASES = [{}, {"x_width": 40, "bias": True}, {"weight": True, "exclude": (0,)}, {"exclude": (3, -5), "bias": True}]


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes the references take several chunks of rows."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 2**14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ROW_CASES)
def test_the_reference_of_the_row_pass(small_chunks, dtype, options):
    check_row(row_problem(**options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", COL_CASES)
def test_the_reference_of_the_column_pass(small_chunks, dtype, options):
    check_col(col_problem(**options), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("options", ROW_CASES)
def test_the_kernel_of_the_row_pass(dtype, options):
    check_row(row_problem(**options), dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("options", COL_CASES)
def test_the_kernel_of_the_column_pass(dtype, options):
    check_col(col_problem(**options), dtype, "triton")


@pytest.mark.parametrize("rows", [1, 2, 63, 65, 130, 197])
@pytest.mark.parametrize("count", [1, 2, 63, 65, 130, 197])
def test_odd_sizes(rows, count):
    check_row(row_problem(rows, count), torch.float32, "triton")
    check_col(col_problem(rows, count), torch.float32, "triton")


@pytest.mark.parametrize("width", [16, 64, 96, 130])
@pytest.mark.parametrize("other_width", [0, 64, 130])
def test_odd_widths(width, other_width):
    check_row(row_problem(33, 70, width, other_width), torch.bfloat16, "triton")
    check_col(col_problem(70, 33, width, other_width), torch.bfloat16, "triton")


sizes = {"rows": st.integers(1, 80), "count": st.integers(1, 80), "width": st.integers(1, 40)}
offsets = st.lists(st.integers(-90, 90), max_size=2)


@settings(max_examples=25, deadline=None)
@given(**sizes, value_width=st.sampled_from([0, 1, 24]), bias=st.booleans(), exclude=offsets, bounded=st.booleans())
def test_any_row_pass(rows, count, width, value_width, bias, exclude, bounded):
    case = row_problem(rows, count, width, value_width, bias, exclude=exclude, bounded=bounded)
    check_close(finite(softmax_row_pass), finite(eager_row), case)
    check_row(case, torch.float64)


@settings(max_examples=25, deadline=None)
@given(**sizes, x_width=st.sampled_from([0, 1, 24]), bias=st.booleans(), exclude=offsets, weight=st.booleans())
def test_any_column_pass(rows, count, width, x_width, bias, exclude, weight):
    case = col_problem(rows, count, width, x_width, bias, weight, exclude=exclude)
    check_close(softmax_col_pass, eager_col, case)
    check_col(case, torch.float64)


def number_of_parts(function: Callable[..., Any], case: Problem) -> int:
    with record_launches() as recorded:
        function(**case.inputs)
    return recorded[0].grid[1]


@pytest.mark.parametrize("options", ROW_CASES)
def test_a_split_row_pass_equals_the_whole_one(monkeypatch, options):
    function = partial(softmax_row_pass, impl="triton")
    case = row_problem(33, 500, **options).to(torch.float32, kernel_device())
    parts = evaluate(finite(function), case)
    assert number_of_parts(function, case) > 1
    monkeypatch.setattr(importlib.import_module(TILES), "MAX_SPLITS", 1)
    assert number_of_parts(function, case) == 1
    whole = evaluate(finite(function), case)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", COL_CASES)
def test_a_split_column_pass_equals_the_whole_one(monkeypatch, options):
    function = partial(softmax_col_pass, impl="triton")
    case = col_problem(500, 33, **options).to(torch.float32, kernel_device())
    parts = function(**case.inputs)
    assert number_of_parts(function, case) > 1
    monkeypatch.setattr(importlib.import_module(TILES), "MAX_SPLITS", 1)
    assert number_of_parts(function, case) == 1
    whole = function(**case.inputs)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_work_is_split_by_shape_alone():
    tiles = importlib.import_module(TILES)
    layout = tiles.Tile(128, 128, 8, 2)
    assert tiles.split(4096, 32768, layout) == (4, 8192)  # 32 blocks of rows: 128 programs on 132 multiprocessors
    assert tiles.split(132 * 128, 32768, layout) == (1, 32768)
    assert tiles.split(128, 128, layout) == (1, 128)
    for count in (0, 1, 127, 129, 100_000):
        parts, each = tiles.split(300, count, layout)
        assert parts == max(-(-count // each), 1)  # no part without keys
        assert each % layout.streamed == 0


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("bounded", [False, True])
def test_rows_without_a_key(impl, bounded):
    """One key that is excluded, or keys whose bias is -inf, leave nothing to sum."""
    case = row_problem(3, 1, exclude=(0,), bounded=bounded).to(torch.float32, kernel_device())
    lse, output = softmax_row_pass(**case.inputs, impl=impl)
    assert lse.isneginf().tolist() == [True, False, False]
    assert not output[0].any()
    torch.testing.assert_close(output[1:], case.inputs["keys"].expand(2, -1))
    inputs = {name: case.inputs[name] for name in ("queries", "keys", "scale")}
    assert not softmax_col_pass(**inputs, lse=torch.full_like(lse, -torch.inf), impl=impl).any()

    biased = row_problem(5, 40, bounded=bounded).to(torch.float32, kernel_device())
    lse, output = softmax_row_pass(**biased.inputs, bias=torch.full((40,), -torch.inf).to(lse), impl=impl)
    assert lse.isneginf().all()
    assert not output.any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_rows_and_no_keys(impl):
    for rows, count in ((0, 5), (5, 0), (0, 0)):
        case = row_problem(rows, count).to(torch.float32, kernel_device())
        lse, output = softmax_row_pass(**case.inputs, impl=impl)
        assert (lse.shape, output.shape) == ((rows,), (rows, 16))
        assert count > 0 or (lse.isneginf().all() and not output.any())
        sums = softmax_col_pass(**case.inputs, lse=lse, impl=impl)
        assert sums.shape == (count, 16)
        assert not sums.any()


def test_large_logits_do_not_overflow():
    check_row(row_problem(scale=300.0), torch.float64)
    check_row(row_problem(scale=300.0), torch.float32, "triton")


def test_float16_subtracts_the_maximum_of_bounded_logits_too():
    """Weights of up to e^60 are beyond what float16 holds."""
    with record_launches() as recorded:
        for dtype in (torch.float16, torch.bfloat16):
            softmax_row_pass(**row_problem(bounded=True).to(dtype, kernel_device()).inputs, impl="triton")
    first, *_, last = [launch.options["BOUNDED"] for launch in recorded if "BOUNDED" in launch.options]
    assert (first, last) == (False, True)


def test_the_scale_may_be_a_tensor():
    case = row_problem()
    expected = softmax_row_pass(**case.inputs)
    got = softmax_row_pass(**{**case.inputs, "scale": torch.tensor(0.3)})
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("options", ROW_CASES)
def test_the_row_pass_stays_inside_its_buffers(options):
    check_guarded(softmax_row_pass, row_problem(33, 190, **options))
    check_guarded(softmax_row_pass, row_problem(3, 5, **options))


@pytest.mark.parametrize("options", COL_CASES)
def test_the_column_pass_stays_inside_its_buffers(options):
    check_guarded(softmax_col_pass, col_problem(190, 33, **options))
    check_guarded(softmax_col_pass, col_problem(5, 3, **options))


def test_strided_rows():
    case = row_problem(65, 130, 16, 24).to(torch.float32, kernel_device())
    wide = {name: torch.cat([case.inputs[name]] * 2, 1) for name in ("queries", "keys", "values")}
    views = {name: tensor[:, : case.inputs[name].shape[1]] for name, tensor in wide.items()}
    expected = softmax_row_pass(**case.inputs, impl="triton")
    assert all(map(torch.equal, softmax_row_pass(**{**case.inputs, **views}, impl="triton"), expected))


@pytest.mark.parametrize("options", ROW_CASES)
def test_the_op_of_the_row_pass(options):
    check_ops(softmax_row_pass, row_problem(5, 9, **options))


@pytest.mark.parametrize("options", COL_CASES)
def test_the_op_of_the_column_pass(options):
    check_ops(softmax_col_pass, col_problem(5, 9, **options))


def test_compilation():
    check_compiled(finite(softmax_row_pass), row_problem(exclude=(2,), bias=True))
    check_compiled(softmax_row_pass, *(row_problem(rows, 40) for rows in (5, 6, 7)))
    check_compiled(softmax_col_pass, col_problem(exclude=(2,), bias=True, weight=True))
    check_compiled(softmax_col_pass, *(col_problem(rows, 40) for rows in (5, 6, 7)))


def test_autocast_changes_nothing():
    for function, case in ((softmax_row_pass, row_problem()), (softmax_col_pass, col_problem())):
        expected = evaluate(function, case)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                got = evaluate(function, case)
            assert all(torch.equal(got[name], value) for name, value in expected.items())


class _Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_the_reference_never_holds_every_logit():
    """16,384 rows and keys have 1 GiB of logits."""
    case = row_problem(16384, 16384, 64)
    row, col = (importlib.import_module(name) for name in (ROW_REFERENCE, COL_REFERENCE))
    queries, keys = case.inputs["queries"], case.inputs["keys"]
    with _Largest() as largest:
        lse, _ = row.forward(queries, keys, None, None, torch.tensor(0.1), [], False, True)
        col.forward(queries, keys, lse, None, None, None, torch.tensor(0.1), [])
    assert 2**20 < largest.bytes <= 2**25


def in_three_parts(check: Callable[..., Any], case: Problem) -> None:
    """Checks a kernel with several tiles in a part and several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module(TILES), "MAX_SPLITS", 3)
        check(case, torch.float32, "triton")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("wrong sign of the offset", TILES, "key == row + offset", "key == row - offset", (ROW,)),
        Fault("a diagonal that crosses a tile is missed", TILES, "(key < row + offset + ROWS)", "(key < row)", (ROW,)),
        Fault("drop the last tile of keys", ROW, "tl.range(begin, end, ", "tl.range(begin, end - BLOCK_KEYS, "),
        Fault("count keys of the last tile twice", ROW, "key >= fresh", "key >= 0"),
        Fault("sum not rescaled", ROW, "total = total * rescale", "total = total"),
        Fault("mean not rescaled", ROW, "mean *= rescale[:, None]", "mean *= 1.0"),
        Fault("bias ignored", ROW, "HAS_BIAS=bias is not None", "HAS_BIAS=False"),
        Fault("bias in the wrong base", ROW, "(shift.to(tl.float32) * LOG2E)", "(shift.to(tl.float32))"),
        Fault("log-sum-exp left in base 2", ROW, "log * LN2", "log"),
        Fault("the merge ignores a part", ROW, "        launch(\n            merge_kernel", "        parts -= 1\n"
              "        launch(\n            merge_kernel"),
        Fault("parts are not weighted", ROW, "mean += share[:, None] * value", "mean += value"),
        Fault("keys in place of values", ROW, "values, start, end, VALUE_WIDTH", "keys, start, end, VALUE_WIDTH"),
        Fault("a part begins at the wrong key", ROW, "program_id(1) * keys_per_split", "program_id(1) * BLOCK_KEYS"),
    ],
    ids=lambda fault: fault.name,
)  # fmt: skip
def test_faults_in_the_kernel_of_the_row_pass_are_noticed(fault, tmp_path):
    case = row_problem(70, 300, 16, 16, bias=True, exclude=(7, -3), scale=1.0)
    check_noticed(fault, tmp_path, lambda: in_three_parts(check_row, case))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("wrong sign of the offset", TILES, "key == row + offset", "key == row - offset", (COL,)),
        Fault("drop the last tile of rows", COL, "tl.range(begin, end, ", "tl.range(begin, end - BLOCK_ROWS, "),
        Fault("count rows of the last tile twice", COL, "(row < end) & (row >= fresh)", "row < end"),
        Fault("bias ignored", COL, "HAS_BIAS=bias is not None", "HAS_BIAS=False"),
        Fault("weight ignored", COL, "HAS_WEIGHT=weight is not None", "HAS_WEIGHT=False"),
        Fault("log-sum-exp in the wrong base", COL, "minus = -LOG2E * ", "minus = -"),
        Fault("rows without a key count", COL, 'minus == float("inf"), float("-inf")', "minus == 3.0, 0.0"),
        Fault("queries in place of x", COL, "x, start, end, X_WIDTH", "queries, start, end, X_WIDTH"),
        Fault("the sum of the parts drops one", REDUCTION, "row < rows", "row < rows - 1", (COL,)),
    ],
    ids=lambda fault: fault.name,
)  # fmt: skip
def test_faults_in_the_kernel_of_the_column_pass_are_noticed(fault, tmp_path):
    case = col_problem(300, 70, 16, 16, bias=True, weight=True, exclude=(7, -3), scale=1.0)
    case.inputs["lse"][5] = -torch.inf
    check_noticed(fault, tmp_path, lambda: in_three_parts(check_col, case))


def test_a_lift_of_float16_that_is_not_undone_is_noticed(tmp_path):
    fault = Fault("lift not undone", COL, "total *= 1.0 / (1 << LIFT)", "total *= 1.0")
    check_noticed(fault, tmp_path, lambda: check_col(col_problem(), torch.float16, "triton"))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("wrong sign of the offset", PASSES, "diagonal(start + offset)", "diagonal(start - offset)",
              (ROW_REFERENCE,)),
        Fault("offset of the first chunk in every chunk", PASSES, "diagonal(start + offset)", "diagonal(offset)",
              (ROW_REFERENCE,)),
        Fault("bias ignored", PASSES, "logits += bias", "logits += 0 * bias", (ROW_REFERENCE,)),
        Fault("maximum not added back", ROW_REFERENCE, "total.log() + peak", "total.log()"),
        Fault("mean not divided", ROW_REFERENCE, "output[part] /= ", "output[part] /= 1 + 0 * "),
    ],
    ids=lambda fault: fault.name,
)  # fmt: skip
def test_faults_in_the_reference_of_the_row_pass_are_noticed(small_chunks, fault, tmp_path):
    def check() -> None:
        chunks = importlib.import_module(PASSES).CHUNK_BYTES  # of the faulty twin, where there is one
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(chunks, "cpu", 2**14)
            check_row(row_problem(bias=True, exclude=(7, -3), scale=1.0), torch.float64)

    check_noticed(fault, tmp_path, check)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("weight ignored", COL_REFERENCE, "rows[part] * weight[part, None]", "rows[part]"),
        Fault("rows without a key count", COL_REFERENCE, "lse == -torch.inf, torch.inf", "lse == -torch.inf, 0.0"),
        Fault("only the last chunk", COL_REFERENCE, "output.addmm_(", "output.zero_().addmm_("),
    ],
    ids=lambda fault: fault.name,
)
def test_faults_in_the_reference_of_the_column_pass_are_noticed(small_chunks, fault, tmp_path):
    case = col_problem(weight=True)
    case.inputs["lse"][5] = -torch.inf
    check_noticed(fault, tmp_path, lambda: check_col(case, torch.float64))


FLAT = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "queries must be of a floating dtype"),
        ({"queries": torch.ones(4)}, ValueError, r"queries must have shape \[rows, width\], got \[4\]"),
        ({"keys": torch.ones(5, 2)}, ValueError, r"keys must have shape \[rows, 3\], got \[5, 2\]"),
        ({"keys": FLAT.double()}, TypeError, "keys must be of the dtype of queries, torch.float32"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \[4\], got \[3\]"),
        ({"scale": torch.ones(1)}, ValueError, r"scale must have shape \[\], got \[1\]"),
        ({"exclude": (1, 2, 3)}, ValueError, "exclude must hold at most 2 integer offsets"),
        ({"exclude": (1.5,)}, ValueError, "exclude must hold at most 2 integer offsets"),
        ({"queries": FLAT.clone().requires_grad_()}, ValueError, "has no gradient, but queries requires one"),
    ],
)
def test_errors_name_the_value_and_the_expectation(change, error, message):
    inputs = {"queries": FLAT, "keys": FLAT, **change}
    with pytest.raises(error, match=message):
        softmax_row_pass(**inputs)
    with pytest.raises(error, match=message):
        softmax_col_pass(**inputs, lse=torch.zeros(4))


def test_errors_of_what_only_one_pass_takes():
    with pytest.raises(ValueError, match=r"values must have shape \[4, dv\], got \[3, 3\]"):
        softmax_row_pass(FLAT, FLAT, FLAT[:3])
    with pytest.raises(ValueError, match=r"x must have shape \[4, dx\], got \[3, 3\]"):
        softmax_col_pass(FLAT, FLAT, torch.zeros(4), FLAT[:3])
    with pytest.raises(ValueError, match=r"lse must have shape \[4\], got \[3\]"):
        softmax_col_pass(FLAT, FLAT, torch.zeros(3))
    with pytest.raises(ValueError, match="has no gradient, but weight requires one"):
        softmax_col_pass(FLAT, FLAT, torch.zeros(4), weight=torch.ones(4, requires_grad=True))


def test_a_gradient_that_nobody_asks_for_is_no_error():
    with torch.no_grad():
        softmax_row_pass(FLAT.clone().requires_grad_(), FLAT)


def test_triton_gives_reasons():
    device = kernel_device()
    wide = torch.ones(600, 4, dtype=torch.float64, device=device).T
    for function, extra in ((softmax_row_pass, {}), (softmax_col_pass, {"lse": torch.zeros(4, device=device)})):
        reasons = explain(function, queries=wide, keys=wide, **extra)["triton"]
        assert any("600 wide; the kernel holds a tile of whole rows and takes 512 at most" in text for text in reasons)
        assert any("queries is float64; the kernel takes float16, bfloat16, float32" in text for text in reasons)
        assert any("keys has stride 4 in its last dimension" in text for text in reasons)
