"""What a run says about its data."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from .faults import DataError

SourceKind: TypeAlias = Literal["auto", "folder", "tar", "list", "demo", "replay"]
DecoderKind: TypeAlias = Literal["auto", "gpu", "cpu", "pillow"]


@dataclass(kw_only=True)
class DataConfig:
    """Where the images come from and how they are read."""

    path: str = ""
    """Training images: a folder of images, a folder or pattern of .tar shards, or a text file of paths."""
    val_path: str = ""
    """Validation images in any of the same forms; where unset, the `val` folder inside `path`, if there is one."""
    source: SourceKind = "auto"
    """What `path` is; auto looks. demo is the bundled set of digits, replay repeats a few batches for benchmarks."""
    decoder: DecoderKind = "auto"
    """Where DALI decodes: auto takes the device of the training. pillow does without DALI; so does auto on a CPU where
    views change colours."""
    threads: int = 0
    """Threads per process for reading and decoding; 0 shares this machine's cores among its processes."""
    prefetch: int = 2
    """Micro-batches decoded ahead; as many again are read ahead."""
    replay_batches: int = 8
    """Micro-batches that the replay source holds on the device."""

    def __post_init__(self) -> None:
        for name, least in (("threads", 0), ("prefetch", 1), ("replay_batches", 1)):
            value = getattr(self, name)
            if value < least:
                raise DataError(f"--data.{name} is {value}; expected at least {least}")
