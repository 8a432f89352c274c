"""Euclidean norms of lists of tensors: the op, its registration and the public function."""

from typing import Any, NamedTuple

import torch

from .. import multi_tensor
from ..library import define
from ..multi_tensor import Tensors
from ..registry import Implementation, Op, check_impl, register


class Norms(NamedTuple):
    """Norms of a list of T tensors, float32 on their device."""

    total: torch.Tensor
    """[]: the norm of all elements together."""
    norms: torch.Tensor
    """[T]: the norm of each tensor."""
    found_inf: torch.Tensor
    """[]: 1 if the total is not finite, else 0; what optimisers call `found_inf`."""


def _bind(tensors: Tensors) -> tuple[Any, ...]:
    """Checks the public arguments."""
    return (list(tensors),)


def _fake(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first = tensors[0]
    return (
        first.new_empty((), dtype=torch.float32),
        first.new_empty(len(tensors), dtype=torch.float32),
        first.new_empty((), dtype=torch.float32),
    )


OP = register(
    Op(
        name="multi_tensor_norm",
        bind=_bind,
        implementations=(
            multi_tensor.implementation(
                "multi_tensor_norm",
                "vitrail.kernels.multi_tensor_norm.extension",
                "float32 and bfloat16 tensors without gaps, in any mixture",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.multi_tensor_norm.reference",
                reasons={"forward": lambda *_: []},
                supports="any floating dtypes and strides",
            ),
        ),
    )
)
_forward = define(OP, "forward", "Tensor[] tensors", "(Tensor, Tensor, Tensor)", _fake, opaque=False)


@torch.no_grad()
def multi_tensor_norm(tensors: Tensors, *, impl: str = "auto") -> Norms:
    """Computes the Euclidean norm of every tensor and of all together, without waiting for the device.

    Sums depend on the sizes alone: not on launches, threads or alignment. Squares are added in float32 within 16,384
    elements and in float64 beyond, so that a value above 1.8e19 counts as not finite.

    Args:
        tensors: T floating tensors, gradients for example; float32 and bfloat16 may be mixed. Not differentiable.
        impl: `auto`, `cuda` (the compiled extension, on CPU tensors its C++ twin) or `reference`.

    Returns:
        total [], norms [T] and found_inf [], float32 on the tensors' device; on the CPU for an empty list.

    Raises:
        ValueError: The tensors are on several devices.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    if len(tensors) == 0:
        return Norms(torch.zeros(()), torch.zeros(0), torch.zeros(()))
    return Norms(*_forward(*_bind(tensors), impl))
