"""The loss over prototypes, forward and backward, against every logit in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from bench import Case, Sizes, compiled, measures
from bench.case import Factory
from torch.utils.checkpoint import checkpoint

from vitrail.kernels import cross_view_match, prototype_cross_entropy

Tensor = torch.Tensor
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
TRUTH_ROWS = 64  # of which the truth holds the logits in float64 at a time


@dataclass(frozen=True)
class Problem:
    """Rows and prototypes of one loss, one teacher row for each student row or DINO's pairs of `views`."""

    name: str
    rows: int
    prototypes: int
    width: int
    dtype: torch.dtype
    views: int = 0

    @property
    def teachers(self) -> int:
        return self.rows * 2 // self.views if self.views else self.rows

    @property
    def shape(self) -> dict[str, int | float | str]:
        sizes = {"rows": self.rows, "teacher_rows": self.teachers, "prototypes": self.prototypes, "width": self.width}
        return sizes | {"views": self.views} if self.views else sizes


def inputs(problem: Problem, device: torch.device) -> dict[str, Tensor]:
    sizes = {
        "student": problem.rows,
        "student_prototypes": problem.prototypes,
        "teacher": problem.teachers,
        "teacher_prototypes": problem.prototypes,
    }
    made = {
        name: F.normalize(torch.randn(rows, problem.width, device=device), dim=1).to(problem.dtype)
        for name, rows in sizes.items()
    }
    return made | {"center": 0.02 * torch.randn(problem.prototypes, device=device)}


def logits(rows: Tensor, prototypes: Tensor) -> Tensor:
    """Logits in the dtype that softmaxes are formed in."""
    product = rows @ prototypes.T
    return product if product.dtype == torch.float64 else product.float()


def targets(teacher: Tensor, prototypes: Tensor, center: Tensor) -> Tensor:
    with torch.no_grad():
        return ((logits(teacher, prototypes) - center) / TEACHER_TEMP).softmax(1)


def log_softmax(student: Tensor, prototypes: Tensor) -> Tensor:
    return (logits(student, prototypes) / STUDENT_TEMP).log_softmax(1)


def eager(
    student: Tensor, student_prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor
) -> Tensor:
    target = targets(teacher, teacher_prototypes, center)
    return -(target * log_softmax(student, student_prototypes)).sum(1).mean()


def eager_multi_crop(
    student: Tensor, student_prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor, views: int
) -> Tensor:
    """DINO's two loops over the views; each student view's log-softmax is formed anew, as there."""
    target = targets(teacher, teacher_prototypes, center).chunk(2)
    crops = (logits(student, student_prototypes) / STUDENT_TEMP).chunk(views)
    terms = [
        -(probabilities * crop.log_softmax(1)).sum(1).mean()
        for index, probabilities in enumerate(target)
        for view, crop in enumerate(crops)
        if view != index
    ]
    return torch.stack(terms).mean()


def truth(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    match: Tensor,
) -> Tensor:
    """The sum over all pairs, some rows at a time, which are computed again for the gradient."""

    def part(rows: Tensor, prototypes: Tensor, held: Tensor) -> Tensor:
        chosen = sum(
            targets(teacher[view.clamp(min=0)], teacher_prototypes, center) * (view >= 0)[:, None] for view in held
        )
        return -(chosen * log_softmax(rows, prototypes)).sum()

    total = torch.zeros((), dtype=student.dtype, device=student.device)
    for rows, held in zip(student.split(TRUTH_ROWS), match.split(TRUTH_ROWS, 1), strict=True):
        total = total + checkpoint(part, rows, student_prototypes, held, use_reentrant=False)
    return total / (match >= 0).sum()


def linear_cross_entropy() -> Callable[..., Tensor]:
    """PyTorch's chunked loss, which takes the targets as a matrix in the dtype of the features."""
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(student, student_prototypes, teacher, teacher_prototypes, center):
        target = targets(teacher, teacher_prototypes, center).to(student.dtype)
        return F.linear_cross_entropy(student / STUDENT_TEMP, student_prototypes, target, options=options)

    return loss


def lightly(count: int, views: int) -> Callable[..., Tensor]:
    from lightly.loss import DINOLoss

    # The loss moves its centre too; with a momentum of 1 it stays what it is given.
    module = DINOLoss(count, teacher_temp=TEACHER_TEMP, student_temp=STUDENT_TEMP, center_momentum=1.0)

    def loss(student, student_prototypes, teacher, teacher_prototypes, center):
        module.center = center[None, None]
        with torch.no_grad():
            targets = logits(teacher, teacher_prototypes).chunk(2)
        return module(targets, logits(student, student_prototypes).chunk(views), TEACHER_TEMP)

    return loss


def ours(match: Tensor | None, impl: str, **arguments: Tensor) -> Tensor:
    if impl == "passes":
        impl = "triton" if arguments["student"].device.type == "cuda" else "reference"
    match = None if match is None else match.to(arguments["student"].device)
    temperatures = {"student_temp": STUDENT_TEMP, "teacher_temp": TEACHER_TEMP}
    return prototype_cross_entropy(**arguments, **temperatures, match=match, normalized=True, impl=impl)


def case(problem: Problem, *, large: bool) -> Case:
    """One problem; on a CPU a large one is left to our choice and to eager PyTorch, since each call takes seconds."""
    match, plain = None, eager
    pairs = torch.arange(problem.rows)[None]
    if problem.views:
        match = pairs = cross_view_match(problem.views, 2, problem.rows // problem.views)
        plain = partial(eager_multi_crop, views=problem.views)
    implementations: dict[str, Factory] = {"vitrail": lambda: partial(ours, match, "auto"), "eager": lambda: plain}
    if not large:
        implementations |= {
            "vitrail passes": lambda: partial(ours, match, "passes"),
            "vitrail chunked": lambda: partial(ours, match, "chunked"),
            "compiled": compiled(plain),
        }
        if problem.views:
            implementations["lightly"] = partial(lightly, problem.prototypes, problem.views)
        else:
            implementations["linear_cross_entropy"] = linear_cross_entropy
    half = problem.dtype.itemsize == 2
    read = (problem.rows + problem.teachers + 2 * problem.prototypes) * problem.width * problem.dtype.itemsize
    read += 4 * problem.prototypes
    product = 2.0 * problem.prototypes * problem.width
    return Case(
        op="prototype_cross_entropy",
        name=problem.name,
        shape=problem.shape,
        dtype=problem.dtype,
        inputs=partial(inputs, problem),
        truth=lambda **given: truth(**given, match=pairs.to(given["student"].device)),
        implementations=implementations,
        bytes={"forward+backward": read + (problem.rows + problem.prototypes) * problem.width * problem.dtype.itemsize},
        flops={"forward+backward": (3 * problem.rows + problem.teachers) * product},
        differentiable=("student", "student_prototypes"),
        # Logits that eager PyTorch rounds to half precision are divided by the temperature afterwards.
        tolerance=2**-6 if half else 1e-4,
    )


def cases(sizes: Sizes) -> list[Case]:
    """DINO's patches or class tokens one to one, multi-crop views, and sizes whose logits no longer fit well."""
    if sizes.dry:
        problems = [
            Problem("one to one", 40, 96, 32, torch.float32),
            Problem("10 views", 20, 96, 32, torch.float32, views=10),
            Problem("65,536 prototypes", 48, 160, 32, torch.float32),
        ]
    elif sizes.batch == 16:
        problems = [
            Problem("one to one", 512, 16_384, 256, torch.float32),
            Problem("10 views", 160, 16_384, 256, torch.float32, views=10),
            Problem("65,536 prototypes", 2_048, 65_536, 256, torch.float32),
        ]
    else:
        problems = [
            Problem("one to one", 6_272, 65_536, 256, torch.bfloat16),
            Problem("10 views", 1_280, 65_536, 256, torch.bfloat16, views=10),
            Problem("65,536 prototypes", 2_048, 65_536, 256, torch.float32),
        ]
    return [case(problem, large=sizes.batch == 16 and problem.rows > 1_000) for problem in problems]


test_prototype_cross_entropy = measures(cases)
