"""Write tar shards."""

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .cache import fsync
from .tar import CLASSES_FILE


class Member(NamedTuple):
    """One image to be written."""

    name: str
    """Path-like name with the image's suffix; unique."""
    data: bytes
    """The encoded image."""
    label: int | None
    """Class number, or None for unlabelled data."""


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    # Owner, mode and time stay at fixed values: the same images give the same bytes.
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def write_shards(
    members: Iterable[Member], folder: Path, *, classes: tuple[str, ...] | None = None, shard_bytes: int = 1 << 30
) -> int:
    """Write images into `shard-000000.tar`, `shard-000001.tar`, ... in the layout of webdataset.

    Args:
        members: The images in order. The key in the shard is the name with dots replaced, since a key ends at its
            first dot; keys that would collide are told apart by underscores.
        folder: Where to write; made if missing, expected to be empty.
        classes: Class names, written beside the shards.
        shard_bytes: A shard is closed once it is at least this large.

    Returns:
        Number of images written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if classes is not None:
        (folder / CLASSES_FILE).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        fsync(folder / CLASSES_FILE)
    keys: set[str] = set()
    count = shard = 0
    pending = iter(members)
    member = next(pending, None)
    while member is not None:
        path = folder / f"shard-{shard:06d}.tar"
        with tarfile.open(path, "w") as archive:
            while member is not None and archive.offset < shard_bytes:
                stem, suffix = os.path.splitext(member.name)
                key = stem.replace(".", "_")
                while key in keys:
                    key += "_"
                keys.add(key)
                _add(archive, key + suffix.lower(), member.data)
                if member.label is not None:
                    _add(archive, f"{key}.cls", str(member.label).encode())
                count += 1
                member = next(pending, None)
        fsync(path)
        shard += 1
    fsync(folder)
    return count
