"""Exponential moving average of lists of tensors: the op, its registration and the public function."""

from typing import Any

import torch

from .. import multi_tensor
from ..library import define
from ..multi_tensor import Scalar, Tensors, as_scalar
from ..registry import Implementation, Op, check_impl, register


def _bind(
    teacher: Tensors,
    student: Tensors,
    momentum: Scalar,
    *,
    shadow: Tensors | None = None,
    found_inf: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    if len(teacher) == 0 and len(student) > 0:
        raise ValueError(f"teacher is empty, student holds {len(student)} tensors; pair them up")
    return list(teacher), list(student), list(shadow or ()), as_scalar("momentum", momentum), found_inf


OP = register(
    Op(
        name="multi_tensor_ema_",
        bind=_bind,
        implementations=(
            multi_tensor.implementation(
                "multi_tensor_ema_",
                "vitrail.kernels.multi_tensor_ema.extension",
                "float32 teachers, float32 or bfloat16 students, bfloat16 shadows; pairs laid out alike",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.multi_tensor_ema.reference",
                reasons={"forward": lambda *_: []},
                supports="any floating dtypes and strides",
            ),
        ),
    )
)
_forward = define(
    OP,
    "forward",
    "Tensor(a!)[] teacher, Tensor[] student, Tensor(b!)[] shadow, Tensor momentum, Tensor? found_inf",
    "()",
    lambda *_: None,
    opaque=False,
)


@torch.no_grad()
def multi_tensor_ema_(
    teacher: Tensors,
    student: Tensors,
    momentum: Scalar,
    *,
    shadow: Tensors | None = None,
    found_inf: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Moves every teacher tensor towards its student: t <- m t + (1 - m) s, all in one launch, in place.

    The mean teacher of BYOL, MoCo, DINO and their kin (Tarvainen & Valpola 2017, arXiv 1703.01780). The arithmetic is
    that of `torch.lerp` in float32: exact where m is 0 or 1.

    Args:
        teacher: Tensors to update, float32: with m = 0.9999 a bfloat16 teacher would never move.
        student: As many tensors of the same shapes, float32 or bfloat16 each.
        momentum: m in [0, 1]. A number, or a tensor of one element: on the GPU it is read there, so that a CUDA graph
            may be replayed with other values. Make it float64; float32 puts an error of 6e-4 into 1 - 0.9999.
        shadow: As many bfloat16 tensors that receive the new teacher, rounded to nearest; None for none.
        found_inf: One float32 number on the tensors' device; unless it is 0, nothing changes.
        impl: `auto`, `cuda` (the compiled extension, on CPU tensors its C++ twin) or `reference`.

    Raises:
        ValueError: Lists, shapes or devices do not correspond.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(teacher, student, momentum, shadow=shadow, found_inf=found_inf)
    if arguments[0]:
        _forward(*arguments, impl)
