"""The loss from PyTorch's own matrix products: the logits of some rows at a time, and at once their gradient.

Half the matrix products of the two passes, since nothing is computed twice; in exchange every logit travels through
memory several times. A teacher's probabilities are kept where those of all its rows fit into one part, as those of
class tokens do; else they are computed again for each student row that is held to them.
"""

from typing import Any

import torch

from ..passes import compute_dtype
from .pairs import counts, weights

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}  # of logits; there are four such buffers at most
LIFT = {torch.float16: 2.0**10}  # factor of the gradient to the logits: over 65,536 prototypes fp16 would lose it


def chunk_bytes(device: torch.device) -> int:
    """Returns how large a part is."""
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])


def teacher_fits(rows: int, prototypes: int, device: torch.device) -> bool:
    """Whether the probabilities of all the teacher's rows are kept."""
    return 4 * rows * prototypes <= chunk_bytes(device)


def forward(student: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the loss and its gradients to student [R, d] and student prototypes [K, d], empty where unneeded."""
    with torch.autocast(student.device.type, enabled=False):  # operands have its dtype already; sums must not
        return _forward(student, *rest)


def _forward(
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
    dtype, device = compute_dtype(student), student.device
    if device.type == "cpu":  # whose products of half-precision matrices round their results
        student, teacher = student.to(dtype), teacher.to(dtype)
        student_prototypes, teacher_prototypes = student_prototypes.to(dtype), teacher_prototypes.to(dtype)
    (rows, width), prototypes = student.shape, student_prototypes.shape[0]
    terms = torch.empty(rows, dtype=dtype, device=device)
    count = counts(match, rows, terms)
    row_weight, factor = weights(weight, count)
    to_student = torch.empty((rows if need_student else 0, width), dtype=dtype, device=device)
    to_prototypes = torch.zeros((prototypes if need_prototypes else 0, width), dtype=dtype, device=device)

    lift = LIFT.get(student.dtype, 1.0)
    size = min(max(chunk_bytes(device) // (prototypes * dtype.itemsize), 16), rows)
    kept = None
    if match is not None and teacher_fits(teacher.shape[0], prototypes, device):
        kept = _product(teacher, teacher_prototypes.T).mul_(teacher_scale)
        _normalise(kept, bias, teacher_bounded)
    buffers = [
        torch.empty((size, prototypes), dtype=dtype, device=device)
        for _ in range(2 if match is None or len(match) == 1 else 3)
    ]
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        logits, target, *scratch = (buffer[: part.stop - start] for buffer in buffers)
        for index, view in enumerate((None,) if match is None else match[:, part]):
            into = scratch[0] if index else target
            row = None if view is None else view.clamp(min=0)
            if kept is not None and row is not None:
                torch.index_select(kept, 0, row, out=into)
            else:
                chosen = teacher[part] if row is None else teacher[row]
                _product(chosen, teacher_prototypes.T, into).mul_(teacher_scale)
                _normalise(into, bias, teacher_bounded)
            if view is not None:
                into *= (view >= 0)[:, None]
            if index:
                target += into
        _product(student[part], student_prototypes.T, logits).mul_(student_scale)
        dots = _dots(logits, target)
        total, lse = _exponentiate(logits, student_bounded)
        terms[part] = lse * count[part] - dots
        if not (need_student or need_prototypes):
            continue
        # To the logits, but for the weight.
        gradient = logits.mul_((count[part] * lift / total)[:, None]).sub_(target, alpha=lift)
        if need_prototypes:
            weighted = (student[part] * row_weight[part, None]).to(student.dtype)
            _add_product(to_prototypes, gradient.T.to(student.dtype), weighted)
        if need_student:
            to_student[part] = _product(gradient.to(student.dtype), student_prototypes)
    loss = (terms * row_weight).sum() * factor
    factor = factor * student_scale / lift
    if need_student:
        to_student *= (row_weight * factor)[:, None]
    return loss, to_student, to_prototypes.mul_(factor)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Returns a matrix product summed and returned in float32, or float64 for float64 operands."""
    if left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left, right, out=out)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds a matrix product to `total`, for float32 operands without another matrix of its size."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right)


def _dots(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns the inner product of each pair of rows, in parts, since PyTorch forms their elementwise product."""
    size = max(left.shape[1] // 16, 1)
    parts = zip(left.split(size, 1), right.split(size, 1), strict=True)
    return torch.stack([torch.linalg.vecdot(a, b) for a, b in parts]).sum(0)


def _normalise(logits: torch.Tensor, bias: torch.Tensor | None, bounded: bool) -> None:
    """Replaces the logits of a teacher, but for the bias, by its probabilities."""
    if bias is not None:
        logits += bias
    total, _ = _exponentiate(logits, bounded)
    logits /= total[:, None]


def _exponentiate(logits: torch.Tensor, bounded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces logits by their exponentials up to a factor for each row; returns their sums and the log-sum-exps."""
    if bounded:
        total = logits.exp_().sum(1)
        return total, total.log()
    peak = logits.amax(1)
    total = logits.sub_(peak[:, None]).exp_().sum(1)
    return total, total.log() + peak
