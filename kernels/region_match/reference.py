"""Region matching in plain PyTorch: one batched product for each pair of crop and view, in bounded pieces."""

from collections.abc import Sequence

import torch

EPS = 1e-12  # of a norm, as in torch.nn.functional.normalize
LOWEST = -3e38  # what a NaN similarity counts as: below every other, above what is not a candidate
PIECE = 2**20  # similarities, or values of their rows, at a time: 4 MB, which a CPU's cache still holds


def compute_dtype(student: torch.Tensor, teacher: torch.Tensor) -> torch.dtype:
    """Returns the dtype of norms and similarities: float64 if an input is, else float32."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def forward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_tokens: Sequence[int],
    teacher_tokens: Sequence[int],
    skip: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds, for every student row and teacher view, the most similar teacher row of the same image.

    Args:
        student: [R, C], R = B Σ student_tokens; rows sorted by crop, then image, then token.
        teacher: [Q, C], Q = B Σ teacher_tokens; likewise by view.
        student_tokens: Tokens of each crop.
        teacher_tokens: Tokens of each of the V views.
        skip: `nothing`; `view`, to leave out crop v with view v; `self`, to leave out teacher row r for student row r,
            where both are the same rows.

    Returns:
        int64 rows of `teacher` [V, R], -1 where skipped; cosine similarities [V, R], 0 where skipped, float32, or
        float64 if an input is.
    """
    dtype = compute_dtype(student, teacher)
    batch = len(teacher) // sum(teacher_tokens)
    index = student.new_full((len(teacher_tokens), len(student)), -1, dtype=torch.int64)
    similarity = student.new_zeros(index.shape, dtype=dtype)
    student_norm, teacher_norm = (
        torch.linalg.vector_norm(rows, dim=1, dtype=dtype).clamp_(min=EPS) for rows in (student, teacher)
    )
    with torch.autocast(student.device.type, enabled=False):  # it would take the products in half precision
        start = 0
        for view, theirs in enumerate(teacher_tokens):
            there = slice(start, start + batch * theirs)
            view_rows = teacher[there].unflatten(0, (batch, theirs))
            view_norm = teacher_norm[there].view(batch, 1, theirs)
            first = torch.arange(start, start + batch * theirs, theirs, device=student.device)[:, None]
            start, begin = start + batch * theirs, 0
            for crop, ours in enumerate(student_tokens):
                here = slice(begin, begin + batch * ours)
                begin += batch * ours
                if skip == "view" and crop == view:
                    continue
                rows = student[here].unflatten(0, (batch, ours))
                nearest, best = _nearest(rows, view_rows, view_norm, dtype, exclude_self=skip == "self")
                index[view, here] = (nearest + first).flatten()
                similarity[view, here] = best.flatten().div_(student_norm[here])
    return index, similarity


def _nearest(
    rows: torch.Tensor, others: torch.Tensor, norm: torch.Tensor, dtype: torch.dtype, *, exclude_self: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the token of `others` [B, T, C] for each of `rows` [B, S, C], and its similarity times the row's norm."""
    batch, tokens, width = rows.shape
    count = others.shape[1]
    nearest = rows.new_empty((batch, tokens), dtype=torch.int64)
    best = rows.new_empty((batch, tokens), dtype=dtype)
    position = torch.arange(count, dtype=torch.int32, device=rows.device)
    images = max(1, PIECE // max(tokens * count, max(tokens, count) * width, 1))
    piece = max(1, PIECE // max(count, width))
    for image in range(0, batch, images):
        some = slice(image, image + images)
        columns = others[some].to(dtype).transpose(1, 2)
        for token in range(0, tokens, piece):
            part = (some, slice(token, token + piece))
            # The row's own norm does not change which is nearest: it divides the result.
            score = torch.bmm(rows[part].to(dtype), columns).div_(norm[some])
            score.nan_to_num_(nan=LOWEST, posinf=torch.inf, neginf=LOWEST)
            if exclude_self:
                score.diagonal(token, dim1=1, dim2=2).fill_(-torch.inf)
            top = score.amax(2, keepdim=True)
            # The lowest of equals by construction: which of them argmax returns is not promised on every device.
            nearest[part] = torch.where(score == top, position, count).amin(2)
            best[part] = top.squeeze(2)
    return nearest, best.masked_fill_(best <= LOWEST, torch.nan)
