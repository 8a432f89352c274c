"""The loss from the two softmax passes: teacher and student meet in feature space, not over the prototypes."""

import torch

from ..passes import compute_dtype
from ..scatter import scatter_rows
from ..softmax_col_pass.op import OP as COL_PASS
from ..softmax_row_pass.op import OP as ROW_PASS
from .pairs import counts, weights


def forward(
    impl: str,
    student: torch.Tensor,
    student_prototypes: torch.Tensor,
    teacher: torch.Tensor,
    teacher_prototypes: torch.Tensor,
    bias: torch.Tensor | None,
    match: torch.Tensor | None,
    weight: torch.Tensor | None,
    student_scale: torch.Tensor,
    teacher_scale: torch.Tensor,
    student_bounded: bool,
    teacher_bounded: bool,
    need_student: bool,
    need_prototypes: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss and its gradients to student [R, d] and student prototypes [K, d], empty where unneeded.

    `impl` is that of the passes.
    """
    dtype = compute_dtype(student)
    teacher_lse, projected = ROW_PASS.run(
        *("forward", impl, teacher, teacher_prototypes, student_prototypes, bias),
        *(teacher_scale, [], teacher_bounded, True),
    )
    lse, mean = ROW_PASS.run(
        *("forward", impl, student, student_prototypes, None, None, student_scale, [], student_bounded, need_student),
    )
    count = counts(match, student.shape[0], lse)
    target = _matched(projected, match)
    row_weight, factor = weights(weight, count)
    wide = student.to(dtype)
    loss = ((lse * count - (wide * target).sum(1) * student_scale) * row_weight).sum() * factor
    factor = factor * student_scale

    to_student = mean
    if need_student:
        to_student = mean.mul_(count[:, None]).sub_(target).mul_((row_weight * factor)[:, None])
    to_prototypes = mean.new_empty((0, student.shape[1]))
    if need_prototypes:
        to_prototypes = COL_PASS.run(
            *("forward", impl, student, student_prototypes, lse, None, row_weight * count, None, student_scale, []),
        )
        pulled = _scattered(wide * row_weight[:, None], match, teacher.shape[0]).to(student.dtype)
        to_prototypes -= COL_PASS.run(
            *("forward", impl, teacher, teacher_prototypes, teacher_lse, pulled, None, bias, teacher_scale, []),
        )
        to_prototypes *= factor
    return loss, to_student, to_prototypes


def _matched(projected: torch.Tensor, match: torch.Tensor | None) -> torch.Tensor:
    """Returns the sum of each student row's projected teacher rows, [R, d]."""
    if match is None:
        return projected
    total = projected.new_zeros((match.shape[1], projected.shape[1]))
    for view in match:
        total += torch.where((view >= 0)[:, None], projected[view.clamp(min=0)], 0)
    return total


def _scattered(rows: torch.Tensor, match: torch.Tensor | None, size: int) -> torch.Tensor:
    """Returns, for each teacher row, the sum of the student rows that are held to it, [size, d]."""
    if match is None:
        return rows
    total = rows.new_zeros((size, rows.shape[1]))
    for view in match:
        total += scatter_rows(rows, view, size)
    return total
