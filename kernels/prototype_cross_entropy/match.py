"""Which teacher rows each student row is held to."""

import torch


def cross_view_match(
    student_views: int, teacher_views: int, batch: int, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """DINO's pairs: each student view is held to every teacher view of the same image but its own.

    Rows are ordered view by view, as multi-crop training concatenates them; the first student views are those that the
    teacher sees too (Caron et al. 2021, arXiv 2104.14294, eq. 3).

    Args:
        student_views: Number of student views V.
        teacher_views: Number of teacher views U, at most V.
        batch: Number of images B.
        device: Where to.

    Returns:
        [U, V B] int64 for `prototype_cross_entropy`'s `match`: teacher row u B + i for student row v B + i, -1 where
        u = v. It has U V B - U B pairs.

    Raises:
        ValueError: There are more teacher views than student views.
    """
    if teacher_views > student_views:
        raise ValueError(f"teacher_views={teacher_views} is more than student_views={student_views}; swap them")
    teacher = torch.arange(teacher_views, device=device)[:, None, None]
    student = torch.arange(student_views, device=device)[None, :, None]
    image = torch.arange(batch, device=device)
    return torch.where(teacher == student, -1, teacher * batch + image).flatten(1)
