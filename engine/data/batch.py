"""What a loader hands to the training loop."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .views import View


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank.

    On a GPU its tensors belong to the stream that was current when the batch was yielded.
    """

    views: list[Tensor]
    """One uint8 tensor [b, height, width, 3] per view, RGB, on the loader's device.

    Views of equal size lie one behind the other in one piece of memory, so that they are one batch without a copy.
    """
    labels: Tensor | None
    """[b], int64, on the loader's device; None for unlabelled data."""
    indices: Tensor
    """[b], int64, on the CPU: the samples' numbers in the source."""
    epoch: int
    """Epoch of the run, from 0."""
    step: int
    """Step of the run, from 0 over all epochs; in an evaluation pass, the batch's number."""
    micro: int
    """Micro-batch of the step, from 0."""


class Loader(Protocol):
    """Micro-batches without end, from a given step on."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""

    @property
    def bad_files(self) -> Mapping[str, str]:
        """File name to reason, for every file that this process could not use so far."""

    def __iter__(self) -> Iterator[Batch]:
        """Start over from the loader's first step."""

    def close(self) -> None:
        """Stop reading ahead and release threads and memory."""


def by_size(views: Sequence[View]) -> list[list[int]]:
    """Numbers of the views of each size, both in the order in which they come."""
    numbers: dict[tuple[int, int], list[int]] = {}
    for number, view in enumerate(views):
        numbers.setdefault(view.size, []).append(number)
    return list(numbers.values())


def apart(images: Sequence[Tensor], numbers: Sequence[Sequence[int]]) -> list[Tensor]:
    """The views of a batch, none of them copied.

    Args:
        images: For each size the images of all its views, view by view, [views * b, height, width, 3].
        numbers: What `by_size` returned.

    Returns:
        One tensor [b, height, width, 3] per view, in the order of the views.
    """
    views: dict[int, Tensor] = {}
    for tensor, of_size in zip(images, numbers, strict=True):
        views.update(zip(of_size, tensor.unflatten(0, (len(of_size), -1)).unbind(), strict=True))
    return [views[number] for number in range(len(views))]
