"""The compiled extension `_C`: whether it is there, why not, and its ops.

It registers the dispatcher namespace `vitrail_C`, for CUDA tensors and, from the same source, for CPU tensors. In the
registry it is the implementation called `cuda`.
"""

import functools
import hashlib
import importlib
import json
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from .checks import MIN_CAPABILITY, capability

NAME = "vitrail.kernels._C"
SOURCES = Path(__file__).resolve().parents[1] / "csrc"  # in a checkout
RECORD = Path(__file__).with_name("extension.json")  # written by setup.py
REMEDY = "VITRAIL_BUILD_EXT=1 pip install --no-build-isolation . builds it, or says what is missing"


@functools.cache
def missing() -> str | None:
    """Returns why the extension cannot be used at all, or None if it is loaded."""
    if library() is None:
        why = facts().get("missing", "nobody built it")
        return f"the compiled extension is not there: {why}; {REMEDY}"
    if SOURCES.is_dir() and facts().get("sources") != digest(SOURCES):
        return f"the compiled extension was built from other sources than those in {SOURCES}; {REMEDY}"
    try:
        importlib.import_module(NAME)
    except ImportError as error:
        return f"the compiled extension does not load: {error}; {REMEDY}"
    return None


def digest(folder: Path) -> str:
    """Returns a hash of the sources in a folder, as setup.py notes it; a library of others may not fit this Python."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".cpp", ".cu", ".h", ".cuh"):
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def library() -> str | None:
    """Returns the path of the extension beside this file, or None."""
    found = PathFinder.find_spec(NAME, [str(Path(__file__).parent)])
    return None if found is None else found.origin


def facts() -> dict[str, str]:
    """Returns what setup.py noted: toolkit, torch, architectures and sources, or why the extension is `missing`."""
    try:
        told: dict[str, str] = json.loads(RECORD.read_text())
    except (OSError, ValueError):
        return {}
    return told


def reasons(device: torch.device) -> list[str]:
    """Returns why the extension cannot run on `device`."""
    why = missing()
    if why is not None:
        return [why]
    if device.type == "cpu":
        return []
    if device.type != "cuda":
        return [f"the tensors are on {device}; move them to a CUDA device or the CPU"]
    if capability(device) < MIN_CAPABILITY:
        have, want = (".".join(map(str, pair)) for pair in (capability(device), MIN_CAPABILITY))
        return [f"{device} has compute capability {have}; the extension needs {want} or newer"]
    return []


def ops() -> Any:
    """Returns the extension's ops, loading it if need be.

    Raises:
        RuntimeError: It is not there, with the reason.
    """
    why = missing()
    if why is not None:
        raise RuntimeError(why)
    return torch.ops.vitrail_C
