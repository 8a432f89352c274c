"""A case: what is computed, on what, by whom, and what it must cost at least."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

Inputs: TypeAlias = dict[str, Any]
Function: TypeAlias = Callable[..., Any]
Factory: TypeAlias = Callable[[], Function]
"""Builds an implementation: imports the peer, constructs its modules. Runs only where the peer is present."""

# Relative error, as the norm of the difference over the norm of the truth, that rounding to a dtype explains: its
# epsilon; and for float32 a few, since sums of thousands of terms are formed in it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Sizes:
    """How large a machine's cases are."""

    batch: int
    """256 images on a GPU, as in the published arithmetic; 16 on a CPU, whose ratios are all that counts."""
    dry: bool = False
    """Whether nothing is timed, so that what does not shrink with the batch may be cut down."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call to be measured. Everything here is data; nothing has run yet.

    Implementations take the inputs as keyword arguments and return a tensor or a tuple of tensors.
    """

    op: str
    """Name of the op; its rows go to `results/<machine>/<op>.json`."""
    name: str
    """Which sizes, in words: `ViT-H/14`."""
    shape: dict[str, int | float | str]
    """The sizes in numbers."""
    dtype: torch.dtype
    """Of the data that counts; decides the matrix rate of the roofline and the tolerance."""
    inputs: Callable[[torch.device], Inputs]
    """Makes fresh random inputs from the global generator."""
    truth: Function
    """An independent eager formula; run on the inputs in float64, it is what every implementation is held to."""
    implementations: Mapping[str, Factory]
    """By the name of the implementation, ours (`vitrail`) first. `peers.py` knows which names can run where."""
    bytes: Mapping[str, int]
    """Fewest bytes to read and write, by direction."""
    flops: Mapping[str, float]
    """Operations of the matrix products, by direction; 0 where there are none."""
    differentiable: tuple[str, ...] = ()
    """Inputs that get gradients in the direction `forward+backward`."""
    tolerance: float | None = None
    """Relative error allowed; None takes the dtype's."""
    compared: Callable[[Any], Any] = lambda result: result
    """What of a result is held to the truth; all of it by default."""

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions to measure: those whose bytes are given."""
        return tuple(self.bytes)

    @property
    def allowed(self) -> float:
        """Relative error allowed."""
        return TOLERANCE[self.dtype] if self.tolerance is None else self.tolerance


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def compiled(function: Function) -> Factory:
    """A factory of `torch.compile(function)`, compiled on first use for exactly the sizes it sees."""

    def factory() -> Function:
        # Every case is a new size of the same function; past its limit Dynamo would quietly run it eagerly.
        torch._dynamo.config.recompile_limit = 256
        return torch.compile(function, dynamic=False, fullgraph=True)

    return factory


def convert(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with floating tensors, also those in lists, in another dtype."""

    def one(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(one, value))
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in inputs.items()}


def clone(inputs: Inputs) -> Inputs:
    """The inputs with tensors, also those in lists, of their own."""

    def one(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(one, value))
        return value.clone() if isinstance(value, torch.Tensor) else value

    return {name: one(value) for name, value in inputs.items()}


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a result, or of inputs, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in tensors(part)]


def bind(case: Case, direction: str, function: Function, inputs: Inputs) -> Callable[[], Any]:
    """A call without arguments that runs one direction of a case.

    Returns:
        For `forward+backward`, a function that returns the outputs and the gradients of the differentiable inputs; for
        any other direction, one that returns the outputs, computed without a gradient.
    """
    if direction != "forward+backward":
        return partial(_forward, function, inputs)
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    given = {**inputs, **leaves}
    upstream: list[torch.Tensor] = []

    def both() -> Any:
        outputs = [output for output in tensors(function(**given)) if output.requires_grad]
        if not upstream:  # made once, as the gradients of a decoder or a loss would stand ready
            upstream.extend(_upstream(output) for output in outputs)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return [output.detach() for output in outputs], list(gradients)

    return both


def _forward(function: Function, inputs: Inputs) -> Any:
    with torch.no_grad():
        return function(**inputs)


def _upstream(output: torch.Tensor) -> torch.Tensor:
    """A fixed gradient whose values every floating dtype holds exactly."""
    if output.ndim == 0:
        return torch.ones_like(output)
    generator = torch.Generator().manual_seed(output.numel())
    return (torch.randint(-16, 17, output.shape, generator=generator) / 8).to(output)
