"""Launch configurations: what a kernel may be launched with, and what `tune` measured to be fastest on this GPU.

Nothing is measured here. A launcher asks its `Tunable` for a configuration; the answer comes from the file that
`python -m vitrail.kernels tune` wrote for this GPU (exact key, else the nearest), or else is the default, which the
ahead-of-time gate has proven not to spill. docs/tuning.md says what is tuned and why the rest is not.
"""

import functools
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .flags import CONFIGS

PACKAGE = Path(__file__).parent
MAX_DISTANCE = 2  # powers of two that an entry's sizes may lie away, all sizes together: a factor of 4
MAE_SIZES = tuple(itertools.product((16, 14), (64, 256)))  # patch and batch of what is tuned: ViT-S, B, L and ViT-H

Config = dict[str, int]
Key = dict[str, Any]  # dtypes by name, switches, sizes as powers of two

log = logging.getLogger("vitrail.kernels")


def gpu_slug(name: str) -> str:
    """Returns a GPU's name as a file name: `NVIDIA H100 80GB HBM3` is `h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"^(nvidia|amd)\s+", "", name.strip().lower())).strip("-")


def combinations(**axes: tuple[int, ...]) -> tuple[Config, ...]:
    """Returns every combination of the given values."""
    return tuple(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def bucket(size: int) -> int:
    """Returns the power of two nearest to `size` in ratio."""
    return 1 << round(math.log2(max(size, 1)))


@dataclass(frozen=True, eq=False)
class Tunable:
    """A kernel whose launch configuration may be chosen.

    Attributes:
        op: Name of its op, which is that of its folder.
        kernel: Name of the `triton.jit` function in the op's kernel module.
        default: The configuration of a launch that nothing better is known for.
        candidates: The configurations that may replace it, and itself.
        exact: Names of what must equal for a measurement to hold: dtypes, layout, compile-time switches.
        sizes: Names of the sizes, of which the nearest measured ones do.
    """

    op: str
    kernel: str
    default: Config
    candidates: tuple[Config, ...]
    exact: tuple[str, ...]
    sizes: tuple[str, ...]

    def config(self, device: torch.device, exact: tuple[Any, ...], sizes: tuple[int, ...]) -> Config:
        """Returns the configuration of a launch, at the cost of about a microsecond. The caller must not change it.

        Args:
            device: Of the tensors. On any but a CUDA device the answer is the default.
            exact: Values of `self.exact`, in its order.
            sizes: Values of `self.sizes`, in its order.
        """
        if _forced and (self.op, self.kernel) in _forced:
            config, keys = _forced[self.op, self.kernel]
            keys.append(self.key(exact, sizes))
            return config
        if device.type != "cuda":
            return self.default
        return _remembered(self, device, exact, sizes)

    def key(self, exact: tuple[Any, ...], sizes: tuple[int, ...]) -> Key:
        """Returns the key of a launch as it stands in a file: dtypes by name, sizes as powers of two."""
        values = (str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for v in exact)
        buckets = map(bucket, sizes)
        return dict(zip((*self.exact, *self.sizes), (*values, *buckets), strict=True))

    def distance(self, left: Key, right: Key) -> float:
        """Returns how many powers of two the sizes of two keys are apart in all; infinity for different launches."""
        if any(left[name] != right[name] for name in self.exact):
            return math.inf
        return sum(abs(math.log2(left[name] / right[name])) for name in self.sizes)

    def fault(self, entry: dict[str, Any]) -> str | None:
        """Returns why an entry of a file cannot be used, or None."""
        key, config = entry.get("key"), entry.get("config")
        if not isinstance(key, dict) or key.keys() != {*self.exact, *self.sizes}:
            return f"its key {key} does not name {', '.join((*self.exact, *self.sizes))}"
        if not all(isinstance(key[name], int) and key[name] > 0 for name in self.sizes):
            return f"the sizes of its key {key} are not positive integers"
        if not isinstance(config, dict) or config.keys() != self.default.keys():
            return f"its config {config} does not set {', '.join(self.default)}"
        if config not in self.candidates:
            return f"its config {config} is not among the kernel's candidates"
        return None


_forced: dict[tuple[str, str], tuple[Config, list[Key]]] = {}


@contextmanager
def forced(tunable: Tunable, config: Config) -> Iterator[list[Key]]:
    """Makes every launch of one kernel take `config`, for the tuner and for tests; collects the keys asked for."""
    name = (tunable.op, tunable.kernel)
    before = dict(_forced)
    _forced[name] = (config, [])
    try:
        yield _forced[name][1]
    finally:
        _forced.clear()
        _forced.update(before)


def lookup(tunable: Tunable, gpu: str, exact: tuple[Any, ...], sizes: tuple[int, ...]) -> Config:
    """Returns the configuration for a launch on a GPU of the name `gpu`: measured, of the nearest sizes, or default."""
    folder = source()
    if folder is None:
        return tunable.default
    wanted = tunable.key(exact, sizes)
    nearest, config = math.inf, tunable.default
    for key, candidate in _entries(tunable, config_file(folder, tunable.op, gpu)):
        distance = tunable.distance(key, wanted)
        if distance <= MAX_DISTANCE and distance < nearest:
            nearest, config = distance, candidate
    return config


def config_file(folder: Path, op: str, gpu: str) -> Path:
    """Returns where the configurations of an op for a GPU of the name `gpu` are kept under `folder`."""
    return folder / op / "configs" / f"{gpu_slug(gpu)}.json"


@functools.cache
def source() -> Path | None:
    """Returns the folder that configurations are read from, or None if they are switched off. Read once."""
    value = os.environ.get(CONFIGS.name, CONFIGS.default)
    if value == "default":
        return None
    if value == "tuned":
        return PACKAGE
    if not Path(value).is_dir():
        log.warning(
            "%s=%s is neither tuned, nor default, nor a folder: launches take the defaults", CONFIGS.name, value
        )
        return None
    return Path(value)


def forget() -> None:
    """Drops everything that was read, so that the next launch reads the flag and the files again."""
    for cached in (source, _read, _entries, _remembered):
        cached.cache_clear()


@functools.lru_cache(maxsize=4096)
def _remembered(tunable: Tunable, device: torch.device, exact: tuple[Any, ...], sizes: tuple[int, ...]) -> Config:
    return lookup(tunable, torch.cuda.get_device_name(device), exact, sizes)


@functools.cache
def _entries(tunable: Tunable, path: Path) -> list[tuple[Key, Config]]:
    """Returns the usable entries of a kernel in a file; warns of the others, once."""
    entries = [entry for entry in _read(path) if entry.get("kernel") == tunable.kernel]
    faults = [fault for entry in entries if (fault := tunable.fault(entry))]
    if faults:
        log.warning(
            "%s: %d of %d entries for %s are ignored, the first because %s; %s",
            path,
            len(faults),
            len(entries),
            tunable.kernel,
            faults[0],
            _remedy(path),
        )
    # The candidate, not the equal dict of the file: 4.0 equals 4, and is no tile size.
    known = tunable.candidates
    return [(entry["key"], known[known.index(entry["config"])]) for entry in entries if not tunable.fault(entry)]


@functools.cache
def _read(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a file: none if there is no such file, or, with a warning, if it cannot be used."""
    try:
        return parse(path.read_text(), path.stem)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("%s is ignored: %s; launches take the defaults; %s", path, error, _remedy(path))
        return []


def parse(text: str, slug: str) -> list[dict[str, Any]]:
    """Reads the text of a file named `slug`.json.

    Returns:
        Its entries, unchecked.

    Raises:
        ValueError: The text is not JSON, has no entries, or was measured on another GPU.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or not isinstance(document.get("gpu"), str):
        raise ValueError("it does not name a GPU")
    if gpu_slug(document["gpu"]) != slug:
        raise ValueError(f"it was measured on {document['gpu']}, whose file is {gpu_slug(document['gpu'])}.json")
    entries = document.get("entries")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("it holds no list of entries")
    return entries


def _remedy(path: Path) -> str:
    return f"delete it, or write it anew with python -m vitrail.kernels tune {path.parents[1].name}"
