"""Images in files of their own: a folder, or a list of paths."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from .faults import DataError
from .tar import IMAGE_SUFFIXES


class FileSource:
    """Image files on disk.

    Args:
        root: Folder that the names are relative to.
        names: File names.
        labels: Class number of each file, or None.
        classes: Class names, or None.
    """

    def __init__(
        self, root: Path, names: Sequence[str], labels: Sequence[int] | None, classes: tuple[str, ...] | None
    ) -> None:
        self._root = str(root)
        self._names = names
        self._labels = labels
        self.classes = classes
        listing = "\n".join(names) + "\n" + " ".join(map(str, labels or ()))
        self.fingerprint = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        """The file's content."""
        with open(os.path.join(self._root, self._names[index]), "rb", buffering=0) as file:
            return file.read()

    def label(self, index: int) -> int | None:
        """Class number, or None for unlabelled data."""
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        """The file's path relative to the folder or list that it was found by."""
        return self._names[index]


def _images_below(root: Path, folder: str) -> list[str]:
    """Names relative to `root` of all images at any depth below `folder`, sorted; hidden files are left out."""
    found = []
    top = root / folder
    for directory, _, files in os.walk(top, followlinks=True):
        inside = os.path.relpath(directory, root)
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                found.append(os.path.normpath(os.path.join(inside, file)))
    return sorted(found)


def open_folder(path: Path) -> FileSource:
    """Open a folder with one sub-folder per class, or with unlabelled images directly inside.

    Args:
        path: The folder. Images may lie at any depth below their class's folder; symbolic links are followed.

    Returns:
        The images, sorted by name. Folders without images are no classes.

    Raises:
        DataError: If there are no images, or some lie beside the sub-folders.
    """
    try:
        entries = sorted((entry for entry in os.scandir(path) if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{path} cannot be listed ({error.strerror}); expected a readable folder of images") from error
    flat = [entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES]
    by_class = {entry.name: _images_below(path, entry.name) for entry in entries if entry.is_dir()}
    by_class = {name: images for name, images in by_class.items() if images}
    if flat and by_class:
        raise DataError(
            f"{path} holds images ({flat[0]}, ...) beside sub-folders of images ({min(by_class)}, ...); expected "
            "one sub-folder per class, or images only: move the one or the other away"
        )
    if flat:
        return FileSource(path, flat, None, None)
    if not by_class:
        kinds = " ".join(IMAGE_SUFFIXES)
        raise DataError(
            f"{path} has no images; expected {kinds} files in it or in one sub-folder per class, or .tar shards"
        )
    names = [name for images in by_class.values() for name in images]
    labels = [number for number, images in enumerate(by_class.values()) for _ in images]
    return FileSource(path, names, labels, tuple(by_class))


def open_list(path: Path) -> FileSource:
    """Open a text file with one image per line: `path`, or `path<tab>label`.

    Args:
        path: The text file (UTF-8). Image paths are relative to its folder, or absolute. Labels are class numbers if
            all of them are whole numbers, else class names, numbered in sorted order.

    Returns:
        The images in the order of the file.

    Raises:
        DataError: If the file cannot be read, is empty, or labels only some of its images.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list ({error}); expected UTF-8 lines of path<tab>label") from error
    if not lines:
        raise DataError(f"{path} lists no images; expected lines of path<tab>label, or of paths")
    rows = [line.split("\t") for line in lines]
    names = [row[0].strip() for row in rows]
    if all(len(row) == 1 for row in rows):
        return FileSource(path.parent, names, None, None)
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise DataError(
                f"{path}:{number} has {len(row)} tab-separated fields; expected path<tab>label on every line, "
                "or a path alone on every line"
            )
    values = [row[1].strip() for row in rows]
    if all(value.isdecimal() for value in values):
        labels = [int(value) for value in values]
        return FileSource(path.parent, names, labels, tuple(map(str, range(max(labels) + 1))))
    classes = sorted(set(values))
    numbers = {name: number for number, name in enumerate(classes)}
    return FileSource(path.parent, names, [numbers[value] for value in values], tuple(classes))
