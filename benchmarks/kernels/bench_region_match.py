"""EsViT's region matching of all pairs of crops and views, against the loop over the pairs."""

from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures

from vitrail.kernels.region_match import region_match_crops

Tensor = torch.Tensor
STUDENT, TEACHER, WIDTH = (49,) * 2 + (9,) * 8, (49,) * 2, 768


def inputs(batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Every student token is a teacher token of each view of its image, with noise: no near ties in any dtype."""
    one = torch.randn(batch, TEACHER[0], WIDTH, device=device)
    order = torch.rand(batch, TEACHER[0], device=device).argsort(1)
    views = (one, one.take_along_dim(order[..., None], 1))
    crops = []
    for tokens in STUDENT:
        chosen = torch.rand(batch, TEACHER[0], device=device).argsort(1)[:, :tokens]
        crops.append(one.take_along_dim(chosen[..., None], 1) + 0.5 * torch.randn(batch, tokens, WIDTH, device=device))
    student, teacher = (torch.cat([part.flatten(0, 1) for part in parts]).to(dtype) for parts in (crops, views))
    return {"student": student, "teacher": teacher}


def eager(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    batch = len(teacher) // sum(TEACHER)
    crops = student.split([batch * tokens for tokens in STUDENT])
    indices, similarities, first = [], [], 0
    for view, theirs in enumerate(TEACHER):
        others = teacher[first : first + batch * theirs].view(batch, theirs, -1)
        start = first + torch.arange(batch, device=teacher.device)[:, None] * theirs
        for crop, ours in enumerate(STUDENT):
            if crop == view:
                indices.append(torch.full((batch * ours,), -1, device=student.device))
                similarities.append(student.new_zeros(batch * ours))
                continue
            rows = F.normalize(crops[crop].view(batch, ours, -1), dim=-1)
            product = torch.matmul(rows, F.normalize(others, dim=-1).transpose(1, 2))
            best, index = product.max(2)
            indices.append((index + start).flatten())
            similarities.append(best.flatten())
        first += batch * theirs
    return torch.cat(indices).view(len(TEACHER), -1), torch.cat(similarities).view(len(TEACHER), -1)


def case(batch: int, dtype: torch.dtype) -> Case:
    rows, others = batch * sum(STUDENT), batch * sum(TEACHER)
    pairs = sum(ours * theirs for v, ours in enumerate(STUDENT) for u, theirs in enumerate(TEACHER) if u != v)
    ours = partial(region_match_crops, student_tokens=STUDENT, teacher_tokens=TEACHER)
    return Case(
        op="region_match",
        name="EsViT 2x49+8x9",
        shape={"batch": batch, "student rows": rows, "teacher rows": others, "width": WIDTH},
        dtype=dtype,
        inputs=partial(inputs, batch, dtype),
        truth=eager,
        implementations={"vitrail": lambda: ours, "eager": lambda: eager, "compiled": compiled(eager)},
        bytes={"forward": (rows + others) * WIDTH * dtype.itemsize + len(TEACHER) * rows * (8 + 4)},
        flops={"forward": 2.0 * batch * pairs * WIDTH},
    )


def cases(sizes: Sizes) -> list[Case]:
    return [case(sizes.batch, torch.bfloat16), case(sizes.batch, torch.float32)]


test_region_match = measures(cases)
