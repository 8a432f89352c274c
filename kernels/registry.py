"""Which implementations an op has, what each cannot run and why, and the choice among them.

An op is a name, a function that turns the public arguments into those of its implementations, and the
implementations in order of preference. An implementation is a module with one function per pass (`forward`,
`backward`), imported on first use, and one predicate per pass that returns the *list of reasons* why it cannot
take these arguments. An empty list means that it can. A later op adds one `Op` and nothing here changes.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .flags import IMPL

CHOICES = ("auto", "cuda", "triton", "chunked", "reference")
INTERPRETED = "triton"  # on CPU tensors it runs in an interpreter, for tests: `auto` never takes it there

log = logging.getLogger("vitrail.kernels")


class UnsupportedError(RuntimeError):
    """An implementation was asked for by name and cannot run this call.

    Attributes:
        reasons: Why not, one sentence each.
    """

    def __init__(self, op: str, impl: str, reasons: Sequence[str]) -> None:
        self.reasons = list(reasons)
        lines = "".join(f"\n  - {reason}" for reason in self.reasons)
        super().__init__(f"{op}: impl={impl!r} cannot run this call:{lines}")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        name: `cuda` (the compiled extension, on CPU tensors its C++ twin), `triton`, `chunked` (PyTorch's matrix
            products on parts of the problem) or `reference` (plain PyTorch).
        module: Absolute name of the module that holds one function per pass, imported on first use.
        reasons: For each pass that it has, a predicate over that pass's arguments that returns the reasons against.
        supports: What it takes, in one line for the support matrix.
        reservations: For some passes, a predicate that returns why `auto` should rather take another implementation
            although this one could run.
        quick: For some passes, a cheaper predicate to ask before a call in place of `reasons`. What it does not find,
            the function itself refuses: it raises UnsupportedError before it changes anything.
    """

    name: str
    module: str
    reasons: Mapping[str, Callable[..., list[str]]]
    supports: str
    reservations: Mapping[str, Callable[..., list[str]]] = field(default_factory=dict)
    quick: Mapping[str, Callable[..., list[str]]] = field(default_factory=dict)

    def before_call(self, which: str, args: tuple[Any, ...]) -> list[str]:
        """Returns why this implementation cannot run, as far as that is worth knowing before the call."""
        return self.quick[which](*args) if which in self.quick else self.why_not(which, args)

    def why_not(self, which: str, args: tuple[Any, ...]) -> list[str]:
        """Returns every reason why this implementation cannot run."""
        return self.reasons[which](*args) if which in self.reasons else [f"it has no {which} pass"]

    def against(self, which: str, args: tuple[Any, ...], *, quick: bool = False) -> list[str]:
        """Returns why `auto` passes this implementation over: it cannot run, or others are expected to be faster."""
        reasons = self.before_call(which, args) if quick else self.why_not(which, args)
        if reasons or which not in self.reservations:
            return reasons
        return [f"it could run, but {reservation}" for reservation in self.reservations[which](*args)]

    def function(self, which: str) -> Callable[..., Any]:
        """Returns the function of the pass `which`, importing the implementation if need be."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), which)
        return function


@dataclass(frozen=True)
class Op:
    """An op and its implementations, in the order in which `auto` tries them; the last one takes everything.

    Attributes:
        name: Name of the public function and of the forward op in the `vitrail` library.
        bind: Checks the public arguments and returns those of the forward pass.
        implementations: In order of preference; the last one is the reference.
    """

    name: str
    bind: Callable[..., tuple[Any, ...]]
    implementations: tuple[Implementation, ...]

    def implementation(self, name: str) -> Implementation:
        """Returns the implementation called `name`.

        Raises:
            UnsupportedError: This op has none of that name.
        """
        for candidate in self.implementations:
            if candidate.name == name:
                return candidate
        have = ", ".join(candidate.name for candidate in self.implementations)
        raise UnsupportedError(self.name, name, [f"the op has no {name!r} implementation; it has {have}"])

    def choose(self, which: str, impl: str, args: tuple[Any, ...]) -> Implementation:
        """Picks the implementation that runs the pass `which` on `args`.

        Args:
            which: `forward` or `backward`.
            impl: `auto` takes the first implementation without a reason or a reservation against it, on CPU tensors
                never Triton's interpreter; a name takes that one.
            args: The arguments of the pass.

        Raises:
            UnsupportedError: `impl` names an implementation that cannot run `args`.
        """
        rejected: dict[str, list[str]] = {}
        chosen = next(self._acceptable(which, impl, args, rejected))
        _log_once(self.name, which, chosen.name, rejected)
        return chosen

    def run(self, which: str, impl: str, *args: Any) -> Any:
        """Runs the pass `which` of this op on `args` with the implementation that `impl` selects, as `choose` does.

        Where `auto` finds that an implementation refuses when called, the next one is tried.
        """
        rejected: dict[str, list[str]] = {}
        for candidate in self._acceptable(which, impl, args, rejected):
            try:
                result = candidate.function(which)(*args)
            except UnsupportedError as error:
                rejected[candidate.name] = error.reasons
            else:
                _log_once(self.name, which, candidate.name, rejected)
                return result
        raise UnsupportedError(self.name, impl, [reason for reasons in rejected.values() for reason in reasons])

    def _acceptable(
        self, which: str, impl: str, args: tuple[Any, ...], rejected: dict[str, list[str]]
    ) -> Iterator[Implementation]:
        """Yields what may run a call, in order of preference; notes in `rejected` what may not, and why."""
        if impl == "auto":
            impl = os.environ.get(IMPL.name, IMPL.default)
        if impl != "auto":
            chosen = self.implementation(impl)
            reasons = chosen.before_call(which, args)
            if reasons:
                raise UnsupportedError(self.name, impl, reasons)
            yield chosen
            return
        on_cpu = all(tensor.device.type == "cpu" for tensor in _tensors(args))
        for candidate in self.implementations:
            if on_cpu and candidate.name == INTERPRETED:  # there, the reference is no fallback
                continue
            reasons = candidate.against(which, args, quick=True)
            if reasons:
                rejected[candidate.name] = reasons
            else:
                yield candidate


_ops: dict[str, Op] = {}
_logged: set[tuple[Any, ...]] = set()


def register(op: Op) -> Op:
    """Adds `op` to the table and returns it."""
    _ops[op.name] = op
    return op


def ops() -> tuple[Op, ...]:
    """Returns every registered op, in order of registration."""
    return tuple(_ops.values())


def check_impl(impl: str) -> None:
    """Raises ValueError unless `impl` is one of `CHOICES`."""
    if impl not in CHOICES:
        raise ValueError(f"impl must be one of {', '.join(map(repr, CHOICES))}, got {impl!r}")


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    """Says, for each implementation of `op`, why it cannot run this call, or why `auto` would take another.

    Args:
        op: The public function or its name.
        *args: What you would call it with.
        **kwargs: Likewise; `impl` is ignored.

    Returns:
        Reasons by implementation name, in order of preference. `impl="auto"` takes the first with an empty list; on
        CPU tensors never Triton, even where the interpreter could run it.

    Raises:
        KeyError: No op of that name.
        TypeError: As the op itself would.
        ValueError: As the op itself would.

    Example:
        >>> explain("random_masking", 256, 196, 49, device="cuda")
        {'triton': [], 'reference': []}
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _ops:
        raise KeyError(f"no op called {name!r}; there are {', '.join(_ops)}")
    kwargs.pop("impl", None)
    entry = _ops[name]
    bound = entry.bind(*args, **kwargs)
    return {candidate.name: candidate.against("forward", bound) for candidate in entry.implementations}


def _tensors(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yields the tensors among arguments, of each list the first one: a list lives on one device."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg[:1])


def _log_once(op: str, which: str, chosen: str, rejected: Mapping[str, list[str]]) -> None:
    """Logs why implementations were passed over, once for each op and reason."""
    for name, reasons in rejected.items():
        told = (op, which, name, *reasons)
        if told not in _logged:
            _logged.add(told)
            log.warning("%s (%s): %s, not %s, because %s", op, which, chosen, name, "; ".join(reasons))
