"""Scaling of lists of tensors: the op, its registration and the public function."""

from typing import Any

import torch

from .. import multi_tensor
from ..library import define
from ..multi_tensor import Tensors
from ..registry import Implementation, Op, check_impl, register


def _bind(tensors: Tensors, scales: torch.Tensor) -> tuple[Any, ...]:
    """Checks the public arguments."""
    if scales.numel() != 1 and list(scales.shape) != [len(tensors)]:
        raise ValueError(
            f"scales must have shape [] or [{len(tensors)}], one for each tensor, got {list(scales.shape)}"
        )
    return list(tensors), scales.detach().to(torch.float32)


OP = register(
    Op(
        name="multi_tensor_scale_",
        bind=_bind,
        implementations=(
            multi_tensor.implementation(
                "multi_tensor_scale_",
                "vitrail.kernels.multi_tensor_scale.extension",
                "float32 and bfloat16 tensors without gaps, in any mixture",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.multi_tensor_scale.reference",
                reasons={"forward": lambda *_: []},
                supports="any floating dtypes and strides",
            ),
        ),
    )
)
_forward = define(OP, "forward", "Tensor(a!)[] tensors, Tensor scales", "()", lambda *_: None, opaque=False)


@torch.no_grad()
def multi_tensor_scale_(tensors: Tensors, scales: torch.Tensor, *, impl: str = "auto") -> None:
    """Multiplies each tensor by its own number, or all by one, in place and in one launch.

    The numbers stay on the device: this is the second half of clipping without a wait. A tensor whose number is 1 is
    neither read nor written.

    Args:
        tensors: T floating tensors; float32 and bfloat16 may be mixed.
        scales: float32 [T] or [] on the same device.
        impl: `auto`, `cuda` (the compiled extension, on CPU tensors its C++ twin) or `reference`.

    Raises:
        ValueError: `scales` has another shape, or a tensor is on another device.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(tensors, scales)
    if arguments[0]:
        _forward(*arguments, impl)
