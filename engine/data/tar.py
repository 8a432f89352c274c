"""Tar shards in the layout of webdataset: `key.jpg` beside `key.cls`.

A million small files are slow to list, slow to copy and hard on a file server; a hundred large ones are not. The
position of every image in its shard is found once and kept in an index, so that samples are read in any order.
"""

import hashlib
import json
import logging
import os
import tarfile
import weakref
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from .cache import cache_dir, locked, replacing
from .faults import DataError

logger = logging.getLogger("vitrail.data")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
"""File names that count as images, in lower case. What a file is, is decided by its content."""

CLASSES_FILE = "classes.txt"
"""Optional class names beside the shards, one per line in the order of the class numbers."""

_VERSION = 1
_KEEP_OPEN = 512  # shards; half of the customary limit of 1024 files per process


class _Index:
    """Where each image lies; one array entry per sample.

    Args:
        table: The saved form: `shard`, `offset`, `size`, `label` [N] int64 (label -1: none), `names` [bytes] uint8.
    """

    def __init__(self, table: dict[str, np.ndarray]) -> None:
        self.shard, self.offset, self.size, self.label = (table[k] for k in ("shard", "offset", "size", "label"))
        self._names = table["names"]

    @cached_property
    def names(self) -> list[str]:
        # Names are for messages: most runs never build this list.
        return bytes(self._names).decode("utf-8", "surrogateescape").split("\0")


def _scan_shard(path: Path) -> tuple[list[tuple[int, int, int]], list[str]]:
    """Rows of (offset, size, label) and the names of one shard's images, in file order."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, base = os.path.split(member.name)
                stem, dot, extension = base.partition(".")
                key = os.path.join(folder, stem)
                if not member.isreg() or base.startswith("."):
                    continue
                if dot + extension.lower() in IMAGE_SUFFIXES:
                    images.setdefault(key, (member.offset_data, member.size, member.name))
                elif extension == "cls":
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file has content
                    labels[key] = int(content.read())
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as a tar file ({error}); expected an uncompressed, whole archive"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} has a .cls file that is no class number ({error}); expected a whole number") from error
    unlabelled = images.keys() - labels.keys()
    if labels and unlabelled:
        raise DataError(f"{path} has no label for {min(unlabelled)}; expected a .cls file for every image, or for none")
    rows = [(offset, size, labels.get(key, -1)) for key, (offset, size, _) in images.items()]
    return rows, [f"{path.name}/{name}" for _, _, name in images.values()]


def _scan(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    """Index all shards."""
    rows: list[tuple[int, int, int, int]] = []
    names: list[str] = []
    for number, path in enumerate(shards):
        found, found_names = _scan_shard(path)
        rows += [(number, *row) for row in found]
        names += found_names
    if not rows:
        raise DataError(
            f"the shards in {shards[0].parent} have no images; expected members such as key.jpg and key.cls"
        )
    shard, offset, size, label = np.array(rows, np.int64).T
    if (label < 0).any() and (label >= 0).any():
        raise DataError(f"some shards in {shards[0].parent} have labels and some have none; expected all or none")
    blob = np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)
    return {"shard": shard, "offset": offset, "size": size, "label": label, "names": blob}


def _describe(shards: Sequence[Path]) -> str:
    """What an index is valid for: its format, and the name, size and time of change of every shard."""
    stats = [(path.name, path.stat()) for path in shards]
    return json.dumps([_VERSION, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]])


def _load(path: Path, description: str) -> dict[str, np.ndarray] | None:
    """A saved index, or None where there is none that is valid."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            if saved["description"].item() != description:
                return None
            return {key: saved[key] for key in ("shard", "offset", "size", "label", "names")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _index(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    """The index of these shards: the saved one if it is still true, else a new one.

    It is kept beside the shards, where the other machines of a run find it, or in the cache where that is not allowed.
    """
    description = _describe(shards)
    identity = "\n".join(str(path.resolve()) for path in shards)
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    names = hashlib.sha256("\n".join(path.name for path in shards).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    beside = shards[0].parent / f".vitrail-index-{names}.npz"
    places = (beside, cache_dir() / f"index-{digest}.npz")
    with locked(f"index-{digest}"):  # the first rank scans, the others wait and load
        for place in places:
            if (saved := _load(place, description)) is not None:
                return saved
        logger.info("indexing %d tar shards in %s", len(shards), shards[0].parent)
        table = _scan(shards)
        for place in places:
            try:
                with replacing(place) as temporary, temporary.open("wb") as file:
                    np.savez(file, allow_pickle=False, description=np.array(description), **table)
                break
            except OSError as error:
                logger.info("the index cannot be kept as %s: %s", place, error)
        return table


def _close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class TarSource:
    """Images in tar shards, read in place.

    Args:
        shards: Paths of uncompressed .tar files, all in one folder.

    Raises:
        DataError: If a shard cannot be read or holds no images, or labels are missing or malformed.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = list(shards)
        table = _index(self._shards)
        self._index = _Index(table)
        digest = hashlib.sha256()
        for key in ("names", "size", "label"):
            digest.update(table[key].tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self.classes = self._class_names()
        self._descriptors: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)

    def _class_names(self) -> tuple[str, ...] | None:
        highest = int(self._index.label.max())
        if highest < 0:
            return None
        try:
            lines = (self._shards[0].parent / CLASSES_FILE).read_text(encoding="utf-8").splitlines()
        except OSError:
            return tuple(map(str, range(highest + 1)))
        if len(lines) <= highest:
            raise DataError(
                f"{self._shards[0].parent / CLASSES_FILE} names {len(lines)} classes but a shard has class {highest}; "
                f"expected a line for each of the {highest + 1} classes"
            )
        return tuple(lines)

    def __len__(self) -> int:
        return len(self._index.shard)

    def read(self, index: int) -> bytes:
        """The encoded image.

        Positional reads rather than a memory map: a page fault would hold the interpreter lock, and with it the
        training loop, for as long as the disk takes.
        """
        shard, offset, size = (
            int(column[index]) for column in (self._index.shard, self._index.offset, self._index.size)
        )
        if len(self._shards) > _KEEP_OPEN:
            with self._shards[shard].open("rb", buffering=0) as file:
                return os.pread(file.fileno(), size, offset)
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            opened = os.open(self._shards[shard], os.O_RDONLY)
            descriptor = self._descriptors.setdefault(shard, opened)
            if descriptor != opened:  # another thread was first
                os.close(opened)
        return os.pread(descriptor, size, offset)

    def label(self, index: int) -> int | None:
        """Class number, or None for unlabelled data."""
        return None if self.classes is None else int(self._index.label[index])

    def name(self, index: int) -> str:
        """The shard's name and the member's name in it."""
        return self._index.names[index]
