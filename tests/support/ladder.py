"""The test ladder that every op climbs: problems, float64 truth, the tolerance rule, gradients, compilation, fakes.

A test states a `Problem`, the public function and an independent eager formula of it; the checks here do the
rest. Guarded buffers are in `ladder_guards`, planted faults in `ladder_faults`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.kernels.checks import interpreting

Function = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """One call of a public function.

    Attributes:
        inputs: Keyword arguments. Floating tensors follow the dtype under test, all tensors follow the device.
        differentiable: Names of the inputs whose gradients are compared.
    """

    inputs: dict[str, Any]
    differentiable: tuple[str, ...] = ()

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Problem":
        """Returns the problem with its floating tensors in `dtype` and every tensor on `device`."""

        def convert(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else value.dtype)

        return replace(self, inputs={name: convert(value) for name, value in self.inputs.items()})


def kernel_device() -> torch.device:
    """Where Triton kernels can run here: on the CPU under the interpreter, else on the GPU."""
    return torch.device("cpu" if interpreting() else "cuda")


def upstream(output: torch.Tensor) -> torch.Tensor:
    """Returns a fixed gradient for `output` whose values every floating dtype represents exactly."""
    generator = torch.Generator().manual_seed(output.numel())
    values = torch.randint(-16, 17, output.shape, generator=generator) / 8
    return values.to(output)


def evaluate(function: Function, problem: Problem) -> dict[str, torch.Tensor]:
    """Runs a function forward and backward.

    Returns:
        The outputs as `output 0`, `output 1`... and the gradients as `gradient of <input>`.
    """
    inputs = dict(problem.inputs)
    for name in problem.differentiable:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    result = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    if problem.differentiable:
        leaves = [inputs[name] for name in problem.differentiable]
        gradients = torch.autograd.grad(outputs, leaves, [upstream(output) for output in outputs])
        result |= {f"gradient of {name}": value for name, value in zip(problem.differentiable, gradients, strict=True)}
    return result


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills fresh memory with NaN (or the largest integer), so that an element that nobody writes is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_as_accurate(
    result: dict[str, torch.Tensor], baseline: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]
) -> None:
    """Asserts that a result is about as close to the truth as the eager formula in float32, rounded, is.

    The error may be twice the baseline's for outputs and three times for gradients, on the maximum and on the root
    mean square, plus a floor of a few float32 roundings of the largest value. Integers must be equal. The interpreter
    truncates where a GPU rounds to nearest, which doubles the error of bf16 results: there the factor is doubled.
    """
    assert result.keys() == truth.keys()
    for name, expected in truth.items():
        got = result[name]
        assert got.shape == expected.shape, f"{name}: shape {list(got.shape)}, expected {list(expected.shape)}"
        if not got.is_floating_point():
            assert torch.equal(got.cpu(), expected.cpu()), f"{name} differs"
            continue
        if expected.numel() == 0:
            continue
        factor = 3.0 if name.startswith("gradient") else 2.0
        if got.dtype == torch.bfloat16 and interpreting():
            factor *= 2
        expected = expected.cpu()
        error = (got.cpu().double() - expected).abs()
        allowed = (baseline[name].to(got.dtype).cpu().double() - expected).abs()
        floor = 4 * torch.finfo(torch.float32).eps * expected.abs().max()
        for measure, reduce in (("maximum", torch.amax), ("root mean square", _root_mean_square)):
            have, limit = reduce(error), factor * reduce(allowed) + floor
            assert have <= limit, f"{name}: {measure} error {have:.3g}, the limit is {limit:.3g}"


def _root_mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean().sqrt()


def check_accuracy(
    function: Function, eager: Function, problem: Problem, dtype: torch.dtype, impl: str = "reference"
) -> dict[str, torch.Tensor]:
    """Checks one implementation in one dtype against the eager formula in float64.

    Args:
        function: The public function.
        eager: An independent formula with the same keyword arguments, differentiable by autograd.
        problem: The call.
        dtype: Of the floating inputs.
        impl: `reference` runs on the CPU, `triton` where kernels can run.

    Returns:
        What the implementation computed.
    """
    rounded = problem.to(dtype)  # truth and baseline must see the values that the implementation sees
    truth = evaluate(eager, rounded.to(torch.float64))
    baseline = evaluate(eager, rounded.to(torch.float64 if dtype == torch.float64 else torch.float32))
    device = "cpu" if impl == "reference" else kernel_device()
    with poisoned_memory():
        result = evaluate(partial(function, impl=impl), rounded.to(dtype, device))
    assert_as_accurate(result, baseline, truth)
    return result


def check_gradients(function: Function, problem: Problem) -> None:
    """Checks the hand-written backward in float64 against finite differences."""
    problem = problem.to(torch.float64)
    leaves = [problem.inputs[name].detach().clone().requires_grad_() for name in problem.differentiable]

    def call(*values: torch.Tensor) -> Any:
        return function(**{**problem.inputs, **dict(zip(problem.differentiable, values, strict=True))})

    assert torch.autograd.gradcheck(call, leaves)


def check_compiled(function: Function, *problems: Problem) -> None:
    """Checks that the function compiles as one graph, forward and backward, and computes the same.

    Several problems that differ in their sizes go through one compilation with dynamic shapes.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=len(problems) > 1)
    for problem in problems:
        expected, got = evaluate(function, problem), evaluate(compiled, problem)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert torch.equal(got[name], value), f"{name} differs under torch.compile"
            assert got[name].stride() == value.stride(), f"{name} has other strides under torch.compile"


class _Recorder(TorchDispatchMode):
    """Notes every call of an op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vitrail":
            detached = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
            self.calls.append((func, detached))
        return func(*args, **(kwargs or {}))


def record_ops(function: Function, problem: Problem) -> list[tuple[Any, tuple[Any, ...]]]:
    """Returns the ops that a call and its backward dispatch, with their (detached) arguments."""
    with _Recorder() as recorder:
        evaluate(function, problem)
    assert recorder.calls
    return recorder.calls


def check_ops(function: Function, problem: Problem) -> None:
    """Checks every op that a call dispatches: opcheck, and that fake outputs have the real ones' metadata.

    The inputs are detached: the raw ops have no autograd formula, by design, and opcheck would report that.
    """
    for overload, args in record_ops(function, problem):
        torch.library.opcheck(overload, args)
        real = overload(*args)
        with FakeTensorMode() as mode:
            fake = overload(*(mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
        for got, expected in zip(_tensors(fake), _tensors(real), strict=True):
            facts = [(value.shape, value.stride(), value.dtype, value.device) for value in (got, expected)]
            assert facts[0] == facts[1], f"{overload}: fake {facts[0]}, real {facts[1]}"


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
