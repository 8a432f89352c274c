"""How Triton kernels are launched: device guard, 64-bit addressing, and a recorder for ahead-of-time compilation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .checks import capability

INT32_BYTES = 2**31 - 1

Passes = Mapping[str, tuple[Any, ...]]  # the arguments of each pass of an op, by the pass's name


@dataclass(frozen=True)
class Launch:
    """A kernel launch as it would happen.

    Attributes:
        kernel: The `triton.jit` function.
        grid: Number of programs along each axis.
        args: Positional arguments: tensors and numbers.
        options: Constexpr arguments and compiler options such as `num_warps`.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


DEFAULT_CAPABILITY = 90

_recorded: list[Launch] | None = None
_target = DEFAULT_CAPABILITY


@contextmanager
def record_launches(capability: int = DEFAULT_CAPABILITY) -> Iterator[list[Launch]]:
    """Collects launches in place of making them, so that a launcher can be asked on meta tensors what it would run.

    Args:
        capability: Compute capability (90 is 9.0) that launches on meta tensors are meant for.
    """
    global _recorded, _target
    previous = _recorded, _target
    _recorded, _target = [], capability
    try:
        yield _recorded
    finally:
        _recorded, _target = previous


def capability_of(device: torch.device) -> int:
    """Returns the compute capability of a device as a number (90 is 9.0); of no GPU, that of the recording, or 90."""
    if device.type != "cuda":
        return _target
    major, minor = capability(device)
    return 10 * major + minor


def launches_of(module: ModuleType, passes: Passes, capability: int = DEFAULT_CAPABILITY) -> list[Launch]:
    """Returns the launches that a kernel module's launchers would make for these arguments, meta tensors or real."""
    with record_launches(capability) as recorded:
        for which, args in passes.items():
            getattr(module, which)(*args)
    return recorded


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches `kernel` on the current stream of the device of its first argument, a tensor.

    A grid without programs launches nothing: CUDA would call that an error.
    """
    if 0 in grid:
        return
    # Said here, since the default is about to change between Triton versions: multiply-add may be fused.
    options["enable_fp_fusion"] = True
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
        return
    device: torch.device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def needs_int64(*tensors: torch.Tensor | None) -> bool:
    """Whether the farthest element of any tensor lies beyond what 32-bit byte offsets reach.

    Kernels compute offsets in int32 unless this holds, since 64-bit address arithmetic costs registers.
    """
    return any(_span(tensor) > INT32_BYTES for tensor in tensors if tensor is not None)


def _span(tensor: torch.Tensor) -> int:
    """Returns the number of bytes between the first and the end of the last element of `tensor`."""
    if tensor.numel() == 0:
        return 0
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size()
