"""Methods from the configuration that a run has written down.

Classes are found among the subclasses of what a field's type allows, and values are checked against that type: a
configuration from elsewhere can name nothing but a method or a network of this package.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .base import MethodConfig

T = TypeVar("T")
_KIND = "name"  # key of a dictionary that says the class
PLAIN: dict[Any, tuple[type, ...]] = {
    float: (float, int),
    int: (int,),
    bool: (bool,),
    str: (str,),
    Path: (str,),
    NoneType: (NoneType,),
}
"""By the type of a field, the types that JSON has for it."""


def method_config(plain: dict[str, Any]) -> MethodConfig:
    """Rebuild a method's configuration.

    Args:
        plain: what `RunConfig.as_dict` has under "method".

    Raises:
        ValueError: a class, a field or a value is not one that this version knows.
    """
    return read_config(MethodConfig, plain, "method")  # type: ignore[type-abstract]


def read_config(kind: type[T], plain: Any, where: str) -> T:
    """Rebuild a dataclass of configuration.

    Args:
        kind: the class, or an ancestor of the one that `plain` names.
        plain: plain JSON values by field; the name of the class may be among them.
        where: dotted name of this part, for messages.

    Raises:
        ValueError: a class, a field or a value is not one that this version knows.
    """
    if not isinstance(plain, dict):
        raise ValueError(f"{where} is {plain!r}; expected a {kind.__name__}, which is a dictionary")
    cls = _class(kind, plain, where)
    hints = get_type_hints(cls)
    known = {part.name for part in dataclasses.fields(cls) if part.init}  # type: ignore[arg-type]
    values = {key: value for key, value in plain.items() if key != _KIND or _KIND in known}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(
            f"{where} has fields that {cls.__name__} lacks: {', '.join(unknown)}; it knows {', '.join(sorted(known))}. "
            "The configuration was written by another version: use that one, or take the fields out"
        )
    return cls(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _class(kind: type[T], plain: dict[str, Any], where: str) -> type[T]:
    """The class that a dictionary is of: `kind`, or the subclass of it that the dictionary names."""
    for package in ("methods", "models"):  # subclasses are known once their modules are imported
        root = importlib.import_module(f"{__package__.rpartition('.')[0]}.{package}")
        for module in pkgutil.iter_modules(root.__path__):
            importlib.import_module(f"{root.__name__}.{module.name}")
    classes = {cls.__name__: cls for cls in _family(kind) if not inspect.isabstract(cls)}
    fields = {part.name for part in dataclasses.fields(kind)}  # type: ignore[arg-type]
    name = kind.__name__ if _KIND in fields else plain.get(_KIND, kind.__name__)
    if name not in classes:
        raise ValueError(f"{where} is of the class {name!r}; expected one of {', '.join(sorted(classes))}")
    return classes[name]


def _family(kind: type[T]) -> Iterator[type[T]]:
    """A class and all that derive from it."""
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)


def _value(hint: Any, plain: Any, where: str) -> Any:
    """A value of a field, as its type asks for it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_that_fits(arguments, plain, where)
    if dataclasses.is_dataclass(hint):
        return read_config(hint, plain, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(plain, list):
        kinds = arguments[:1] * len(plain) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(plain):
            pairs = zip(kinds, plain, strict=True)
            return tuple(_value(kind, part, f"{where}[{i}]") for i, (kind, part) in enumerate(pairs))
    if (origin is Literal and plain in arguments) or (hint in PLAIN and type(plain) in PLAIN[hint]):
        return Path(plain) if hint is Path else plain
    raise ValueError(f"{where} is {plain!r}; expected {hint if origin else hint.__name__}")


def _first_that_fits(kinds: tuple[Any, ...], plain: Any, where: str) -> Any:
    """A value of a type with alternatives."""
    faults = []
    for kind in kinds:
        try:
            return _value(kind, plain, where)
        except ValueError as error:
            faults.append(str(error))
    raise ValueError("; or ".join(faults))
