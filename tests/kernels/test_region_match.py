import importlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ladder import Problem, check_accuracy, check_compiled, check_ops, evaluate, kernel_device
from ladder_faults import Fault, check_noticed
from ladder_guards import check_guarded
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.kernels import UnsupportedError, explain
from vitrail.kernels.launch import launches_of
from vitrail.kernels.region_match import nearest_neighbors, reference, region_match, region_match_crops

KERNEL = "vitrail.kernels.region_match.kernel"
REFERENCE = "vitrail.kernels.region_match.reference"
IMPLEMENTATIONS = ("reference", "triton")
RUNS = [
    ("reference", torch.float64),
    *((impl, dtype) for impl in IMPLEMENTATIONS for dtype in (torch.float32, torch.float16, torch.bfloat16)),
]


def crops(
    student: tuple[int, ...] = (9, 9, 4),
    teacher: tuple[int, ...] = (9, 9),
    batch: int = 2,
    width: int = 80,
    **options: object,
) -> Problem:
    generator = torch.Generator().manual_seed(width)
    rows, others = (torch.randn(batch * sum(tokens), width, generator=generator) for tokens in (student, teacher))
    tokens = {"student_tokens": list(student), "teacher_tokens": list(teacher)}
    return Problem({"student": rows, "teacher": others, **tokens, **options})


def pair(student: int, teacher: int, batch: int = 2, width: int = 80) -> Problem:
    generator = torch.Generator().manual_seed(student)
    rows, others = (torch.randn(batch, tokens, width, generator=generator) for tokens in (student, teacher))
    return Problem({"student": rows, "teacher": others})


def neighbours(count: int, width: int = 80) -> Problem:
    return Problem({"x": torch.randn(count, width, generator=torch.Generator().manual_seed(count))})


def eager(student, teacher):
    """Normalises both, multiplies, takes the maximum."""
    similarity = F.normalize(student, dim=2) @ F.normalize(teacher, dim=2).transpose(1, 2)
    return similarity.argmax(2), similarity.amax(2)


def eager_crops(student, teacher, student_tokens, teacher_tokens, skip_same_view=True):
    """Calls the formula for one pair after the other."""
    batch = len(teacher) // sum(teacher_tokens)
    indices, similarities, first = [], [], 0
    for view, theirs in enumerate(teacher_tokens):
        others = teacher[first : first + batch * theirs].view(batch, theirs, -1)
        for crop, rows in enumerate(student.split([batch * ours for ours in student_tokens])):
            index, similarity = eager(rows.view(batch, student_tokens[crop], -1), others)
            index = index + first + torch.arange(batch)[:, None] * theirs
            if skip_same_view and crop == view:
                index, similarity = torch.full_like(index, -1), torch.zeros_like(similarity)
            indices.append(index.flatten())
            similarities.append(similarity.flatten())
        first += batch * theirs
    return torch.cat(indices).view(len(teacher_tokens), -1), torch.cat(similarities).view(len(teacher_tokens), -1)


def eager_neighbours(x):
    """Fills the diagonal of the similarity matrix."""
    x = F.normalize(x, dim=1)
    similarity = (x @ x.T).fill_diagonal_(-2)
    return similarity.argmax(1), similarity.amax(1)


def sines(shape: tuple[int, ...], a: float, b: float) -> torch.Tensor:
    return (a * torch.arange(math.prod(shape), dtype=torch.float64) + b).sin().float().view(shape)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_golden(impl):
    student, teacher = sines((52, 8), 0.41, 0.1), sines((36, 8), 0.59, 0.7)
    match, _ = region_match_crops(
        student.to(kernel_device()), teacher.to(kernel_device()), [9, 9, 4, 4], [9, 9], impl=impl
    )
    local = match[0, 36:44].view(2, 4).cpu() - torch.tensor([[0], [9]])
    assert local.tolist() == [[6, 8, 1, 3], [0, 2, 0, 2]]
    assert (match[0, :18] == -1).all()
    assert (match[1, 18:36] == -1).all()


@pytest.mark.parametrize("skip_same_view", [True, False])
@pytest.mark.parametrize(("impl", "dtype"), RUNS)
def test_crops(impl, dtype, skip_same_view):
    check_accuracy(region_match_crops, eager_crops, crops(skip_same_view=skip_same_view), dtype, impl)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((49, 49, *(9,) * 8), (49, 49)),  # EsViT's: the small crops share their tiles
        ((65, 65, 63), (65, 65)),  # tiles in which every row is skipped
        ((3, 7, 7, 2, 7), (5, 70, 70, 1)),  # views of unequal size; equal crops that are no neighbours
        ((1,), (1,)),
    ],
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_crops_of_many_sizes(impl, student, teacher):
    check_accuracy(region_match_crops, eager_crops, crops(student, teacher, width=70), torch.float32, impl)


@settings(max_examples=12, deadline=None)
@given(
    student=st.sampled_from([1, 2, 9, 49, 63, 65]),
    teacher=st.sampled_from([1, 2, 9, 49, 63, 64, 65, 129]),
    batch=st.integers(1, 3),
    width=st.sampled_from([8, 31, 32, 33, 64, 65, 100]),
    impl=st.sampled_from(IMPLEMENTATIONS),
)
def test_pairs_of_any_size(student, teacher, batch, width, impl):
    check_accuracy(region_match, eager, pair(student, teacher, batch, width), torch.float32, impl)


@settings(max_examples=12, deadline=None)
@given(
    count=st.sampled_from([2, 3, 63, 64, 65, 130, 200]),
    programs=st.sampled_from([1, 8, 256]),
    width=st.integers(8, 70),
    impl=st.sampled_from(IMPLEMENTATIONS),
)
def test_neighbours_of_any_number(count, width, impl, programs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module(KERNEL), "PROGRAMS", programs)
        check_accuracy(nearest_neighbors, eager_neighbours, neighbours(count, width), torch.float32, impl)


@pytest.mark.parametrize(("impl", "dtype"), RUNS)
def test_pairs_and_neighbours(impl, dtype):
    check_accuracy(region_match, eager, pair(9, 17), dtype, impl)
    check_accuracy(nearest_neighbors, eager_neighbours, neighbours(20), dtype, impl)


def test_the_reference_in_pieces(monkeypatch):
    """With little memory, images and tokens are taken in several pieces, the last one smaller."""
    for size in (1, 100, 500, 2000):
        monkeypatch.setattr(reference, "PIECE", size)
        check_accuracy(region_match_crops, eager_crops, crops(batch=3), torch.float32)
        check_accuracy(nearest_neighbors, eager_neighbours, neighbours(50), torch.float32)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_the_reference_holds_no_matrix_of_all_pairs():
    with Largest() as largest:
        nearest_neighbors(torch.randn(4096, 8).bfloat16())
    assert 0 < largest.elements <= reference.PIECE


@pytest.mark.parametrize("programs", [1, 256])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_lowest_of_equals_wins(impl, programs, monkeypatch):
    """Small integers, whose products are exact: teacher rows 3, 5 and 68 are the same, and 68 is in another tile."""
    monkeypatch.setattr(importlib.import_module(KERNEL), "PROGRAMS", programs)
    x = torch.eye(70, 72, device=kernel_device())
    x[5], x[68] = x[3], x[3]
    index, similarity = region_match(x[None, :6], x[None], impl=impl)
    assert index.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert similarity.tolist() == [[1.0] * 6]
    index, _ = nearest_neighbors(x, impl=impl)
    assert index[[3, 5, 68]].tolist() == [5, 3, 3]
    assert index[:3].tolist() == [1, 0, 0]  # similarity 0 with everything


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_of_zeros_and_nan(impl):
    x = torch.eye(8, 9, device=kernel_device())
    x[7] = x[6] + x[5]
    x[2] = 0.0
    x[4] = torch.nan
    x[1, 8] = torch.inf
    index, similarity = nearest_neighbors(x, impl=impl)
    assert index.tolist() == [2, 0, 0, 0, 0, 7, 7, 5]
    similarity = similarity.cpu()
    assert similarity[[1, 4]].isnan().all()
    torch.testing.assert_close(similarity[[0, 2, 3]], torch.zeros(3))
    torch.testing.assert_close(similarity[5:], torch.full((3,), 0.5**0.5))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scale_does_not_matter(impl):
    case = crops().to(torch.float32, kernel_device()).inputs
    scaled = {**case, "student": case["student"] * 1e-4, "teacher": case["teacher"] * 2.0**20}
    for got, expected in zip(
        region_match_crops(**scaled, impl=impl), region_match_crops(**case, impl=impl), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_triton_stays_inside_its_buffers():
    for dtype in (torch.float32, torch.bfloat16):
        check_guarded(region_match_crops, crops((9, 9, 4), (9, 3)).to(dtype))
        check_guarded(region_match, pair(65, 67).to(dtype))
        check_guarded(nearest_neighbors, neighbours(67, 33).to(dtype))


def test_ops_and_compilation():
    for function, case in (
        (region_match, pair(4, 6)),
        (region_match_crops, crops()),
        (nearest_neighbors, neighbours(6)),
    ):
        check_ops(function, case)
        check_compiled(function, case)
    check_compiled(partial(region_match), pair(4, 6), pair(5, 7, 3), pair(9, 3, 4))
    check_compiled(partial(region_match_crops), *(crops(batch=batch) for batch in (2, 3, 5)))
    check_compiled(partial(nearest_neighbors), *(neighbours(count) for count in (6, 9, 12)))


def test_all_pairs_are_one_launch():
    launcher = importlib.import_module(KERNEL)
    build = launcher.representative_calls()["bf16 2x49+8x9 C768"]
    (recorded,) = launches_of(launcher, build(device="meta"))
    assert recorded.grid == (128 * (2 + 2), 2, 1)


def test_the_precision_of_float32_products_is_the_users_choice():
    launcher = importlib.import_module(KERNEL)
    build = launcher.representative_calls()["fp32 2x49+8x9 C768"]
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            (recorded,) = launches_of(launcher, build(device="meta"))
            assert recorded.options["PRECISION"] == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_changes_nothing():
    for case in (crops().to(torch.float32), crops().to(torch.bfloat16)):
        expected = evaluate(region_match_crops, case)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                got = evaluate(region_match_crops, case)
            assert got["output 1"].dtype == torch.float32
            assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_views_into_larger_tensors_and_no_gradient():
    full = torch.randn(2, 10, 40, requires_grad=True)
    index, similarity = region_match(full[:, 1:], full[:, 1:])  # without the class token
    assert torch.equal(index, torch.arange(9).expand(2, 9))
    assert not similarity.requires_grad
    wide = torch.randn(12, 80, device=kernel_device())[:, :40]
    for got, expected in zip(nearest_neighbors(wide, impl="triton"), nearest_neighbors(wide.contiguous()), strict=True):
        torch.testing.assert_close(got, expected)


def test_nothing_to_match():
    index, similarity = region_match(torch.ones(2, 0, 8), torch.ones(2, 3, 8))
    assert index.shape == similarity.shape == (2, 0)
    for impl in IMPLEMENTATIONS:
        index, similarity = region_match_crops(torch.ones(0, 8), torch.ones(0, 8), [4, 2], [4], impl=impl)
        assert index.shape == similarity.shape == (1, 0)


SKIPPED = "first_crop + crop != view"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("ties to the higher block", KERNEL, "better = top > best", "better = top >= best"),
        Fault(
            "drop the last block of the teacher", KERNEL, "per_share, end), BLOCK", "per_share, end - BLOCK + 1), BLOCK"
        ),
        Fault("drop the last columns", KERNEL, "score = tl.dot(left", "score = score if first else tl.dot(left"),
        Fault(
            "teacher not normalised", KERNEL, "score = score / tl.maximum(tl.sqrt_rn(squares), EPS)[None, :]", "pass"
        ),
        Fault("student not normalised", KERNEL, "best / tl.maximum(tl.sqrt_rn(squares), EPS)", "best"),
        Fault(
            "norm squared", KERNEL, "score / tl.maximum(tl.sqrt_rn(squares), EPS)", "score / tl.maximum(squares, EPS)"
        ),
        Fault("self not excluded", KERNEL, 'SKIP == "self"', 'SKIP == "itself"'),
        Fault("same view not skipped", KERNEL, SKIPPED, "first_crop + crop >= 0"),
        Fault("same view of the wrong group", KERNEL, SKIPPED, "crop != view"),
        Fault("index within the view", KERNEL, "(view_row + nearest)", "nearest"),
        Fault("another image", KERNEL, "view_row += sample * view_each", "view_row += view_each"),
        Fault("last share missing", KERNEL, "range(1, shares)", "range(1, shares - 1)"),
        Fault("ties to the higher share", KERNEL, "(value > best)", "(value >= best)"),
        Fault(
            "only the first share searches",
            KERNEL,
            "min((share + 1) * tokens_per_share, end)",
            "min(tokens_per_share, end)",
        ),
        Fault("padding as a candidate", KERNEL, "allowed = candidate[None, :]", "allowed = (token >= 0)[None, :]"),
        Fault("first group only", KERNEL, "here = program >= programs_before", "here = program == programs_before"),
    ],
    ids=lambda fault: fault.name,
)
def test_planted_faults_are_noticed(fault, tmp_path):
    def check() -> None:
        device = kernel_device()
        ones = torch.ones(1, 3, 8, device=device)
        for programs in (1, 256):  # the teacher's tiles in one program, and in as many shares as there are tiles
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(importlib.import_module(KERNEL), "PROGRAMS", programs)
                check_accuracy(region_match_crops, eager_crops, odd, torch.float32, "triton")
                check_accuracy(nearest_neighbors, eager_neighbours, neighbours(65), torch.float32, "triton")
                equal = region_match(torch.eye(2, 8, device=device)[None], twice.to(device)[None], impl="triton")[0]
                assert equal.max() == 5
                assert region_match(-ones, ones, impl="triton")[1].max() < 0

    odd = crops((9, 9, 4), (9, 100))
    twice = torch.zeros(66, 8)
    twice[2, 0] = twice[5, 1] = twice[64, 0] = twice[65, 1] = 1
    check_noticed(fault, tmp_path, check)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("ties to the higher index", REFERENCE, "position, count).amin(2)", "position, -1).amax(2)"),
        Fault("teacher not normalised", REFERENCE, ".div_(norm[some])", ""),
        Fault("student not normalised", REFERENCE, ".div_(student_norm[here])", ""),
        Fault("self not excluded", REFERENCE, 'exclude_self=skip == "self"', "exclude_self=False"),
        Fault("same view not skipped", REFERENCE, "crop == view", "crop == -1"),
        Fault("index within the view", REFERENCE, "(nearest + first)", "nearest"),
        Fault("NaN wins", REFERENCE, "nan=LOWEST", "nan=torch.inf"),
        Fault("the diagonal of the first piece", REFERENCE, "score.diagonal(token, ", "score.diagonal(0, "),
    ],
    ids=lambda fault: fault.name,
)  # fmt: skip
def test_faults_planted_in_the_reference_are_noticed(fault, tmp_path):
    def check() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module(REFERENCE), "PIECE", 500)
            check_accuracy(region_match_crops, eager_crops, crops(), torch.float64)
            check_accuracy(nearest_neighbors, eager_neighbours, neighbours(20), torch.float64)
            equal = torch.ones(1, 4, 3)
            assert region_match(equal, equal)[0].max() == 0
            equal[0, 1] = torch.nan
            assert region_match(equal[:, :1], equal)[0].max() == 0

    check_noticed(fault, tmp_path, check)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: region_match(x.long(), x), TypeError, "student must be of a floating dtype, got torch.int64"),
        (lambda x: region_match(x[0], x), ValueError, r"student must have shape \[B, T, C\], got \[4, 8\]"),
        (lambda x: region_match(x, x[..., :7]), ValueError, "rows of equal width, got 8 and 7"),
        (lambda x: region_match(x, x[:1]), ValueError, "student is of 2 images, but teacher of 1"),
        (lambda x: region_match(x, x[:, :0]), ValueError, r"teacher has shape \[2, 0, 8\]: there is no token"),
        (lambda x: region_match(x, x.to("meta")), ValueError, "student on cpu, teacher on meta"),
        (lambda x: region_match(x, x, impl="fast"), ValueError, "impl must be one of"),
        (lambda x: region_match(x, x, impl="cuda"), UnsupportedError, "no 'cuda' implementation"),
        (lambda x: region_match_crops(x, x[0], [4], [4]), ValueError, r"student must have shape \[rows, C\]"),
        (lambda x: region_match_crops(x[0], x[0], [3], [4]), ValueError, "4 rows, expected a multiple of 3"),
        (lambda x: region_match_crops(x[0], x[1], [2], [4]), ValueError, "teacher has 4 rows, expected 8: 2 images"),
        (lambda x: region_match_crops(x[0], x[1], [], [4]), ValueError, r"student_tokens must .*, got \[\]"),
        (lambda x: region_match_crops(x[0], x[1], [4], [4, 0]), ValueError, r"teacher_tokens must .*, got \[4, 0\]"),
        (nearest_neighbors, ValueError, r"x must have shape \[N, C\], got \[2, 4, 8\]"),
        (lambda x: nearest_neighbors(x[0, :1]), ValueError, r"x has shape \[1, 8\]: no row has another"),
        (lambda x: nearest_neighbors(x[0].long()), TypeError, "x must be of a floating dtype"),
    ],
)  # fmt: skip
def test_errors_name_the_value_and_the_expectation(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 4, 8))


def test_triton_gives_reasons():
    device = kernel_device()
    x = torch.ones(2, 4, 8, device=device)
    assert explain(region_match, x, x) == {"triton": [], "reference": []}
    first, second = explain("region_match", x.double(), x)["triton"]
    assert "student is float64; the kernel takes float16, bfloat16, float32" in first
    assert "student is float64 but teacher is float32" in second
    (reason,) = explain(region_match, x[:1], x[:1].mT.contiguous().mT)["triton"]
    assert "teacher has stride 4 in its last dimension" in reason
