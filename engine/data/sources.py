"""Open the data that a configuration names.

Opening checks that the path, the layout and the labels make sense, so that a wrong path is one line of text before any
GPU is touched.
"""

import glob
from pathlib import Path
from typing import Literal, TypeAlias

from .config import DataConfig, SourceKind
from .demo import demo_folder
from .faults import DataError
from .files import open_folder, open_list
from .replay import ReplaySource, SyntheticSource
from .source import Source
from .tar import TarSource

Split: TypeAlias = Literal["train", "val"]

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


def _split_path(config: DataConfig, split: Split) -> Path | None:
    """The path of a split: as configured, else by the customary folder names; None where there is no such split."""
    path = Path(config.path).expanduser()
    if split == "train":
        return path / "train" if (path / "train").is_dir() else path
    if config.val_path:
        return Path(config.val_path).expanduser()
    parent = path.parent if path.name == "train" else path
    return next((parent / name for name in _VAL_NAMES if (parent / name).is_dir()), None)


def open_source(config: DataConfig, split: Split = "train") -> Source:
    """Open the images that a run trains on or is validated on.

    Args:
        config: Paths and kinds.
        split: "train" or "val".

    Returns:
        The source; its length, labels and names are known, no image has been read.

    Raises:
        DataError: In one line, if the data is not there or not laid out as expected.
    """
    if config.source == "demo":
        return TarSource(_shards(demo_folder() / split))
    if config.source == "replay" and not config.path:
        return ReplaySource(SyntheticSource(), config.replay_batches)
    if not config.path:
        raise DataError("no data was named; expected --data.path <folder, shards or list>, or --data.source demo")
    path = _split_path(config, split)
    if path is None:
        raise DataError(
            f"{config.path} has no validation images; expected a folder `val` in it or beside `train`: "
            "set --data.val_path"
        )
    if config.source == "replay":
        return ReplaySource(_open_path(path, "auto"), config.replay_batches)
    return _open_path(path, config.source)


def has_validation(config: DataConfig) -> bool:
    """Whether `open_source(config, "val")` has something to open."""
    if config.source == "demo":
        return True
    return bool(config.path) and config.source != "replay" and _split_path(config, "val") is not None
