"""Open the data that a configuration names.

Opening checks that the path, the layout and the labels make sense, so that a wrong path is one line of text before any
GPU is touched.
"""

import glob
import logging
from pathlib import Path
from typing import Literal, TypeAlias, overload

from .config import DataConfig, SourceKind
from .demo import demo_folder
from .faults import DataError
from .files import open_folder, open_list
from .replay import ReplaySource, SyntheticSource
from .source import Source
from .tar import TarSource

Split: TypeAlias = Literal["train", "val"]

logger = logging.getLogger("vitrail.data")

_VAL_NAMES = ("val", "validation")


def _shards(path: Path) -> list[Path]:
    """The .tar files that a path means: itself, those inside, or those that match it as a pattern."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    return sorted(Path(match) for match in glob.glob(str(path)) if match.endswith(".tar"))


def _open_path(path: Path, kind: SourceKind) -> Source:
    """Open a path as a kind of source, or as what it looks like."""
    shards = _shards(path) if kind in ("auto", "tar") else []
    if shards:
        return TarSource(shards)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; expected a folder, .tar shards or a text file of paths: check the path"
        )
    if kind == "tar":
        raise DataError(f"{path} has no .tar shards; expected some: write them with `vitrail data pack`")
    if kind == "list" or (kind == "auto" and path.is_file() and path.suffix in (".txt", ".tsv", ".lst")):
        return open_list(path)
    if not path.is_dir():
        raise DataError(f"{path} is a file; expected a folder, a .tar, or a list that ends in .txt, .tsv or .lst")
    return open_folder(path)


def _train_path(config: DataConfig) -> Path:
    """The folder `train` in the configured path, or the path itself."""
    path = Path(config.path).expanduser()
    return path / "train" if (path / "train").is_dir() else path


def _val_path(config: DataConfig) -> Path | None:
    """The validation images: as configured, else by the customary names; None where there are none."""
    if config.val_path:
        return Path(config.val_path).expanduser()
    path = _train_path(config)
    parent = path.parent if path.name == "train" else path
    return next((parent / name for name in _VAL_NAMES if (parent / name).is_dir()), None)


@overload
def open_source(config: DataConfig, split: Literal["train"] = "train") -> Source: ...


@overload
def open_source(config: DataConfig, split: Literal["val"]) -> Source | None: ...


def open_source(config: DataConfig, split: Split = "train") -> Source | None:
    """Open the images that a run trains on or is validated on.

    Args:
        config: Paths and kinds.
        split: "train" or "val".

    Returns:
        The source; its length, labels and names are known, no image has been read. None if there is no validation
        split: no `val_path`, and no folder `val` in `path` or beside it.

    Raises:
        DataError: In one line, if the data is not there or not laid out as expected.
    """
    if config.source == "demo":
        return TarSource(_shards(demo_folder() / split))
    if config.source == "replay":
        if split == "val":  # a benchmark has no accuracy
            return None
        if config.path:
            return ReplaySource(_open_path(_train_path(config), "auto"), config.replay_batches)
        logger.warning("replaying synthetic images: no --data.path was given")
        return ReplaySource(SyntheticSource(), config.replay_batches)
    if not config.path:
        raise DataError("no data was named; expected --data.path <folder, shards or list>, or --data.source demo")
    if split == "train":
        return _open_path(_train_path(config), config.source)
    path = _val_path(config)
    return None if path is None else _open_path(path, "auto")
