"""Region matching: the op, its registration and the public functions."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks
from ..library import define
from ..registry import Implementation, Op, check_impl, register
from .reference import compute_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _check_pair(student: torch.Tensor, teacher: torch.Tensor, expected: tuple[str, ...]) -> None:
    """Checks what holds for every call: dtypes, devices, number of dimensions, width."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        checks.check_floating(name, tensor)
        checks.check_shape(name, tensor, expected)
    checks.check_same_device(student=student, teacher=teacher)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student and teacher must have rows of equal width, got {student.shape[-1]} and {teacher.shape[-1]}; "
            "match features before or after a projection, not one of each"
        )


def _bind(student: torch.Tensor, teacher: torch.Tensor) -> tuple[Any, ...]:
    """Checks the arguments of `region_match` and returns those of the forward pass."""
    _check_pair(student, teacher, ("B", "T", "C"))
    batch, ours, _ = student.shape
    if teacher.shape[0] != batch:
        raise ValueError(f"student is of {batch} images, but teacher of {teacher.shape[0]}; pass the same images")
    theirs = teacher.shape[1]
    if theirs == 0:
        raise ValueError(f"teacher has shape {list(teacher.shape)}: there is no token to match with")
    rows, others = (tensor.detach().flatten(0, 1) for tensor in (student, teacher))
    return rows, others, [ours], [theirs], "nothing"


def _check_tokens(name: str, tokens: Sequence[int]) -> list[int]:
    """Returns the numbers of tokens as a list, once they are fit for use."""
    if len(tokens) == 0 or min(tokens) < 1:
        raise ValueError(f"{name} must hold one positive number of tokens for each crop, got {list(tokens)}")
    return list(tokens)


def _bind_crops(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_tokens: Sequence[int],
    teacher_tokens: Sequence[int],
    *,
    skip_same_view: bool = True,
) -> tuple[Any, ...]:
    """Checks the arguments of `region_match_crops` and returns those of the forward pass."""
    _check_pair(student, teacher, ("rows", "C"))
    ours = _check_tokens("student_tokens", student_tokens)
    theirs = _check_tokens("teacher_tokens", teacher_tokens)
    if student.shape[0] % sum(ours):
        raise ValueError(
            f"student has {student.shape[0]} rows, expected a multiple of {sum(ours)}, the sum of student_tokens={ours}"
        )
    batch = student.shape[0] // sum(ours)
    if teacher.shape[0] != batch * sum(theirs):
        raise ValueError(
            f"teacher has {teacher.shape[0]} rows, expected {batch * sum(theirs)}: {batch} images, as student has, "
            f"of teacher_tokens={theirs}"
        )
    return student.detach(), teacher.detach(), ours, theirs, "view" if skip_same_view else "nothing"


def bind_neighbors(x: torch.Tensor) -> tuple[Any, ...]:
    """Checks the argument of `nearest_neighbors` and returns those of the forward pass."""
    checks.check_floating("x", x)
    checks.check_shape("x", x, ("N", "C"))
    if x.shape[0] < 2:
        raise ValueError(f"x has shape {list(x.shape)}: no row has another row to be near to; pass two rows at least")
    rows, count = x.detach(), x.shape[0]
    return rows, rows, [count], [count], "self"


def triton_reasons(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_tokens: Sequence[int],
    teacher_tokens: Sequence[int],
    skip: str,
) -> list[str]:
    """Returns why the Triton kernel cannot run this call."""
    reasons = checks.triton_reasons(student.device)
    reasons += checks.dtype_reasons(DTYPES, student=student.dtype, teacher=teacher.dtype)
    if student.dtype != teacher.dtype:
        ours, theirs = (str(tensor.dtype).removeprefix("torch.") for tensor in (student, teacher))
        reasons.append(f"student is {ours} but teacher is {theirs}; the kernel takes one dtype; convert one of them")
    return reasons + checks.last_dim_reasons(student=student, teacher=teacher)


def _fake(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_tokens: Sequence[int],
    teacher_tokens: Sequence[int],
    skip: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    index = student.new_empty((len(teacher_tokens), student.shape[0]), dtype=torch.int64)
    return index, student.new_empty(index.shape, dtype=compute_dtype(student, teacher))


OP = register(
    Op(
        name="region_match",
        bind=_bind,
        implementations=(
            Implementation(
                name="triton",
                module="vitrail.kernels.region_match.kernel",
                reasons={"forward": triton_reasons},
                supports="fp16, bf16, fp32; any width and any number of crops, views and tokens; rows contiguous",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.region_match.reference",
                reasons={"forward": lambda *_: []},
                supports="also fp64, two dtypes and any stride",
            ),
        ),
    )
)
_forward = define(
    OP,
    "forward",
    "Tensor student, Tensor teacher, SymInt[] student_tokens, SymInt[] teacher_tokens, str skip",
    "(Tensor, Tensor)",
    _fake,
)


def region_match(
    student: torch.Tensor, teacher: torch.Tensor, *, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds, for every student token, the most similar teacher token of the same image by cosine.

    The matching of EsViT's region loss (Li et al. 2022, arXiv 2106.09785, section 3.2) for one pair of crops;
    `region_match_crops` does all pairs in one launch. Nothing here is differentiable.

    Args:
        student: [B, S, C], floating.
        teacher: [B, T, C], floating, T at least 1.
        impl: `auto`, `triton` or `reference`.

    Returns:
        Token of the teacher, int64 [B, S], 0 to T - 1: the lowest of equally similar ones. Its similarity [B, S],
        float32 whatever the autocast state, float64 if an input is. A row of zeros has similarity 0 with everything.
        A NaN similarity counts as the lowest; if there is no other, the result is token 0 and NaN.

    Raises:
        TypeError: An input is not floating.
        ValueError: A shape or a device does not fit.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    rows, others, ours, theirs, skip = _bind(student, teacher)
    index, similarity = _forward(rows, others, ours, theirs, skip, impl)
    shape = student.shape[:2]
    first = torch.arange(shape[0], device=student.device)[:, None] * theirs[0]
    return index.view(shape) - first, similarity.view(shape)


def region_match_crops(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_tokens: Sequence[int],
    teacher_tokens: Sequence[int],
    *,
    skip_same_view: bool = True,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matches every student crop with every teacher view of the same image, as `region_match`, in one launch.

    Args:
        student: [R, C], floating: rows sorted by crop, then image, then token; R = B Σ student_tokens.
        teacher: [Q, C], floating: rows sorted by view, then image, then token; Q = B Σ teacher_tokens.
        student_tokens: Number of tokens of each crop, such as [49, 49, 9, 9].
        teacher_tokens: Number of tokens of each of the V teacher views, such as [49, 49].
        skip_same_view: Whether to leave out crop v with view v, which show the same pixels.
        impl: `auto`, `triton` or `reference`.

    Returns:
        Row of `teacher`, int64 [V, R], -1 where skipped: the lowest of equally similar ones. Its similarity [V, R],
        0 where skipped; dtype and NaN as in `region_match`.

    Raises:
        TypeError: An input is not floating.
        ValueError: A shape, a device or a number of tokens does not fit.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind_crops(student, teacher, student_tokens, teacher_tokens, skip_same_view=skip_same_view)
    result: tuple[Any, ...] = _forward(*arguments, impl)
    return result[0], result[1]


def nearest_neighbors(x: torch.Tensor, *, impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Finds, for every row, the most similar other row by cosine. Nothing here is differentiable.

    The search behind the KoLeo loss (Sablayrolles et al. 2018, arXiv 1806.03198). No [N, N] matrix is stored.

    Args:
        x: [N, C], floating, N at least 2.
        impl: `auto`, `triton` or `reference`.

    Returns:
        Number of the other row, int64 [N], the lowest of equally similar ones; its similarity [N], dtype and NaN as
        in `region_match`.

    Raises:
        TypeError: The input is not floating.
        ValueError: The input is no matrix, or has fewer than two rows.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    index, similarity = _forward(*bind_neighbors(x), impl)
    return index[0], similarity[0]
