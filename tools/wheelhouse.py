"""Collect the wheels that a GPU machine without a network needs beside torch.

    make wheelhouse                              # Python 3.12, x86-64 Linux, into wheelhouse/
    pip install --no-index --no-deps wheelhouse/small/*.whl      # on the GPU machine

The packages are vitrail's requirements and theirs, at the versions of constraints.txt; torch and what it requires are
taken to be there. `small/` is enough to train on the replay source, `large/` holds DALI and xformers.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PRESENT = ("torch", "triton")
EXTRA = ("xformers", "lightly", "liger-kernel", "pytest", "pytest-benchmark", "ninja")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)] + [
    "manylinux2014_x86_64"
]
LARGE = 20_000_000  # bytes


def closure(roots: list[str], python: str) -> set[str]:
    """Names of `roots` and of everything that they require on Linux under `python`, as installed here."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: set[str] = set()
    pending = [canonicalize_name(root) for root in roots]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                pending.append(canonicalize_name(requirement.name))
    return found


def pinned(constraints: Path) -> dict[str, str]:
    """Name to version of a constraints file."""
    lines = re.findall(r"^([\w.\-\[\]]+)==(\S+)", constraints.read_text(), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def fetch(package: str, python: str, folder: Path) -> None:
    """Download the wheel of `name==version` for `python`, or build it from source where there is none.

    Raises:
        SystemExit: the package has no wheel for that Python and does not build to one that fits any.
    """
    platforms = [flag for platform in PLATFORMS for flag in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    download = [*pip, "download", "--no-deps", *target, "--dest", str(folder), package]
    if subprocess.run(download, stderr=subprocess.DEVNULL, check=False).returncode == 0:
        return
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), package]
    subprocess.run(build, check=True)
    (wheel,) = folder.iterdir()
    if not wheel.name.endswith("-none-any.whl"):
        raise SystemExit(f"{package} has no wheel for Python {python}, and building it here gave {wheel.name}")


def main() -> None:
    """Fill the wheelhouse and list it, small packages first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constraint", type=Path, required=True, help="file of exact versions")
    parser.add_argument("--output", type=Path, required=True, help="folder to fill")
    parser.add_argument("--python", default="3.12", help="Python version of the GPU machine")
    arguments = parser.parse_args()

    versions = pinned(arguments.constraint)
    names = closure(["vitrail"], arguments.python) | {canonicalize_name(name) for name in EXTRA}
    names -= closure(list(PRESENT), arguments.python) | {"vitrail"}
    collected = []
    for name in sorted(names):
        package = f"{name}=={versions[name]}" if name in versions else name
        with tempfile.TemporaryDirectory() as scratch:
            fetch(package, arguments.python, Path(scratch))
            (wheel,) = Path(scratch).iterdir()
            size = wheel.stat().st_size
            folder = arguments.output / ("large" if size > LARGE else "small")
            folder.mkdir(parents=True, exist_ok=True)
            collected.append((size, Path(shutil.copy(wheel, folder))))
    for size, path in sorted(collected):
        print(f"{size / 1e6:8.1f} MB  {path}")


if __name__ == "__main__":
    main()
