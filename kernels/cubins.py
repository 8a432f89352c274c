"""What the kernels of the compiled extension use, read back from its machine code; no GPU is needed.

`cubins.json` holds the numbers, so that a change shows up in a diff, as `resources.json` does for Triton's kernels.
"""

import re
import subprocess
from pathlib import Path

from . import extension
from .resources import Measured, Resources, cuobjdump, parse

TABLE = Path(__file__).with_name("cubins.json")


def measure() -> Measured:
    """Reads every kernel of the extension.

    Returns:
        Resources by kernel and by compute capability ("90" is 9.0a).

    Raises:
        RuntimeError: The extension is not there, with the reason.
    """
    extension.ops()
    command = [cuobjdump(), "-res-usage", "-sass", str(extension.library())]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return read(listing)


def read(listing: str) -> Measured:
    """Reads what cuobjdump says of a library: for each architecture the use of resources, then the instructions."""
    mangled: dict[str, dict[str, Resources]] = {}
    for block in listing.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = sm_(\d+)", block)
        if architecture is None:
            raise ValueError("cuobjdump names no architecture for a block of machine code")
        usage = {
            name: (f"REG:{registers} STACK:{stack}\n", int(shared))
            for name, registers, stack, shared in re.findall(
                r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", block
            )
        }
        for section in re.split(r"Function : ", block)[1:]:
            name, code = section.split(maxsplit=1)
            used, shared = usage[name]
            mangled.setdefault(name, {})[architecture[1]] = parse(used + code, shared)
    names = _demangle(list(mangled))
    return {names[name]: mangled[name] for name in sorted(mangled, key=names.__getitem__)}


def _demangle(names: list[str]) -> dict[str, str]:
    """Returns readable names: the kernel and its template arguments, without our namespace and the parameters."""
    if not names:
        return {}
    command = ["c++filt", *names]
    readable = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: _shorten(text) for name, text in zip(names, readable, strict=True)}


def _shorten(signature: str) -> str:
    text = re.sub(r"vitrail::|\(anonymous namespace\)::|^void ", "", signature).replace("> >", ">>")
    return text.split("(", 1)[0]
