"""What a method makes ready before the first step of a run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..data import DataConfig, Source, View, evaluation_batches
from ..methods.base import Method
from .config import ConfigError

BATCH = 64  # images at a time


def prepare(method: Method, source: Source, data: DataConfig, *, world: int, device: torch.device) -> None:
    """Let a method look at training images; all ranks see the same, and go on with rank 0's buffers. Collective.

    Args:
        method: on its device, in training.
        source: the training images.
        data: decoding options.
        world: number of processes.
        device: where the images go.

    Raises:
        ConfigError: the method cannot be made ready.
    """
    if type(method).prepare is Method.prepare:
        return

    def images(view: View, count: int) -> Iterator[Tensor]:
        for batch in evaluation_batches(
            source, view, batch=BATCH, rank=0, world=1, device=device, limit=count, config=data
        ):
            yield batch.views[0]

    try:
        method.prepare(images)
    except ValueError as error:
        raise ConfigError(f"{type(method).__name__} cannot be made ready: {error}") from error
    if world > 1:  # sums in another order differ in their last bits
        for buffer in method.buffers():
            torch.distributed.broadcast(buffer, 0)
