"""Sharing a machine: its cores, a folder for generated files, and writing without readers seeing halves."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """`$VITRAIL_CACHE`, else `$XDG_CACHE_HOME/vitrail`, else `~/.cache/vitrail`; created where missing."""
    chosen = os.environ.get("VITRAIL_CACHE")
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def available_threads() -> int:
    """This process's share of the cores that it may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold an exclusive lock among this machine's processes.

    The lock lives in the cache folder, not beside the data: locks on network file systems are not to be relied on.
    The kernel releases it when its holder dies.

    Args:
        name: What is locked; a file name.
    """
    with (cache_dir() / f"{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that its name only ever holds all of it: a temporary file, fsync, rename.

    Args:
        path: The final name.

    Yields:
        The temporary name to write to, in the same folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Write a folder so that its name only ever holds all of it.

    Args:
        path: The final name, which must not exist or be an empty folder. Its parents are created.

    Yields:
        A temporary folder beside it to write into.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
