"""Buffers with canaries around them, for kernels that must neither read nor write outside their tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from ladder import Function, Problem, kernel_device, record_ops
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.kernels.registry import ops

GUARD = 256  # elements on either side, a multiple of 16 bytes in every dtype


class GuardedBuffer:
    """A tensor inside a larger allocation whose margins are filled with canaries.

    A canary that a kernel reads shows in its results: NaN, or an integer that no index is. A canary that a kernel
    overwrites shows in `intact`.
    """

    def __init__(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        empty = any(length == 0 for length in size)
        span = 0 if empty else 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        self.whole = torch.empty(span + 2 * GUARD, dtype=dtype, device=device).fill_(self.poison(dtype))
        self.tensor = self.whole.as_strided(size, stride, GUARD)
        self.margins = (self.whole[:GUARD], self.whole[GUARD + span :])
        self.expected = [margin.view(torch.uint8).clone() for margin in self.margins]

    @staticmethod
    def poison(dtype: torch.dtype) -> float | int:
        """Returns NaN, or a large integer."""
        return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 3

    def intact(self) -> bool:
        """Whether the margins are as they were, bit for bit."""
        pairs = zip(self.margins, self.expected, strict=True)
        return all(torch.equal(margin.view(torch.uint8), expected) for margin, expected in pairs)


def guarded_copy(tensor: torch.Tensor) -> GuardedBuffer:
    """Returns a guarded buffer with the values and the strides of `tensor`."""
    buffer = GuardedBuffer(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    buffer.tensor.copy_(tensor)
    return buffer


class GuardedAllocations(TorchDispatchMode):
    """Puts canaries around everything that is allocated without being filled, and poisons it."""

    ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[GuardedBuffer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in self.ALLOCATIONS:
            return result
        self.buffers.append(GuardedBuffer(result.shape, result.stride(), result.dtype, result.device))
        return self.buffers[-1].tensor


def check_guarded(function: Function, problem: Problem, impl: str = "triton") -> None:
    """Runs every pass of a call on guarded buffers.

    The canaries must survive, and the outputs must equal, bit for bit, those computed on ordinary buffers: then no
    canary was read either, and every element was written.
    """
    known = {op.name: op for op in ops()}
    problem = problem.to(_floating_dtype(problem), kernel_device())
    for overload, (*args, chosen) in record_ops(lambda **inputs: function(**inputs, impl=impl), problem):
        assert chosen == impl
        name = overload.overloadpacket.__name__
        which = "backward" if name.endswith("_backward") else "forward"
        launcher = known[name.removesuffix("_backward")].implementation(impl).function(which)
        expected = _flat(launcher(*args))

        inputs = [guarded_copy(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        with GuardedAllocations() as allocations:
            got = _flat(launcher(*(arg.tensor if isinstance(arg, GuardedBuffer) else arg for arg in inputs)))
        buffers = [*allocations.buffers, *(arg for arg in inputs if isinstance(arg, GuardedBuffer))]
        assert allocations.buffers
        assert all(buffer.intact() for buffer in buffers), f"{name} wrote outside a buffer"
        for index, (have, want) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(have, want), f"{name}: output {index} depends on memory outside the buffers"


def _floating_dtype(problem: Problem) -> torch.dtype:
    dtypes = [v.dtype for v in problem.inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return dtypes[0] if dtypes else torch.float32


def _flat(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
