"""Faults planted into the source of an implementation, to prove that the checks would notice them."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest


@dataclass(frozen=True)
class Fault:
    """A change of one place in a module's source that must not go unnoticed. It must not write out of bounds.

    Attributes:
        name: What is wrong, for the test's name.
        module: Module that is changed.
        old: Text that occurs exactly once in it.
        new: What replaces it.
        reload: Modules that import names from it and must be loaded again to see the change.
    """

    name: str
    module: str
    old: str
    new: str
    reload: tuple[str, ...] = ()


@contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """Replaces the module by its faulty twin, whose source is written to `folder`, for the time of the block."""
    source = Path(str(_find(fault.module))).read_text()
    assert source.count(fault.old) == 1, f"{fault.old!r} occurs {source.count(fault.old)} times in {fault.module}"
    faulty = folder / f"{fault.module}.py"
    faulty.write_text(source.replace(fault.old, fault.new))
    saved = {name: sys.modules.get(name) for name in (fault.module, *fault.reload)}
    try:
        _load(fault.module, faulty)
        for name in fault.reload:
            _load(name, _find(name))
        yield
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def check_noticed(fault: Fault, folder: Path, check: Callable[[], object]) -> None:
    """Asserts that `check` passes as things are and fails with the fault planted."""
    check()
    with planted(fault, folder), pytest.raises(AssertionError):
        check()


def _find(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
