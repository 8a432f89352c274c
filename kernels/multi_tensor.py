"""What the ops over lists of tensors share: their scalars, their checks, and the way into the compiled extension."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import extension
from .registry import Implementation, UnsupportedError

Scalar = float | torch.Tensor
Tensors = Sequence[torch.Tensor]

SUPPORTS = "float32 and bfloat16 in any mixture, corresponding tensors laid out alike; CUDA, and CPU in C++"
CHECK = "vitrail_C: "  # how the extension begins what its checks say


def as_scalar(name: str, value: Scalar) -> torch.Tensor:
    """Returns a scalar as a 0-d float64 tensor: a number on the CPU, a tensor where it is.

    float64, since 1 - 0.9999 of float32 is wrong by 6e-4 of itself.

    Raises:
        ValueError: A tensor of more than one element.
    """
    if not isinstance(value, torch.Tensor):
        return torch.tensor(float(value), dtype=torch.float64)
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element, got shape {list(value.shape)}")
    return value.detach().to(torch.float64)


def check_lists(**lists: Tensors) -> None:
    """Checks lists whose tensors correspond one to one.

    Raises:
        ValueError: Lengths, shapes or devices differ.
    """
    (first_name, first), *rest = lists.items()
    for name, tensors in rest:
        if len(tensors) != len(first):
            raise ValueError(f"{name} holds {len(tensors)} tensors, {first_name} holds {len(first)}; pair them up")
        for index, (tensor, other) in enumerate(zip(tensors, first, strict=True)):
            if tensor.shape != other.shape:
                raise ValueError(
                    f"{name}[{index}] has shape {list(tensor.shape)}, {first_name}[{index}] has {list(other.shape)}; "
                    "they must be equal"
                )
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            if tensor.device != first[0].device:
                raise ValueError(
                    f"{name}[{index}] is on {tensor.device}, {first_name}[0] on {first[0].device}; move it with .to()"
                )


def skipped(found_inf: torch.Tensor | None) -> bool:
    """Whether a flag says that nothing may change. Waits for the device: for references only."""
    return found_inf is not None and bool(found_inf)


def widened(tensors: Tensors, *, like: Tensors | None = None, scales: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Returns tensors in the dtype that references compute in: float32, or float64 where they have it.

    Args:
        tensors: T floating tensors. Those that have the dtype already are returned themselves.
        like: T tensors whose dtypes decide instead of their own.
        scales: Multiplied onto copies of the tensors, one element or T; read on the host.
    """
    wanted = [torch.float64 if t.dtype == torch.float64 else torch.float32 for t in (tensors if like is None else like)]
    values = [tensor.to(dtype) for tensor, dtype in zip(tensors, wanted, strict=True)]
    if scales is None:
        return values
    return list(torch._foreach_mul(values, scales.expand(len(tensors)).tolist()))


def implementation(op: str, module: str, supports: str = SUPPORTS) -> Implementation:
    """Returns the registry entry of an op's implementation in the extension.

    The extension checks the lists itself, before it changes anything; asking it beforehand, as `explain` does, costs
    as much as a small call.

    Args:
        op: Name of the op in `vitrail_C`; its schema ends with `bool dry`, and its first argument is a list.
        module: Where its `forward` is.
        supports: For the support matrix.
    """

    def quick(first: Tensors, *_: Any) -> list[str]:
        wrapped: bool = is_traceable_wrapper_subclass(first[0])  # a list is of one class
        if wrapped:
            kind = type(first[0]).__name__
            return [
                f"the tensors are of class {kind}, whose memory is not theirs; pass what they hold, e.g. .to_local()"
            ]
        return extension.reasons(first[0].device)

    def reasons(first: Tensors, *rest: Any) -> list[str]:
        found = quick(first)
        if not found:
            try:
                call(op, first, *rest, dry=True)
            except UnsupportedError as error:
                found = error.reasons
        return found

    return Implementation(
        name="cuda", module=module, reasons={"forward": reasons}, supports=supports, quick={"forward": quick}
    )


def call(op: str, *args: Any, changes: Iterable[Tensors] = (), dry: bool = False) -> Any:
    """Runs an op of the extension.

    Args:
        op: Its name in `vitrail_C`.
        *args: Its arguments, without `dry`.
        changes: The lists that it writes: autograd must learn that their tensors changed.
        dry: Only check.

    Raises:
        UnsupportedError: What the extension's checks say.
    """
    function: Callable[..., Any] = getattr(extension.ops(), op).default
    try:
        result = function(*args, dry)
    except RuntimeError as error:
        text = str(error)
        if not text.startswith(CHECK):
            raise
        raise UnsupportedError(op, "cuda", [text.removeprefix(CHECK)]) from None
    for tensors in changes:
        torch.autograd.graph.increment_version(tensors)
    return result
