"""The global sample order: a pure function of seed, epoch and position.

Every epoch has one permutation of the whole data set. Step s of an epoch takes positions s*G up to (s+1)*G, with
G = micro_batch * accumulation * world, and leaves out the rest that fills no batch. Micro-batch a of rank r takes
s*G + (a*world + r)*micro_batch + i. So a global batch is the same set of samples for any split over ranks and
accumulation, and training resumes at any step without a loader state.

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): any
(epoch, position, view) has its own stream, at the cost of setting a counter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .faults import DataError

# The second word of the 128-bit key keeps the two uses of one seed apart.
_ORDER, _AUGMENTATION = 1, 2


def _philox(seed: int, purpose: int, counter: tuple[int, int, int, int]) -> np.random.Philox:
    return np.random.Philox(key=np.array((seed, purpose), np.uint64), counter=np.array(counter, np.uint64))


# Two epochs, because reading ahead crosses the boundary between them.
@lru_cache(maxsize=2)
def permutation(length: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch.

    Sorting raw generator words, rather than `Generator.permutation`, keeps the order the same for every NumPy: only
    the bit generators' streams are guaranteed across versions.

    Args:
        length: Number of samples.
        seed: The run's seed, at least 0.
        epoch: Epoch number, from 0.

    Returns:
        [length], int64, read-only: the sample at each position.
    """
    words = _philox(seed, _ORDER, (0, 0, 0, epoch)).random_raw(length)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def sample_rng(seed: int, epoch: int, position: int, view: int) -> np.random.Generator:
    """The random generator that draws one view of the sample at one position of one epoch."""
    # The lowest counter word is left to count the draws.
    return np.random.Generator(_philox(seed, _AUGMENTATION, (0, view, position, epoch)))


def candidates(order: npt.NDArray[np.int64], position: int) -> Iterator[int]:
    """Sample indices for a position: the one it holds, then its substitutes, should that one be unusable.

    Substitutes are looked for from half an epoch away: the neighbours are in the same batch already, where a
    contrastive loss would take the same image twice for two different ones.

    Args:
        order: An epoch's permutation.
        position: Position within the epoch.

    Yields:
        Every sample at least once.
    """
    length = len(order)
    yield int(order[position])
    for step in range(length):
        yield int(order[(position + length // 2 + step) % length])


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which samples each rank takes at each step.

    Raises:
        DataError: If one global batch needs more samples than there are.
    """

    length: int
    """Number of samples in the data set."""
    micro_batch: int
    """Samples per forward pass of one rank."""
    accumulation: int
    """Micro-batches per step."""
    rank: int
    """This process, from 0."""
    world: int
    """Number of processes."""
    seed: int
    """The run's seed."""

    def __post_init__(self) -> None:
        if self.length < self.global_batch:
            raise DataError(
                f"the data set has {self.length} samples; expected at least one global batch of {self.global_batch} "
                f"({self.micro_batch} per rank x {self.accumulation} accumulated x {self.world} ranks): "
                "lower the batch size or add data"
            )

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.micro_batch * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.length // self.global_batch

    def epoch(self, step: int) -> int:
        """The epoch that a step of the run (counted from 0 over all epochs) belongs to."""
        return step // self.steps_per_epoch

    def positions(self, step: int, micro: int) -> range:
        """Positions within the epoch that this rank takes for micro-batch `micro` of a step of the run."""
        start = (step % self.steps_per_epoch) * self.global_batch
        start += (micro * self.world + self.rank) * self.micro_batch
        return range(start, start + self.micro_batch)
