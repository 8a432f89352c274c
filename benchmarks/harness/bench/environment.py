"""What a measurement depends on: machine, versions, and the exact code."""

import functools
import hashlib
import io
import os
import platform
import subprocess
import tarfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vitrail.kernels.tuning import gpu_slug

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "VITRAIL_COMMIT"  # names the commit where the code travelled without its history
CODE = ("kernels", "engine", "csrc", "recipes", "benchmarks")
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h")
SETTINGS = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "VITRAIL_IMPL", "VITRAIL_CONFIGS")
PEERS = (
    "transformers",
    "timm",
    "lightly",
    "liger-kernel",
    "deepspeed",
    "xformers",
    "torchvision",
    "nvidia-dali-cuda130",
)


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """The folder of this machine's results: `h200`, or `cpu`."""
    return gpu_slug(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


@functools.cache
def describe() -> dict[str, Any]:
    """Everything that a row says about where it was measured."""
    gpu = torch.cuda.is_available()
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "driver": _driver() if gpu else None,
        "threads": torch.get_num_threads(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "extension": _extension(),
        "peers": {name: found for name in PEERS if (found := installed(name)) is not None},
        "commit": commit(),
        "code": digest((path.relative_to(ROOT).as_posix(), path.read_bytes()) for path in _sources()),
    }
    return {name: value for name, value in facts.items() if value not in (None, {})}


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The full hash of the commit that is checked out, or what `VITRAIL_COMMIT` says, or `unknown`."""
    if COMMIT in os.environ:
        return os.environ[COMMIT]
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else "unknown"


def is_source(name: str) -> bool:
    """Whether a file, named from the root, decides what is computed or how it is launched."""
    if name.split("/")[0] not in CODE or "/__pycache__/" in name:
        return False
    return name.endswith(SUFFIXES) or ("/configs/" in name and name.endswith(".json"))


def digest(files: Iterable[tuple[str, bytes]]) -> str:
    """A fingerprint of source files, given by name and content; others are passed over.

    It ties a row to the code: a row whose commit has another fingerprint was measured on something that nobody can see.
    """
    total = hashlib.sha256()
    for name, content in sorted(files):
        if is_source(name):
            total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]


@functools.cache
def digest_of(revision: str) -> str | None:
    """The fingerprint of the sources of a commit, None where the repository does not know the commit."""
    folders = subprocess.run(
        ["git", "ls-tree", "--name-only", revision], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if folders.returncode != 0:
        return None
    present = [name for name in folders.stdout.split() if name in CODE]
    archive = subprocess.run(["git", "archive", revision, *present], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]  # type: ignore[union-attr]
    return digest(files)


def _sources() -> list[Path]:
    """The source files of the working tree, as git would list them: neither caches nor results."""
    paths = (path for folder in CODE for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path for path in paths if is_source(path.relative_to(ROOT).as_posix())]


def _extension() -> str:
    """The toolkit that the compiled extension was built with, or that there is none."""
    from vitrail.kernels import extension

    return "none" if extension.missing() else f"CUDA {extension.facts().get('toolkit', 'unknown')}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _driver() -> str | None:
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.splitlines()[0].strip() if asked.returncode == 0 else None
