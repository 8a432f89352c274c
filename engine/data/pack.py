"""Tools for whole data sets: write one as tar shards, look through one for trouble."""

import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .cache import available_threads, replacing_folder
from .faults import DataError
from .pillow import decode
from .reader import DecodeError, image_size
from .shards import Member, write_shards
from .source import Source

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (samples done, samples in all) after each sample."""

# Lengths of the shorter side, in pixels, that separate the bars of a histogram: usual sizes of images and crops.
_EDGES = (32, 64, 128, 224, 256, 384, 512, 768, 1024)


def pack(source: Source, output: Path | str, *, shard_bytes: int = 1 << 30, progress: Progress | None = None) -> int:
    """Write a source as tar shards in the layout of webdataset.

    The encoded images are copied as they are, bad ones included, in the order of the source; the same source gives the
    same bytes. The folder appears under its name once everything in it is on the disk.

    Args:
        source: What to pack.
        output: Folder to make; must not exist, or be empty.
        shard_bytes: A shard is closed once it is at least this large.
        progress: Called after each sample.

    Returns:
        Number of samples.

    Raises:
        DataError: If the folder is in use, or a file cannot be read.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(f"{output} exists; expected a new or empty folder to pack into: choose another or remove it")

    def members() -> Iterator[Member]:
        for index in range(len(source)):
            name = source.name(index)
            try:
                data = source.read(index)
            except OSError as error:
                raise DataError(
                    f"{name} cannot be read ({error}); expected a readable file: fix or remove it"
                ) from error
            yield Member(name, data, source.label(index))
            if progress is not None:
                progress(index + 1, len(source))

    with replacing_folder(output) as temporary:
        return write_shards(members(), temporary, classes=source.classes, shard_bytes=shard_bytes)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `check` found."""

    samples: int
    """Number of samples, bad ones included."""
    encoded_bytes: int
    """Size of all encoded images."""
    classes: dict[str, int]
    """Samples per class; empty for unlabelled data."""
    shorter_sides: dict[str, int]
    """Histogram of the shorter side in pixels, from small to large; bars without samples are left out."""
    bad: dict[str, str]
    """File name to reason, in the order of the source."""

    def __str__(self) -> str:
        mean = self.encoded_bytes / max(self.samples, 1) / 1000
        lines = [f"{self.samples:,} samples, {self.encoded_bytes / 1e9:.2f} GB, {mean:.1f} kB each"]
        if self.classes:
            counts = self.classes.values()
            lines.append(f"{len(self.classes):,} classes with {min(counts):,} to {max(counts):,} samples")
        lines.append("shorter side in pixels:")
        lines += [f"  {label:>9} {count:>12,}" for label, count in self.shorter_sides.items()]
        lines.append(f"{len(self.bad):,} files cannot be decoded" + (":" if self.bad else ""))
        lines += [f"  {name}: {reason}" for name, reason in self.bad.items()]
        return "\n".join(lines)


def _bar(side: int) -> str:
    place = bisect.bisect_right(_EDGES, side)
    if place == len(_EDGES):
        return f">={_EDGES[-1]}"
    return f"{_EDGES[place - 1] if place else 1}-{_EDGES[place] - 1}"


def check(source: Source, *, threads: int = 0, progress: Progress | None = None) -> Report:
    """Read and decode every image of a source.

    Args:
        source: What to look through.
        threads: Decoding threads; 0 for the cores that this process may use.
        progress: Called after each sample.

    Returns:
        Counts, sizes, and the files that cannot be decoded. Decoding is Pillow's, which is the stricter one: it also
        refuses images with damage inside that DALI decodes to wrong pixels.
    """

    def examine(index: int) -> tuple[int, int, str]:
        """Encoded size, shorter side, and what is wrong."""
        data = b""
        try:
            data = source.read(index)
            side = min(image_size(data))
            decode(data)
        except (OSError, DecodeError) as error:
            return len(data), 0, str(error)
        return len(data), side, ""

    sides: Counter[int] = Counter()
    labels: Counter[int] = Counter()
    bad: dict[str, str] = {}
    total = 0
    with ThreadPoolExecutor(threads or available_threads()) as pool:
        for start in range(0, len(source), 1024):  # in pieces, so that results do not pile up
            piece = range(start, min(start + 1024, len(source)))
            for index, (size, side, reason) in zip(piece, pool.map(examine, piece), strict=True):
                total += size
                if reason:
                    bad[source.name(index)] = reason
                else:
                    sides[side] += 1
                label = source.label(index)
                if label is not None:
                    labels[label] += 1
                if progress is not None:
                    progress(index + 1, len(source))
    bars: Counter[str] = Counter()
    for side in sorted(sides):
        bars[_bar(side)] += sides[side]
    classes = {name: labels[number] for number, name in enumerate(source.classes or ())}
    return Report(samples=len(source), encoded_bytes=total, classes=classes, shorter_sides=dict(bars), bad=bad)
