"""Replay: a few micro-batches that stay on the device, again and again.

With it a training step costs what it costs without any input pipeline: comparing a run on replay with a run on data
says which of the two is the bottleneck. No DALI is needed.
"""

import io
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from PIL import Image

from .batch import Batch, Loader
from .source import Source

logger = logging.getLogger("vitrail.data")

_SIDE = 256  # pixels of a synthetic image
_LENGTH = 1_281_167  # of ImageNet-1k's training set, so that schedules and epochs look as they would there


class SyntheticSource:
    """Noise, where there is no data: pixels of image i are drawn from a generator seeded with i."""

    classes = None
    fingerprint = "synthetic"

    def __len__(self) -> int:
        return _LENGTH

    def read(self, index: int) -> bytes:
        """A JPEG of noise."""
        # Coarse noise, enlarged: fine noise makes JPEG files larger than photographs.
        noise = np.random.default_rng(index).integers(0, 256, (_SIDE // 8, _SIDE // 8, 3), np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(noise).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(encoded, "JPEG")
        return encoded.getvalue()

    def label(self, index: int) -> None:
        """Noise has no label."""

    def name(self, index: int) -> str:
        """A name for messages."""
        return f"synthetic-{index}"


class ReplaySource:
    """Another source whose first micro-batches are to be repeated for ever.

    Args:
        source: What to take them from; asked for anything else, a replay source answers as this one does.
        batches: How many to take.
    """

    def __init__(self, source: Source, batches: int) -> None:
        self._source = source
        self.batches = batches
        self.classes = source.classes
        self.fingerprint = source.fingerprint
        self.read = source.read
        self.label = source.label
        self.name = source.name

    def __len__(self) -> int:
        return len(self._source)


class ReplayLoader:
    """Repeats the first micro-batches of another loader, which it then closes.

    Args:
        loader: Where the micro-batches come from.
        batches: How many to take.
        accumulation: Micro-batches per step.
        start_step: The step that the first batch is said to belong to.
    """

    def __init__(self, loader: Loader, *, batches: int, accumulation: int, start_step: int) -> None:
        self.steps_per_epoch = loader.steps_per_epoch
        self._accumulation = accumulation
        self._start_step = start_step
        self._batches = list(itertools.islice(loader, batches))
        self.bad_files: Mapping[str, str] = loader.bad_files
        loader.close()

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(itertools.cycle(self._batches)):
            step, micro = divmod(number, self._accumulation)
            step += self._start_step
            yield replace(batch, epoch=step // self.steps_per_epoch, step=step, micro=micro)

    def close(self) -> None:
        """Release the batches."""
        self._batches = []
