"""Cross-entropy against a linear teacher: the op, the choice of its implementation, and the public function."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import checks
from ..features import check_temperature, product_dtype
from ..library import define
from ..passes import MAX_BOUNDED_LOGIT, as_scale, compute_dtype
from ..registry import Implementation, Op, check_impl, register
from ..softmax_row_pass.op import DTYPES, MAX_WIDTH
from .chunked import teacher_fits
from .weight import prototype_weight

Prototypes = torch.Tensor | torch.nn.Module

# Of one H100-class GPU, to compare two ways and for nothing else: what the matrix products of each reach, operations
# per second by the kind of operands, and what memory copies. From published figures; none of it measured here.
KERNEL_RATE = {"half": 490e12, "tf32": 240e12, "float32": 25e12}
LIBRARY_RATE = {"half": 630e12, "tf32": 320e12, "float32": 50e12}
COPY_RATE = 3.3e12
STUDENT_BYTES, TEACHER_BYTES = 44, 36  # that the chunked way moves for each logit of a student and of a teacher row
GATHER_BYTES = 24  # and for each probability of a pair, where the teacher's are kept


def _check(
    student: torch.Tensor,
    student_prototypes: Prototypes,
    teacher: torch.Tensor,
    teacher_prototypes: Prototypes,
    *,
    student_temp: float | torch.Tensor,
    teacher_temp: float | torch.Tensor,
    center: torch.Tensor | None = None,
    match: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    normalized: bool = False,
) -> tuple[Any, ...]:
    """Checks the public arguments and returns those of the op, matrices in their own dtypes, all gradients wanted."""
    student_matrix = prototype_weight("student_prototypes", student_prototypes)
    teacher_matrix = prototype_weight("teacher_prototypes", teacher_prototypes).detach()
    tensors = {
        "student": student,
        "student_prototypes": student_matrix,
        "teacher": teacher,
        "teacher_prototypes": teacher_matrix,
    }
    for name in ("student", "teacher"):
        checks.check_floating(name, tensors[name])
        checks.check_shape(
            name, tensors[name], ("R" if name == "student" else "Q", tensors[f"{name}_prototypes"].shape[1])
        )
        if tensors[name].shape[0] == 0:
            raise ValueError(f"{name} has no row: a mean over no row is undefined; skip the empty batch")
    count = student_matrix.shape[0]
    if teacher_matrix.shape[0] != count:
        raise ValueError(
            f"teacher_prototypes are {teacher_matrix.shape[0]} and student_prototypes {count}; "
            "both softmaxes must be over the same prototypes"
        )
    rows = student.shape[0]
    if match is None:
        if teacher.shape[0] != rows:
            raise ValueError(
                f"teacher has {teacher.shape[0]} rows and student {rows}; "
                "pass match, which says what each row is held to"
            )
    else:
        if match.ndim == 1:
            match = match[None]
        checks.check_indices("match", match)
        checks.check_shape("match", match, ("U", rows))
    for name, vector, size in (("center", center, count), ("weight", weight, rows)):
        if vector is not None:
            checks.check_floating(name, vector)
            checks.check_shape(name, vector, (size,))
            if vector.requires_grad:
                raise ValueError(f"{name} requires a gradient, but the loss has none to it; pass {name}.detach()")
    checks.check_same_device(**tensors, center=center, match=match, weight=weight)
    if not torch.is_autocast_enabled(student.device.type):
        for name, tensor in tensors.items():
            if tensor.dtype != student.dtype:
                raise TypeError(f"{name} is {tensor.dtype} and student {student.dtype}; convert one, or use autocast")
    student_scale, student_bounded = _scale("student_temp", student_temp, student, normalized, 1)
    # Centre entries are means of logits, and so as large as these at most.
    teacher_scale, teacher_bounded = _scale(
        "teacher_temp", teacher_temp, student, normalized, 1 if center is None else 2
    )
    bias = None if center is None else -center.detach().to(teacher_scale.dtype) * teacher_scale
    return (
        *(student, student_matrix, teacher.detach(), teacher_matrix, bias, match, weight),
        *(student_scale, teacher_scale, student_bounded, teacher_bounded, True, True),
    )


def _bind(student: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Checks the public arguments and returns those of the op."""
    arguments = _check(student, *args, **kwargs)
    return *(matrix.to(product_dtype(student)) for matrix in arguments[:4]), *arguments[4:]


def _scale(
    name: str, temperature: float | torch.Tensor, like: torch.Tensor, normalized: bool, largest: int
) -> tuple[torch.Tensor, bool]:
    """Returns 1 / temperature, and whether logits that are `largest` before it can go without a maximum."""
    if isinstance(temperature, torch.Tensor):
        checks.check_shape(name, temperature, ())
        if temperature.requires_grad:
            raise ValueError(f"{name} requires a gradient, but the loss has none to it; pass {name}.detach()")
        checks.check_same_device(student=like, **{name: temperature})
        return as_scale(1 / temperature.to(compute_dtype(like)), like), False
    scale = 1 / check_temperature(name, temperature)
    return as_scale(scale, like), normalized and 1.01 * largest * scale <= MAX_BOUNDED_LOGIT


def _triton_reasons(
    student: torch.Tensor,
    student_prototypes: torch.Tensor,
    teacher: torch.Tensor,
    teacher_prototypes: torch.Tensor,
    bias: torch.Tensor | None,
    match: torch.Tensor | None,
    weight: torch.Tensor | None,
    *_: Any,
) -> list[str]:
    matrices = {
        "student": student,
        "student_prototypes": student_prototypes,
        "teacher": teacher,
        "teacher_prototypes": teacher_prototypes,
    }
    wide = {name: rows.shape[1] for name, rows in matrices.items() if rows.shape[1] > MAX_WIDTH}
    return (
        checks.triton_reasons(student.device)
        + [f"{name} is {width} wide; the passes take {MAX_WIDTH} at most" for name, width in wide.items()]
        + checks.dtype_reasons(DTYPES, student=student.dtype)
        + checks.last_dim_reasons(**matrices, bias=bias)
    )


def _slower_than_chunks(
    student: torch.Tensor,
    student_prototypes: torch.Tensor,
    teacher: torch.Tensor,
    teacher_prototypes: torch.Tensor,
    bias: torch.Tensor | None,
    match: torch.Tensor | None,
    weight: torch.Tensor | None,
    *flags: Any,
) -> list[str]:
    """Returns why parts of the logits in memory are expected to be faster than the two passes, if they are.

    An estimate from sizes alone. The passes multiply each row with the prototypes twice for the loss and, where these
    get a gradient, twice again. Chunks multiply once for the logits of each row and pair, and once for each gradient,
    but move every logit through memory; and unless the teacher's probabilities are few enough to be kept, they compute
    a teacher row again for each student row that is held to it.
    """
    *_, need_student, need_prototypes = flags
    rows, views = student.shape[0], 1 if match is None else match.shape[0]
    kind = _kind(student.dtype)
    unit = 2.0 * student_prototypes.shape[0] * student.shape[1]  # of one row with all prototypes
    passes = (teacher.shape[0] + rows) * (4 if need_prototypes else 2) * unit / KERNEL_RATE[kind]
    kept = match is not None and teacher_fits(teacher.shape[0], student_prototypes.shape[0], student.device)
    teachers = teacher.shape[0] if kept else rows * views
    products = (rows * (1 + need_student + need_prototypes) + teachers) * unit / LIBRARY_RATE[kind]
    numbers = rows * STUDENT_BYTES + teachers * TEACHER_BYTES + (rows * views * GATHER_BYTES if kept else 0)
    moved = numbers * student_prototypes.shape[0] / COPY_RATE
    if passes <= products + moved:
        return []
    return [
        f"its matrix products should take {passes * 1e3:.2g} ms in {kind}, the chunked ones {products * 1e3:.2g} ms "
        f"and {moved * 1e3:.2g} ms of memory traffic (an estimate from sizes)"
    ]


def _kind(dtype: torch.dtype) -> str:
    """Returns how matrix products of this dtype run."""
    if dtype.itemsize == 2:
        return "half"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


MODULE = "vitrail.kernels.prototype_cross_entropy"
OP = register(
    Op(
        name="prototype_cross_entropy",
        bind=_bind,
        implementations=(
            Implementation(
                name="triton",
                module=f"{MODULE}.triton_passes",
                reasons={"forward": _triton_reasons},
                supports=f"fp16, bf16, fp32 up to {MAX_WIDTH} wide; no logit in memory",
                reservations={"forward": _slower_than_chunks},
            ),
            Implementation(
                name="chunked",
                module=f"{MODULE}.chunked",
                reasons={"forward": lambda *_: []},
                supports="also fp64, any width and any stride; the logits of some rows at a time",
            ),
            Implementation(
                name="reference",
                module=f"{MODULE}.reference",
                reasons={"forward": lambda *_: []},
                supports="the same, by the two passes in plain PyTorch",
            ),
        ),
    )
)


def _fake(
    student: torch.Tensor, student_prototypes: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, need_student, need_prototypes = rest
    dtype, (rows, width) = compute_dtype(student), student.shape
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty((rows if need_student else 0, width), dtype=dtype),
        student.new_empty((student_prototypes.shape[0] if need_prototypes else 0, width), dtype=dtype),
    )


_forward = define(
    OP,
    "forward",
    "Tensor student, Tensor student_prototypes, Tensor teacher, Tensor teacher_prototypes, Tensor? bias, "
    "Tensor? match, Tensor? weight, Tensor student_scale, Tensor teacher_scale, bool student_bounded, "
    "bool teacher_bounded, bool need_student, bool need_prototypes",
    "(Tensor, Tensor, Tensor)",
    _fake,
)


class _CrossEntropy(torch.autograd.Function):
    """The loss with its gradients to the student's features and prototypes."""

    @staticmethod
    def forward(
        ctx: Any, impl: str, dtype: torch.dtype, student: torch.Tensor, prototypes: torch.Tensor, *rest: Any
    ) -> Any:
        """Computes the loss and, as the logits come by, its gradients; keeps these."""
        teacher, teacher_prototypes, *others, _, _ = rest
        operands = (matrix.to(dtype) for matrix in (student, prototypes, teacher, teacher_prototypes))
        needed = ctx.needs_input_grad[2:4]
        loss, *gradients = _forward(*operands, *others, *needed, impl)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = student.dtype, prototypes.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradients, times the upstream one."""
        results = (
            (gradient * grad).to(dtype) if needed else None
            for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[2:4], strict=True)
        )
        return None, None, *results, *(None,) * 11


def prototype_cross_entropy(
    student: torch.Tensor,
    student_prototypes: Prototypes,
    teacher: torch.Tensor,
    teacher_prototypes: Prototypes,
    *,
    student_temp: float | torch.Tensor,
    teacher_temp: float | torch.Tensor,
    center: torch.Tensor | None = None,
    match: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    normalized: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross-entropy between a student's and a teacher's softmax over prototypes: the loss of DINO, EsViT, iBOT, SwAV.

    Logits are inner products with prototypes, the last linear layer of the head, which must have no bias. The loss of
    a pair of rows is `-sum_k p_k log softmax(student_logits / student_temp)_k` with the teacher's
    `p = softmax((teacher_logits - center) / teacher_temp)` (Caron et al. 2021, arXiv 2104.14294, section 3.1). As the
    teacher's layer is linear too, `[rows, K]` never need be in memory (see the README). No gradient to the teacher.

    Args:
        student: [R, d] features that enter the student's last layer, normalised by the caller if the head does so.
        student_prototypes: [K, d], or the linear layer itself; weight normalisation is the caller's, or the layer's.
        teacher: [Q, d'] features that enter the teacher's last layer.
        teacher_prototypes: [K, d'], or the linear layer itself.
        student_temp: Divisor of the student's logits: a number, or a 0-d tensor.
        teacher_temp: Divisor of the teacher's logits less the centre: a number, or a 0-d tensor.
        center: [K] what is subtracted from the teacher's logits: the moving mean of `update_center_`, or the result of
            `sinkhorn_center`, which makes the targets those of Sinkhorn-Knopp.
        match: [R] or [U, R] int64: for each student row the teacher row, or U teacher rows, that it is held to; -1 for
            none. None matches row to row. The values are not checked on a GPU, which would cost a wait.
        weight: [R] factor of each student row's loss. Given, the result is the weighted *sum*: put the divisor of
            your mean into it. None takes the mean over all pairs.
        normalized: Promises rows of unit length on both sides and in both sets of prototypes, and a centre within
            [-1, 1]. Then no maximum is searched for in the softmaxes, where the temperatures allow.
        impl: `auto`, `triton` (the two passes), `chunked` (the logits of some rows at a time, PyTorch's matrix
            products) or `reference`. `auto` takes what sizes let expect to be faster; `explain` says why.

    Returns:
        A scalar, float32, or float64 for float64 features: the mean over all pairs, or the weighted sum. Under
        autocast the products take its dtype; sums, exponentials and results do not.

    Raises:
        TypeError: A dtype does not fit, or prototypes are neither a matrix nor a layer.
        ValueError: A shape, device or temperature does not fit, there is no row, prototypes have a bias, or the centre,
            a temperature or the weight requires a gradient.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _check(
        *(student, student_prototypes, teacher, teacher_prototypes),
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        center=center,
        match=match,
        weight=weight,
        normalized=normalized,
    )
    result: torch.Tensor = _CrossEntropy.apply(impl, product_dtype(student), *arguments)
    return result
