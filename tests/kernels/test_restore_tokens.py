from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded

from vitrail.kernels import explain, random_masking, restore_tokens

KERNEL = "vitrail.kernels.restore_tokens.kernel"
REDUCTION = "vitrail.kernels.reduction"
REFERENCE = "vitrail.kernels.restore_tokens.reference"

# batch, length, visible, prefix, width
SHAPES = [(2, 7, 3, 1, 5), (1, 1, 0, 1, 1), (3, 4, 4, 0, 2), (2, 9, 0, 0, 8), (5, 11, 4, 2, 16), (2, 3, 2, 1, 600)]
NAMES = ["plain", "one token, masked", "all visible", "none visible", "two prefix tokens", "two blocks of columns"]


def problem(
    batch: int = 3,
    length: int = 7,
    visible: int = 3,
    prefix: int = 1,
    width: int = 5,
    table: bool = False,
    pos: bool = True,
) -> Problem:
    generator = torch.Generator().manual_seed(length + width)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    inputs = {
        "visible": randn(batch, prefix + visible, width),
        "ids_restore": random_masking(batch, length, visible, generator=generator)[2],
        "mask_token": randn(length, width) if table else randn(width),
        "pos_embed": randn(prefix + length, width) if pos else None,
        "num_prefix": prefix,
    }
    return Problem(inputs, ("visible", "mask_token", "pos_embed") if pos else ("visible", "mask_token"))


def eager(visible, ids_restore, mask_token, pos_embed, num_prefix=1):
    """Appends mask tokens in shuffled order and gathers by the inverse permutation."""
    length = ids_restore.shape[1]
    patches = visible[:, num_prefix:]
    if mask_token.ndim == 1:
        mask_token = mask_token.expand(length, -1)
    # Slot s of the shuffle holds position argsort(ids_restore)[s]: the per-position tokens go there.
    fillers = mask_token[torch.argsort(ids_restore, 1)[:, patches.shape[1] :]]
    shuffled = torch.cat([patches, fillers], 1)
    restored = shuffled.take_along_dim(ids_restore[..., None], 1)
    tokens = torch.cat([visible[:, :num_prefix], restored], 1)
    return tokens if pos_embed is None else tokens + pos_embed


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("reference", torch.float64),
        ("reference", torch.bfloat16),
        ("triton", torch.float32),
        ("triton", torch.float16),
        ("triton", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("table", [False, True], ids=["token", "table"])
@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_restores_as_a_gather_of_concatenated_tokens_does(impl, dtype, shape, table):
    check_accuracy(restore_tokens, eager, problem(*shape, table=table), dtype, impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_adds_nothing_without_positions(impl):
    check_accuracy(restore_tokens, eager, problem(pos=False), torch.float32, impl)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 6),
    length=st.integers(1, 9),
    kept=st.floats(0, 1),
    prefix=st.integers(0, 3),
    width=st.integers(1, 20),
    table=st.booleans(),
    pos=st.booleans(),
)
def test_triton_on_any_shape(batch, length, kept, prefix, width, table, pos):
    case = problem(batch, length, round(kept * length), prefix, width, table, pos)
    check_accuracy(restore_tokens, eager, case, torch.float32, "triton")


@pytest.mark.parametrize("table", [False, True], ids=["token", "table"])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=NAMES[:5])
def test_gradients(shape, table):
    check_gradients(restore_tokens, problem(*shape, table=table))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("wanted", [("visible",), ("mask_token",), ("pos_embed",), ("visible", "pos_embed")])
def test_any_subset_of_gradients(impl, wanted):
    case = problem().to(torch.float32, kernel_device())
    full = evaluate(partial(restore_tokens, impl=impl), case)
    part = evaluate(partial(restore_tokens, impl=impl), Problem(case.inputs, wanted))
    assert set(part) == {"output 0", *(f"gradient of {name}" for name in wanted)}
    assert all(torch.equal(value, full[name]) for name, value in part.items())


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_mixed_dtypes_promote_and_gradients_keep_their_dtype(impl):
    case = problem(width=8).to(torch.float32, kernel_device())
    inputs = {**case.inputs, "visible": case.inputs["visible"].bfloat16()}
    result = evaluate(partial(restore_tokens, impl=impl), Problem(inputs, case.differentiable))
    assert result["output 0"].dtype == torch.float32
    assert result["gradient of visible"].dtype == torch.bfloat16
    assert result["gradient of pos_embed"].dtype == torch.float32
    assert restore_tokens(**inputs, dtype=torch.bfloat16, impl=impl).dtype == torch.bfloat16


def test_autocast_changes_nothing():
    case = problem().to(torch.float32)
    expected = evaluate(restore_tokens, case)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            got = evaluate(restore_tokens, case)
        assert all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in expected.items())


def test_the_gradient_accepts_any_upstream_strides():
    case = problem(batch=2, length=4, visible=1, width=3).to(torch.float32, kernel_device())
    inputs = {**case.inputs, "mask_token": case.inputs["mask_token"].requires_grad_()}
    restore_tokens(**inputs, impl="triton").sum().backward()  # an expanded scalar
    assert torch.equal(inputs["mask_token"].grad.cpu(), torch.full((3,), 6.0))


@pytest.mark.parametrize("table", [False, True], ids=["token", "table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5]])
def test_triton_stays_inside_its_buffers(shape, dtype, table):
    check_guarded(restore_tokens, problem(*shape, table=table).to(dtype))


@pytest.mark.parametrize("values", [[-1, 0, 9, 2**40], [-(2**40), 7, 7, 7]])
def test_out_of_range_ranks_touch_nothing_else(values):
    case = problem(batch=1, length=4, visible=2, width=4).to(torch.float32)
    case.inputs["ids_restore"] = torch.tensor([values])
    visible_only = Problem(case.inputs, ("mask_token", "pos_embed"))  # rows that nobody claims stay undefined
    check_guarded(restore_tokens, visible_only)


def test_ops():
    for table in (False, True):
        check_ops(restore_tokens, problem(table=table))
    check_ops(restore_tokens, problem(pos=False))
    check_ops(restore_tokens, Problem(problem().inputs, ("visible",)))


def test_compilation():
    check_compiled(restore_tokens, problem())
    check_compiled(restore_tokens, problem(pos=False, table=True))
    check_compiled(restore_tokens, problem(2, 9, 3, 1, 6), problem(3, 11, 4, 1, 8), problem(4, 13, 5, 1, 10))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(
            "drop the last tile of columns",
            KERNEL,
            '["ROWS"]), triton.cdiv(width, block))',
            '["ROWS"]), width // block)',
        ),
        Fault("drop the last token", KERNEL, "inside = token < tokens", "inside = token < tokens - 1"),
        Fault(
            "wrong restore order",
            KERNEL,
            "ids_restore + sample * stride_ids + token - num_prefix",
            "ids_restore + sample * stride_ids + tokens - 1 - token",
        ),
        Fault(
            "positions forgotten on the first token",
            KERNEL,
            "+ column, mask=in_tile, other=0.0)",
            "+ column, mask=in_tile & (token > 0)[:, None], other=0.0)",
        ),
        Fault("table read at the wrong place", KERNEL, "place = (token - num_prefix)", "place = (tokens - 1 - token)"),
        Fault("mask sum counts visible rows", KERNEL, "tl.where(is_visible[:, None], 0.0, value)", "value"),
        Fault(
            "the last samples are not summed",
            KERNEL,
            "pos_sum += value",
            "pos_sum += tl.where((sample < batch - 1)[:, None], value, 0.0)",
        ),
        Fault(
            "second stage drops rows",
            REDUCTION,
            "range(0, rows, BLOCK_ROWS)",
            "range(0, rows - BLOCK_ROWS, BLOCK_ROWS)",
            (KERNEL,),
        ),
        Fault(
            "second stage adds rows twice",
            REDUCTION,
            "tl.sum(total, 0) * scale",
            "tl.sum(total, 0) * scale * 2",
            (KERNEL,),
        ),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    case = problem(5, 6, 2, 1, 600, table=True)
    check_noticed(fault, tmp_path, lambda: check_accuracy(restore_tokens, eager, case, torch.float32, "triton"))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("permutation not inverted", REFERENCE, "scatter_(1, ids_restore, natural)", "copy_(ids_restore)"),
        Fault("visible counted as masked", REFERENCE, "ids_restore < num_visible", "ids_restore < num_visible - 1"),
        Fault(
            "prefix without position", REFERENCE, "out += pos_embed", "out[:, num_prefix:] += pos_embed[num_prefix:]"
        ),
    ],
    ids=lambda fault: fault.name,
)
def test_faults_planted_in_the_reference_are_noticed(fault, tmp_path):
    check_noticed(fault, tmp_path, lambda: check_accuracy(restore_tokens, eager, problem(), torch.float64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"visible": torch.ones(3, 4, 5, dtype=torch.int64)}, TypeError, "visible must be of a floating dtype"),
        ({"visible": torch.ones(3, 4)}, ValueError, r"visible must have shape \[B, P\+V, D\], got \[3, 4\]"),
        ({"visible": torch.ones(2, 4, 5)}, ValueError, "ids_restore is for 3 samples, but visible holds 2"),
        ({"visible": torch.ones(3, 9, 5)}, ValueError, "only 7 positions; is num_prefix right"),
        ({"ids_restore": torch.zeros(3, 7)}, TypeError, r"ids_restore must be of dtype torch.int64"),
        ({"mask_token": torch.ones(1, 1, 5)}, ValueError, r"mask_token must have shape \[5\] or \[7, 5\].*view\(-1\)"),
        ({"mask_token": torch.ones(5, device="meta")}, ValueError, "mask_token on meta"),
        ({"pos_embed": torch.ones(7, 5)}, ValueError, r"pos_embed must have shape \[8, 5\], got \[7, 5\]"),
        ({"num_prefix": -1}, ValueError, "num_prefix must be between 0 and the 4 tokens"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating dtype"),
    ],
)
def test_errors_name_the_value_and_the_expectation(change, error, message):
    with pytest.raises(error, match=message):
        restore_tokens(**{**problem().inputs, **change})


def test_triton_gives_reasons():
    case = problem().to(torch.float64, kernel_device())
    inputs = {**case.inputs, "visible": case.inputs["visible"].transpose(1, 2).contiguous().transpose(1, 2)}
    reasons = explain(restore_tokens, **inputs)["triton"]
    assert any("visible has stride 4 in its last dimension (strides [20, 1, 4]), expected 1" in r for r in reasons)
    assert any("pos_embed is float64; the kernel takes float16, bfloat16, float32" in r for r in reasons)
