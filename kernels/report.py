"""The environment and the support matrix, as tables for a terminal."""

import os
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.table import Table

from . import extension, tuner
from .checks import interpreting, triton_installed
from .flags import FLAGS
from .registry import ops
from .tuning import config_file, source


def environment() -> Table:
    """Returns versions, device and interpreter state."""
    table = Table("component", "state", title="environment")
    table.add_row("torch", torch.__version__)
    for package in ("vitrail", "triton"):
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    table.add_row("CUDA that torch was built for", torch.version.cuda or "none")
    table.add_row("device", _device())
    table.add_row("compiled extension", _extension())
    table.add_row("Triton kernels run", _triton_state())
    return table


def flags() -> Table:
    """Returns every environment variable that matters, with its value, default and effect."""
    table = Table("variable", "value", "default", "effect", title="environment variables")
    for flag in FLAGS:
        table.add_row(flag.name, os.environ.get(flag.name, "unset"), flag.default, flag.effect)
    return table


def support() -> Table:
    """Returns what each implementation of each op takes, in order of preference."""
    table = Table("op", "implementation", "takes", title="support matrix")
    for op in ops():
        for index, implementation in enumerate(op.implementations):
            last = index == len(op.implementations) - 1
            table.add_row("" if index else op.name, implementation.name, implementation.supports, end_section=last)
    return table


def configurations() -> Table:
    """Returns the GPUs with launch configurations for each op that has any to choose, and what is taken here."""
    table = Table("op", "tuned on", "here", title="launch configurations")
    folder = source()
    for name in tuner.kernel_modules() if triton_installed() else ():
        if folder is None:
            table.add_row(name, "", "defaults: VITRAIL_CONFIGS switches the lookup off")
            continue
        files = sorted(path.stem for path in (folder / name / "configs").glob("*.json"))
        if not torch.cuda.is_available():
            here = "nothing: no GPU"
        elif config_file(folder, name, torch.cuda.get_device_name()).stem in files:
            here = "tuned"
        else:
            here = f"defaults; python -m vitrail.kernels tune {name}"
        table.add_row(name, ", ".join(files) or "no GPU yet", here)
    return table


def _device() -> str:
    if not torch.cuda.is_available():
        return "CPU"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return f"{torch.cuda.get_device_name()}, compute capability {capability}"


def _extension() -> str:
    why = extension.missing()
    if why is not None:
        return why
    facts = extension.facts()
    if not facts:
        return "loaded"
    return f"loaded; CUDA {facts['toolkit']}, torch {facts['torch']}, {facts['architectures']}"


def _triton_state() -> str:
    if not triton_installed():
        return "not at all: triton is not installed"
    if interpreting():
        return 'in the interpreter, when impl="triton" asks for them'
    return "on the GPU" if torch.cuda.is_available() else "not at all: no GPU, and TRITON_INTERPRET is not set"
