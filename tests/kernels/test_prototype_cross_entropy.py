"""The prototype cross-entropy against a formula with every logit and every pair in memory; centre and pairs."""

import copy
import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_gradients, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded
from torch import nn
from training import finish, start

from vitrail.kernels import cross_view_match, explain, prototype_cross_entropy, update_center_
from vitrail.kernels.prototype_cross_entropy import chunked as chunks
from vitrail.kernels.prototype_cross_entropy import op as choice
from vitrail.kernels.registry import UnsupportedError

FOLDER = "vitrail.kernels.prototype_cross_entropy"
CHUNKED, FACTORISED, PAIRS, CENTER, REFERENCE = (
    f"{FOLDER}.{name}" for name in ("chunked", "factorised", "pairs", "center", "reference")
)
IMPLS = ("reference", "chunked", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def problem(
    rows: int = 33,
    teachers: int | None = None,
    count: int = 65,
    width: int = 16,
    teacher_width: int | None = None,
    views: int = 0,
    center: bool = False,
    weight: str = "",
    unit: bool = False,
    **options: object,
) -> Problem:
    """A call with `views` teacher rows for each student row at most, some of them missing; 0 pairs row with row."""
    generator = torch.Generator().manual_seed(rows + count)
    randn = partial(torch.randn, generator=generator)
    teachers = rows if teachers is None else teachers
    matrices = {
        "student": randn(rows, width),
        "student_prototypes": randn(count, width),
        "teacher": randn(teachers, teacher_width or width),
        "teacher_prototypes": randn(count, teacher_width or width),
    }
    if unit:
        matrices = {name: nn.functional.normalize(matrix) for name, matrix in matrices.items()}
    inputs: dict[str, object] = {**matrices, "student_temp": 2.5, "teacher_temp": 1.5, **options}
    if center:
        inputs["center"] = randn(count).clamp(-1, 1)
    if views:
        match = torch.randint(-1, teachers, (views, rows), generator=generator)
        match[:, ::5] = -1  # rows that nobody is held to
        match[0, 1:2] = teachers - 1
        inputs["match"] = match[0] if views == 1 else match
    if weight:
        values = torch.rand(rows, generator=generator) + 0.5
        values[::4] = 0
        inputs["weight"] = {"some": values / rows, "tiny": values * 1e-5, "none": values * 0}[weight]
    return Problem(inputs, ("student", "student_prototypes"))


def eager(
    student,
    student_prototypes,
    teacher,
    teacher_prototypes,
    *,
    student_temp,
    teacher_temp,
    center=None,
    match=None,
    weight=None,
    normalized=False,
    log_softmax=torch.log_softmax,
):
    """Every logit, every probability and the cross-entropy of every pair."""
    logits = log_softmax(student @ student_prototypes.T / student_temp, 1)
    shifted = teacher @ teacher_prototypes.T - (0 if center is None else center)
    target = log_softmax(shifted / teacher_temp, 1).exp()
    match = torch.arange(len(student)) if match is None else match
    match = match.view(-1, len(student)).to(logits.device)
    view, row = (match >= 0).nonzero(as_tuple=True)
    terms = -(target[match[view, row]] * logits[row]).sum(1)
    if weight is None:
        return terms.sum() / max(len(terms), 1)
    return (terms * weight[row]).sum()


def from_lse(logits, dim):
    """A log-softmax by the stored log-sum-exp, whose rounding then counts too, as it does in the column pass."""
    return logits - logits.logsumexp(dim, keepdim=True)


check = partial(check_accuracy, prototype_cross_entropy, eager)
check_passes = partial(check_accuracy, prototype_cross_entropy, partial(eager, log_softmax=from_lse))

CASES = {
    "row to row": {},
    "two widths and a centre": {"teacher_width": 24, "center": True},
    "one teacher": {"teachers": 7, "views": 1, "center": True},
    "three teachers and weights": {"teachers": 40, "views": 3, "weight": "some"},
    "small weights": {"teachers": 9, "views": 2, "weight": "tiny", "center": True},
    "zero weights": {"weight": "none"},
    "DINO's temperatures": {"unit": True, "center": True, "student_temp": 0.1, "teacher_temp": 0.04},
    "bounded": {"unit": True, "center": True, "student_temp": 0.1, "teacher_temp": 0.04, "normalized": True},
    "temperatures as tensors": {"student_temp": torch.tensor(3.3), "teacher_temp": torch.tensor(1.3), "views": 2},
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes the chunked implementation take 16 rows at a time."""
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cuda", 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_plain_pytorch(small_chunks, impl, case, dtype):
    check(problem(**CASES[case]), dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", CASES)
def test_triton(case, dtype):
    check_passes(problem(rows=17, count=33, **CASES[case]), dtype, "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [(1, 2), (2, 3), (3, 33), (65, 2), (130, 65), (33, 130)])
def test_odd_sizes(small_chunks, impl, sizes):
    rows, count = sizes
    check(problem(rows, count=count, width=5, teacher_width=7, center=True), torch.float32, impl)
    check(problem(rows, 3, count, views=2, weight="some"), torch.float32, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_single_prototype_leaves_nothing_to_learn(impl):
    case = problem(3, count=1, width=5, center=True).to(torch.float32, kernel_device())
    for value in evaluate(partial(prototype_cross_entropy, impl=impl), case).values():
        assert value.abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(data=st.data(), views=st.integers(1, 3), weight=st.sampled_from(["", "some"]))
def test_any_pairs(data, views, weight):
    rows, teachers = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    pairs = data.draw(st.lists(st.integers(-1, teachers - 1), min_size=views * rows, max_size=views * rows))
    case = problem(rows, teachers, 9, 4, weight=weight, match=torch.tensor(pairs).view(views, rows))
    for impl in ("reference", "chunked"):
        check(case, torch.float64, impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_teacher_that_is_kept(case, dtype):
    """In parts as large as they are, all of these teachers' probabilities fit into one."""
    assert chunks.teacher_fits(40, 65, kernel_device())
    check(problem(**CASES[case]), dtype, "chunked")


@pytest.mark.parametrize("impl", IMPLS)
def test_one_chunk_and_several_agree(monkeypatch, impl):
    case = problem(50, 12, views=2, weight="some").to(torch.float64, "cpu" if impl != "triton" else kernel_device())
    if impl == "triton":
        case = case.to(torch.float32)
    function = partial(prototype_cross_entropy, impl=impl)
    whole = evaluate(function, case)
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(importlib.import_module("vitrail.kernels.passes").CHUNK_BYTES, "cpu", 1)
    for name, value in evaluate(function, case).items():
        torch.testing.assert_close(
            value, whole[name], rtol=1e-12 if impl != "triton" else 0, atol=0 if impl == "triton" else 1e-13
        )


def test_the_lift_of_small_gradients_cancels(monkeypatch, small_chunks):
    monkeypatch.setitem(chunks.LIFT, torch.float32, 1024.0)
    for case in CASES.values():
        check(problem(**case), torch.float32, "chunked")


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("bounded", "DINO's temperatures")])
def test_gradients(small_chunks, case, impl):
    sizes = {"teachers": 6, **CASES[case]} if "views" in CASES[case] else CASES[case]
    check_gradients(partial(prototype_cross_entropy, impl=impl), problem(17, count=5, width=3, **sizes))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", [("student",), ("student_prototypes",), ()])
def test_subsets_of_the_gradients(impl, wanted):
    case = problem(9, 5, 17, 6, views=2, center=True).to(torch.float32, kernel_device())
    function = partial(prototype_cross_entropy, impl=impl)
    everything = evaluate(function, case)
    some = evaluate(function, Problem(case.inputs, wanted))
    assert some.keys() == {"output 0", *(f"gradient of {name}" for name in wanted)}
    for name, value in some.items():
        torch.testing.assert_close(value, everything[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_scales_with_its_upstream_and_none_reaches_the_teacher(impl):
    case = problem(9, 5, 17, 6, views=2).to(torch.float32, kernel_device())
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in list(case.inputs)[:4]}
    loss = prototype_cross_entropy(**{**case.inputs, **leaves}, impl=impl)
    once = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, list(leaves.values()), allow_unused=True)
    assert [gradient is None for gradient in once] == [False, False, True, True]
    assert all(torch.equal(b, 2 * a) for a, b in zip(once[:2], twice[:2], strict=True))


@pytest.mark.parametrize("weight", ["", "some"])
@pytest.mark.parametrize("impl", IMPLS)
def test_nobody_held_to_anything_is_a_loss_of_zero(impl, weight):
    case = problem(5, 3, 17, 6, match=torch.full((2, 5), -1), weight=weight).to(torch.float32, kernel_device())
    for value in evaluate(partial(prototype_cross_entropy, impl=impl), case).values():
        assert not value.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_teacher_sum(impl):
    """Two teacher rows at once are the sum of the two pairs."""
    case = problem(9, 5, 17, 6, center=True, weight="some").to(torch.float32, kernel_device())
    match = torch.arange(9, device=kernel_device()) % 5
    both = torch.stack([match, (match + 1) % 5])
    loss = partial(prototype_cross_entropy, **case.inputs, impl=impl)
    torch.testing.assert_close(loss(match=both), loss(match=both[0]) + loss(match=both[1]))


# --- layers ----------------------------------------------------------------------------------------------------------


def layers(width: int, count: int, kind: str) -> nn.Module:
    torch.manual_seed(width)
    layer = nn.Linear(width, count, bias=False)
    if kind == "old":
        return nn.utils.weight_norm(layer)
    return nn.utils.parametrizations.weight_norm(layer) if kind == "new" else layer


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["plain", "new", "old"])
def test_layers_hold_the_prototypes(kind, impl):
    case = problem(9, count=17, width=6).to(torch.float32, kernel_device())
    student, teacher = (layers(6, 17, kind).to(kernel_device()) for _ in range(2))
    with torch.no_grad():  # as an optimiser would: the old form's `weight` is stale until the next forward
        for layer in (student, teacher):
            for parameter in layer.parameters():
                parameter.mul_(1.5).add_(0.25)
    twin = copy.deepcopy(student) if kind == "plain" else layers(6, 17, kind).to(kernel_device())
    twin.load_state_dict(student.state_dict())
    features, targets = case.inputs["student"], case.inputs["teacher"]
    loss = prototype_cross_entropy(features, student, targets, teacher, student_temp=0.5, teacher_temp=0.25, impl=impl)
    loss.backward()
    with torch.no_grad():
        target = (teacher(targets) / 0.25).softmax(1)
    expected = -(target * (twin(features) / 0.5).log_softmax(1)).sum(1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    names = {"plain": 1, "new": 2, "old": 2}
    assert len(list(student.parameters())) == names[kind]
    for got, want in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_layers_compile():
    case = problem(9, count=17, width=6).to(torch.float32)
    for kind in ("plain", "new", "old"):
        layer = layers(6, 17, kind)
        loss = partial(prototype_cross_entropy, student_temp=0.5, teacher_temp=0.25)
        arguments = case.inputs["student"], layer, case.inputs["teacher"], layer
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), loss(*arguments))


# --- the dispatcher --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_ops(impl):
    function = partial(prototype_cross_entropy, impl=impl)
    for case in (problem(5, 3, 9, 4, views=2, center=True, weight="some"), problem(5, count=9, width=4)):
        check_ops(function, case.to(torch.float32, kernel_device()))
        check_ops(function, Problem(case.to(torch.float32, kernel_device()).inputs, ("student",)))


def test_compilation():
    check_compiled(prototype_cross_entropy, problem(center=True, views=2, weight="some"))
    check_compiled(prototype_cross_entropy, problem(center=True, normalized=True, unit=True))
    several = [problem(rows, rows + 2, 9, 4, views=2, center=True) for rows in (5, 7, 8)]
    check_compiled(prototype_cross_entropy, *several)
    check_compiled(prototype_cross_entropy, *(problem(rows, count=9, width=4) for rows in (5, 7, 8)))


@pytest.mark.parametrize("case", ["three teachers and weights", "bounded", "two widths and a centre"])
def test_triton_stays_inside_its_buffers(case):
    check_guarded(prototype_cross_entropy, problem(rows=17, count=33, **CASES[case]).to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(small_chunks, impl, dtype):
    """Operands are rounded, as they would be for a linear layer; nothing else is, in particular no gradient."""
    case = problem(40, 12, 33, 8, views=2, center=True, weight="some").to(torch.float32, kernel_device())
    matrices = list(case.inputs)[:4]
    rounded = {**case.inputs, **{name: case.inputs[name].to(dtype).float() for name in matrices}}
    function = partial(prototype_cross_entropy, impl=impl)
    expected = evaluate(function, Problem(rounded, case.differentiable))
    with torch.autocast(kernel_device().type, dtype):
        got = evaluate(function, case)
        features = evaluate(
            function, Problem({**case.inputs, "student": case.inputs["student"].to(dtype)}, ("student",))
        )
    assert features["gradient of student"].dtype == dtype
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        # To the passes, the pull on the teacher's rows is an operand too.
        tolerance = 1e-2 if impl != "chunked" and "prototypes" in name else 1e-5
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance * value.abs().max().item())
    gradient = got["gradient of student_prototypes"]
    assert not torch.equal(gradient, gradient.to(dtype).float())


def test_float64_stays_float64_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        check(problem(9), torch.float64, "chunked")
        assert prototype_cross_entropy(**problem(9).to(torch.float64).inputs).dtype == torch.float64


# --- which implementation --------------------------------------------------------------------------------------------


def sizes(rows: int, teachers: int, count: int, width: int, views: int, dtype: torch.dtype) -> tuple[object, ...]:
    """The op's arguments for a problem of these sizes, without memory."""
    meta = partial(torch.empty, device="meta", dtype=dtype)
    match = torch.empty(views, rows, device="meta", dtype=torch.int64) if views else None
    inputs = meta(rows, width), meta(count, width), meta(teachers, width), meta(count, width)
    scale = torch.empty((), device="meta")
    return *inputs, None, match, None, scale, scale, False, False, True, True


def reservation(*arguments: object) -> list[str]:
    return choice.OP.implementation("triton").reservations["forward"](*sizes(*arguments))


def test_where_chunks_are_expected_to_be_faster():
    """EsViT's regions in bf16 go to the passes, in plain float32 to the chunks."""
    esvit = (21_760, 12_544, 65_536, 256, 2)
    assert torch.get_float32_matmul_precision() == "highest"
    assert reservation(*esvit, torch.bfloat16) == []
    (message,) = reservation(*esvit, torch.float32)
    assert "1.8e+02 ms in float32" in message or "184 ms in float32" in message
    assert "memory traffic (an estimate from sizes)" in message
    (message,) = reservation(6_272, 6_272, 65_536, 512, 0, torch.float32)
    assert "in float32" in message
    torch.set_float32_matmul_precision("high")
    try:
        assert reservation(*esvit, torch.float32) == []
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_reservation_moves_auto_and_no_more(monkeypatch):
    case = problem(9, 5, 17, 6, views=2).to(torch.float32, kernel_device())
    assert explain(prototype_cross_entropy, **case.inputs) == {"triton": [], "chunked": [], "reference": []}
    monkeypatch.setitem(choice.KERNEL_RATE, "float32", 1.0)
    reasons = explain(prototype_cross_entropy, **case.inputs)
    assert reasons["triton"][0].startswith("it could run, but its matrix products should take 1.1e+07 ms in float32")
    assert reasons["chunked"] == reasons["reference"] == []
    got = prototype_cross_entropy(**case.inputs, impl="triton")
    torch.testing.assert_close(got, prototype_cross_entropy(**case.inputs, impl="reference"))


def test_triton_gives_reasons():
    case = problem(5, count=9, width=600, teacher_width=513).to(torch.float64, kernel_device())
    case.inputs["student"] = case.inputs["student"].T.contiguous().T
    reasons = explain(prototype_cross_entropy, **case.inputs)["triton"]
    for words in (
        "student is 600 wide; the passes take 512 at most",
        "teacher_prototypes is 513 wide",
        "student is float64; the kernel takes float16, bfloat16, float32",
        "student has stride 5 in its last dimension",
    ):
        assert any(words in reason for reason in reasons), words
    with pytest.raises(UnsupportedError, match="600 wide"):
        prototype_cross_entropy(**case.inputs, impl="triton")
    with pytest.raises(UnsupportedError, match="no 'cuda' implementation; it has triton, chunked, reference"):
        prototype_cross_entropy(**case.inputs, impl="cuda")


# --- errors ----------------------------------------------------------------------------------------------------------

DETACH = "requires a gradient, but the loss has none to it"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_prototypes": nn.Linear(4, 9)}, ValueError, "student_prototypes has a bias"),
        ({"teacher_prototypes": nn.Linear(4, 9)}, ValueError, "teacher_prototypes has a bias"),
        ({"student_prototypes": nn.ReLU()}, TypeError, "student_prototypes must be a matrix"),
        ({"student_prototypes": [1.0]}, TypeError, "student_prototypes must be a matrix"),
        ({"student_prototypes": torch.ones(9, 4).long()}, TypeError, "student_prototypes must be of a floating dtype"),
        (
            {"student_prototypes": nn.utils.weight_norm(nn.Linear(4, 9, bias=False), dim=1)},
            ValueError,
            r"weight_g of student_prototypes must have shape \[9, 1\], got \[1, 4\]",
        ),
        ({"teacher_prototypes": torch.ones(8, 4)}, ValueError, "teacher_prototypes are 8 and student_prototypes 9"),
        ({"student": torch.ones(5, 3)}, ValueError, r"student must have shape \[R, 4\], got \[5, 3\]"),
        ({"teacher": torch.ones(5, 3)}, ValueError, r"teacher must have shape \[Q, 4\], got \[5, 3\]"),
        ({"teacher": torch.ones(6, 4)}, ValueError, "teacher has 6 rows and student 5; pass match"),
        ({"student": torch.ones(0, 4)}, ValueError, "student has no row"),
        ({"teacher": torch.ones(0, 4)}, ValueError, "teacher has no row"),
        ({"match": torch.zeros(5)}, TypeError, "match must be of dtype torch.int64"),
        ({"match": torch.zeros(2, 4).long()}, ValueError, r"match must have shape \[U, 5\], got \[2, 4\]"),
        ({"match": torch.zeros(1, 2, 5).long()}, ValueError, "match must have shape"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \[5\], got \[4\]"),
        ({"weight": torch.ones(5).long()}, TypeError, "weight must be of a floating dtype"),
        ({"weight": torch.ones(5, requires_grad=True)}, ValueError, f"weight {DETACH}"),
        ({"center": torch.ones(1, 9)}, ValueError, r"center must have shape \[9\], got \[1, 9\]"),
        ({"center": torch.ones(9, requires_grad=True)}, ValueError, f"center {DETACH}"),
        ({"student_temp": 0.0}, ValueError, "student_temp must be a finite positive number, got 0.0"),
        ({"teacher_temp": float("inf")}, ValueError, "teacher_temp must be a finite positive number, got inf"),
        ({"teacher_temp": float("nan")}, ValueError, "teacher_temp must be a finite positive number, got nan"),
        ({"student_temp": torch.ones(1)}, ValueError, r"student_temp must have shape \[\], got \[1\]"),
        ({"student_temp": torch.ones((), requires_grad=True)}, ValueError, f"student_temp {DETACH}"),
        ({"teacher": torch.ones(5, 4).bfloat16()}, TypeError, "teacher is torch.bfloat16 and student torch.float32"),
        ({"student": torch.ones(5, 4, device="meta")}, ValueError, "all tensors must be on one device"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
    ],
)
def test_errors_name_the_value_and_the_expectation(change, error, message):
    with pytest.raises(error, match=message):
        prototype_cross_entropy(**{**problem(5, count=9, width=4).inputs, **change})


# --- planted faults --------------------------------------------------------------------------------------------------


def check_everything(impl: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importlib.import_module(CHUNKED).CHUNK_BYTES, "cpu", 1)
        check(problem(33, 12, 17, 6, views=2, center=True, weight="some"), torch.float32, impl)
        check(problem(33, 12, 17, 6, views=2, center=True), torch.float32, impl)
    check(problem(33, 12, 17, 6, views=2, center=True, weight="some"), torch.float32, impl)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("number of teachers missing", FACTORISED, "((lse * count - ", "((lse - "),
        Fault(
            "wrong temperature of the teacher",
            FACTORISED,
            "*(teacher_scale, [], teacher_bounded",
            "*(student_scale, [], False",
        ),
        Fault(
            "wrong temperature in the loss",
            FACTORISED,
            "target).sum(1) * student_scale)",
            "target).sum(1) * teacher_scale)",
        ),
        Fault("weight ignored in the loss", FACTORISED, ") * row_weight).sum()", ")).sum()"),
        Fault("scale missing in the gradients", FACTORISED, "factor = factor * student_scale", "factor = factor * 1"),
        Fault("number of teachers missing in dX", FACTORISED, "mean.mul_(count[:, None])", "mean.mul_(1)"),
        Fault("number of teachers missing in dW", FACTORISED, "row_weight * count, None", "row_weight, None"),
        Fault("weight ignored in dX", FACTORISED, "mul_((row_weight * factor)[:, None])", "mul_(factor)"),
        Fault("weight ignored in the pull", FACTORISED, "wide * row_weight[:, None]", "wide * 1"),
        Fault("centre missing in dW", FACTORISED, "pulled, None, bias,", "pulled, None, None,"),
        Fault("centre missing", FACTORISED, "student_prototypes, bias),", "student_prototypes, None),"),
        Fault("teacher's half of dW with the wrong sign", FACTORISED, "to_prototypes -= ", "to_prototypes += "),
        Fault(
            "-1 taken as a match",
            FACTORISED,
            "torch.where((view >= 0)[:, None], projected[view.clamp(min=0)], 0)",
            "projected[view.clamp(min=0)]",
        ),
        Fault(
            "-1 pulls on row 0",
            FACTORISED,
            "scatter_rows(rows, view, size)",
            "scatter_rows(rows, view.clamp(min=0), size)",
        ),
        Fault("the first view alone pulls", FACTORISED, "total += scatter_rows", "return scatter_rows"),
        Fault("-1 counted", PAIRS, "(match >= 0)", "(match >= -1)", (FACTORISED,)),
        Fault("mean over rows, not pairs", PAIRS, "1 / count.sum()", "1 / torch.ones_like(count).sum()", (FACTORISED,)),
        Fault("weights not scaled back", PAIRS, "1), largest", "1), torch.ones_like(largest)", (FACTORISED,)),
    ],
    ids=lambda fault: fault.name,
)
def test_faults_planted_in_the_passes_are_noticed(fault, tmp_path):
    fault = Fault(fault.name, fault.module, fault.old, fault.new, (*fault.reload, REFERENCE))
    check_noticed(fault, tmp_path, partial(check_everything, "reference"))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("last chunk dropped", CHUNKED, "range(0, rows, size)", "range(0, rows - 1, size)"),
        Fault("last chunks of dW alone", CHUNKED, "total.addmm_(left, right)", "total.copy_(left @ right)"),
        Fault("-1 taken as a match", CHUNKED, "(view >= 0)[:, None]", "(view >= -1)[:, None]"),
        Fault("wrong row of a kept teacher", CHUNKED, "(kept, 0, row,", "(kept, 0, 0 * row,"),
        Fault("number of teachers missing", CHUNKED, "lse * count[part]", "lse"),
        Fault("number of teachers missing in the gradient", CHUNKED, "(count[part] * lift / total)", "(lift / total)"),
        Fault("weight ignored in the loss", CHUNKED, "(terms * row_weight)", "terms"),
        Fault("weight ignored in dW", CHUNKED, "student[part] * row_weight[part, None]", "student[part]"),
        Fault("weight ignored in dX", CHUNKED, "(row_weight * factor)[:, None]", "factor"),
        Fault("scale missing in dW", CHUNKED, "mul_(factor)", "mul_(factor / student_scale)"),
        Fault("centre with the wrong sign", CHUNKED, "logits += bias", "logits -= bias"),
        Fault("last teacher alone", CHUNKED, "target += into", "target.copy_(into)"),
        Fault("wrong temperature", CHUNKED, "into).mul_(teacher_scale)", "into).mul_(student_scale)"),
        Fault("wrong temperature of what is kept", CHUNKED, "T).mul_(teacher_scale)", "T).mul_(student_scale)"),
        Fault("maximum missing", CHUNKED, "total.log() + peak", "total.log()"),
        Fault("-1 counted", PAIRS, "(match >= 0)", "(match >= -1)", (CHUNKED,)),
        Fault("mean over rows, not pairs", PAIRS, "1 / count.sum()", "1 / torch.ones_like(count).sum()", (CHUNKED,)),
        Fault("weights not scaled back", PAIRS, "1), largest", "1), torch.ones_like(largest)", (CHUNKED,)),
    ],
    ids=lambda fault: fault.name,
)
def test_faults_planted_in_the_chunks_are_noticed(fault, tmp_path):
    check_noticed(fault, tmp_path, partial(check_everything, "chunked"))


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: {"center": -inputs["center"]},
        lambda inputs: {"center": inputs["center"] * inputs["teacher_temp"]},
        lambda inputs: {"student_temp": inputs["teacher_temp"]},
        lambda inputs: {"teacher_temp": 1 / inputs["teacher_temp"]},
    ],
    ids=["sign of the centre", "centre after the temperature", "student's temperature", "factor for divisor"],
)
def test_other_arguments_are_noticed(change):
    case = problem(center=True)

    def wrong(impl, **inputs):
        return prototype_cross_entropy(**{**inputs, **change(inputs)}, impl=impl)

    with pytest.raises(AssertionError, match="error"):
        check_accuracy(wrong, eager, case, torch.float64)


# --- pairs and centre ------------------------------------------------------------------------------------------------


def test_cross_view_match_is_dinos_rule():
    got = cross_view_match(4, 2, 3)
    assert got.dtype == torch.int64
    assert got.tolist() == [
        [-1, -1, -1, 0, 1, 2, 0, 1, 2, 0, 1, 2],
        [3, 4, 5, -1, -1, -1, 3, 4, 5, 3, 4, 5],
    ]
    assert (cross_view_match(10, 2, 5) >= 0).sum() == (2 * 10 - 2) * 5
    assert cross_view_match(2, 2, 1, device="meta").device.type == "meta"
    with pytest.raises(ValueError, match="teacher_views=3 is more than student_views=2"):
        cross_view_match(2, 3, 1)


def center_problem(rows: int = 33, count: int = 17, width: int = 6) -> dict[str, torch.Tensor]:
    case = problem(rows, count=count, width=width, center=True)
    return {name: case.inputs[name] for name in ("center", "teacher", "teacher_prototypes")}


def check_center(dtype: torch.dtype = torch.float32, module: str = CENTER) -> None:
    update = importlib.import_module(module).update_center_
    center, teacher, prototypes = center_problem().values()
    teacher, prototypes = teacher.to(dtype), prototypes.to(dtype)
    exact = 0.75 * center.double() + 0.25 * (teacher.double() @ prototypes.double().T).mean(0)
    got = center.clone()
    assert update(got, teacher, prototypes, 0.75) is got
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_centre_is_a_moving_mean_of_logits(dtype):
    check_center(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        check_center(dtype)


@pytest.mark.parametrize("kind", ["plain", "new", "old"])
def test_the_centre_from_a_layer(kind):
    center, teacher, _ = center_problem().values()
    layer = layers(6, 17, kind)
    expected = 0.9 * center + 0.1 * layer(teacher).mean(0).detach()
    update_center_(center, teacher, layer)
    torch.testing.assert_close(center, expected)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("shares swapped", CENTER, ".dtype), 1 - momentum)", ".dtype), momentum)"),
        Fault("sum for mean", CENTER, "(total[:-1] / total[-1])", "total[:-1]"),
        Fault("sums in half precision", CENTER, "teacher.to(dtype).sum(0)", "teacher.sum(0).to(dtype)"),
    ],
    ids=lambda fault: fault.name,
)
def test_faults_planted_in_the_centre_are_noticed(fault, tmp_path):
    check_noticed(fault, tmp_path, lambda: check_center(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": torch.ones(0, 6)}, ValueError, "teacher has no row"),
        ({"teacher": torch.ones(3, 5)}, ValueError, r"teacher must have shape \[Q, 6\], got \[3, 5\]"),
        ({"center": torch.ones(16)}, ValueError, r"center must have shape \[17\], got \[16\]"),
        ({"prototypes": nn.Linear(6, 17)}, ValueError, "prototypes has a bias"),
        ({"momentum": 1.5}, ValueError, "momentum must lie between 0 and 1, got 1.5"),
        ({"group": "world"}, TypeError, "group must be a torch.distributed process group"),
    ],
)
def test_errors_of_the_centre(change, error, message):
    center, teacher, prototypes = center_problem().values()
    with pytest.raises(error, match=message):
        update_center_(**{"center": center, "teacher": teacher, "prototypes": prototypes, **change})


RANKS = """
import json, sys
import torch
import torch.distributed as dist
from vitrail.kernels import update_center_

dist.init_process_group("gloo")
rank = dist.get_rank()
inputs = torch.load(sys.argv[1])
teacher = inputs["teacher"].split([20, 13])[rank]
reduced = []
plain = dist.all_reduce
dist.all_reduce = lambda tensor, *args, **kwargs: (reduced.append(tensor.numel()), plain(tensor, *args, **kwargs))[1]
centre = update_center_(inputs["center"], teacher, inputs["teacher_prototypes"], group=dist.group.WORLD)
if rank == 0:
    json.dump({"centre": centre.tolist(), "reduced": reduced}, open(sys.argv[2], "w"))
dist.destroy_process_group()
"""


@pytest.mark.launch
def test_two_ranks_with_unequal_rows_form_the_centre_of_all(tmp_path):
    inputs = center_problem()
    torch.save(inputs, tmp_path / "inputs.pt")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    finish(start(script, str(tmp_path / "inputs.pt"), str(tmp_path / "result.json"), ranks=2))
    result = json.loads((tmp_path / "result.json").read_text())
    expected = update_center_(inputs["center"].clone(), inputs["teacher"], inputs["teacher_prototypes"])
    torch.testing.assert_close(torch.tensor(result["centre"]), expected)
    assert result["reduced"] == [7]  # the mean feature and the number of rows, not K numbers


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
from functools import partial
import torch
from bench.memory import peak_of
from vitrail.kernels import prototype_cross_entropy

rows, count, width = 1024, 65_536, 64
generator = torch.Generator().manual_seed(0)
unit = lambda n: torch.nn.functional.normalize(torch.randn(n, width, generator=generator))
student, teacher, ours, theirs = unit(rows).requires_grad_(), unit(rows), unit(count).requires_grad_(), unit(count)

def eager():
    target = (teacher @ theirs.T / 0.04).softmax(1)
    loss = -(target * (student @ ours.T / 0.1).log_softmax(1)).sum(1).mean()
    return torch.autograd.grad(loss, (student, ours))

def fused(impl):
    temperatures = {"student_temp": 0.1, "teacher_temp": 0.04}
    loss = prototype_cross_entropy(student, ours, teacher, theirs, **temperatures, impl=impl)
    return torch.autograd.grad(loss, (student, ours))

calls = partial(fused, "auto"), partial(fused, "reference"), eager
first, second, expected = (call() for call in calls)
for a, b, truth in zip(first, second, expected):
    torch.testing.assert_close(a, truth, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(b, truth, rtol=1e-3, atol=1e-7)
del a, b, truth, first, second, expected
print(*(peak_of(call, torch.device("cpu")) for call in calls))
"""


@pytest.mark.slow
def test_the_peak_of_memory_is_an_eighth():
    harness = Path(__file__).parents[2] / "benchmarks" / "harness"
    command = [sys.executable, "-c", MEMORY, str(harness)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
    if "None" in printed:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    fused, passes, eager = map(int, printed)
    assert max(fused, passes) <= eager / 8
