"""Loaders: endless shuffled training batches, and one ordered pass for evaluation."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .batch import Batch, Loader
from .cache import available_threads
from .config import DataConfig
from .faults import BadFiles, DataError
from .order import Order, candidates, permutation
from .pillow import PillowDecoder
from .reader import Reader, Sample, Slot
from .replay import ReplayLoader, ReplaySource
from .source import Source
from .stream import Decoder, Stream
from .views import ColorJitter, GaussianBlur, RandomGrayscale, Solarize, View

logger = logging.getLogger("vitrail.data")

_COLOURS = (ColorJitter, RandomGrayscale, GaussianBlur, Solarize)


def _resolve(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device == torch.device("cuda"):  # of no particular index
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _decoder(config: DataConfig, views: Sequence[View], *, batch: int, device: torch.device, threads: int) -> Decoder:
    kind, prefetch = config.decoder, config.prefetch
    if kind == "auto" and device.type == "cpu" and any(isinstance(op, _COLOURS) for view in views for op in view.ops):
        kind = "pillow"
        logger.info("decoding with Pillow, which changes colours for less of the CPU's time: --data.decoder auto")
    if kind == "pillow":
        return PillowDecoder(views, device=device, threads=threads, prefetch=prefetch)
    if kind == "gpu" and device.type != "cuda":
        raise DataError(
            f"--data.decoder gpu was asked for but the batches are wanted on {device}; expected a CUDA device"
        )
    from .dali import DaliDecoder  # only here: DALI need not be installed for anything else

    on_gpu = device.type == "cuda" and kind != "cpu"
    return DaliDecoder(views, batch=batch, device=device, on_gpu=on_gpu, threads=threads, prefetch=prefetch)


class _Pass:
    """What the loaders share: a source, a stream that decodes it, and the making of batches."""

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        batch: int,
        seed: int,
        device: torch.device | str,
        config: DataConfig,
    ) -> None:
        self._source = source
        self._device = _resolve(device)
        self._bad = BadFiles(len(source))
        threads = config.threads or available_threads()
        self._stream = Stream(
            Reader(source, views, seed, self._bad),
            _decoder(config, views, batch=batch, device=self._device, threads=threads),
            threads=threads,
            prefetch=config.prefetch,
        )

    @property
    def bad_files(self) -> Mapping[str, str]:
        """File name to reason, for every file that this process could not use so far."""
        return self._bad.reasons

    def close(self) -> None:
        """Stop reading ahead and release threads and memory."""
        self._stream.close()

    def _batch(self, samples: Sequence[Sample], views: list[Tensor], *, epoch: int, step: int, micro: int) -> Batch:
        indices = [sample.index for sample in samples]
        labels = None
        if self._source.classes is not None:
            labels = torch.tensor([self._source.label(index) for index in indices])
            if self._device.type == "cuda":
                labels = labels.pin_memory().to(self._device, non_blocking=True)
        return Batch(views=views, labels=labels, indices=torch.tensor(indices), epoch=epoch, step=step, micro=micro)


class TrainingLoader(_Pass):
    """Endless micro-batches in the global order. See `build_loader`."""

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        order: Order,
        *,
        device: torch.device | str,
        config: DataConfig,
        start_step: int,
    ) -> None:
        super().__init__(
            source,
            views,
            batch=order.micro_batch,
            seed=order.seed,
            device=device,
            config=config,
        )
        self._order = order
        self._start_step = start_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return self._order.steps_per_epoch

    def _places(self) -> Iterator[tuple[int, int]]:
        """(step, micro-batch) from the first step on."""
        step = self._start_step
        while True:
            for micro in range(self._order.accumulation):
                yield step, micro
            step += 1

    def _slots(self) -> Iterator[list[Slot]]:
        for step, micro in self._places():
            epoch = self._order.epoch(step)
            order = permutation(self._order.length, self._order.seed, epoch)
            yield [
                Slot(epoch, position, partial(candidates, order, position))
                for position in self._order.positions(step, micro)
            ]

    def __iter__(self) -> Iterator[Batch]:
        for (step, micro), (samples, views) in zip(self._places(), self._stream.run(self._slots()), strict=False):
            yield self._batch(samples, views, epoch=self._order.epoch(step), step=step, micro=micro)


def build_loader(
    source: Source,
    views: Sequence[View],
    *,
    micro_batch: int,
    accumulation: int,
    rank: int,
    world: int,
    seed: int,
    device: torch.device | str,
    config: DataConfig | None = None,
    start_step: int = 0,
) -> Loader:
    """Build the training loader of one rank.

    The samples and pixels of a global batch depend on the seed, the step and `micro_batch * accumulation * world` only,
    and on nothing that was read before: not on the split over ranks, the threads, or where the run was resumed.

    Args:
        source: What `open_source` returned.
        views: The views of every sample.
        micro_batch: Samples per forward pass of one rank.
        accumulation: Micro-batches per step.
        rank: This process, from 0.
        world: Number of processes.
        seed: The run's seed, at least 0.
        device: Where the batches are wanted.
        config: Its decoder, threads and prefetch are used; None for the defaults.
        start_step: First step, counted from 0 over all epochs.

    Returns:
        A loader whose iteration never ends.

    Raises:
        DataError: If there are fewer samples than a global batch needs, or the decoder is not there. While iterating:
            if most files are bad.
    """
    order = Order(
        length=len(source), micro_batch=micro_batch, accumulation=accumulation, rank=rank, world=world, seed=seed
    )
    replay = isinstance(source, ReplaySource)
    loader = TrainingLoader(
        source,
        views,
        order,
        device=device,
        config=replace(config or DataConfig(), decoder="pillow") if replay else config or DataConfig(),
        start_step=start_step,
    )
    if isinstance(source, ReplaySource):
        return ReplayLoader(loader, batches=source.batches, accumulation=accumulation, start_step=start_step)
    return loader


class EvaluationPass(_Pass):
    """One ordered pass over a source. See `evaluation_batches`."""

    def __init__(
        self,
        source: Source,
        view: View,
        indices: Sequence[int],
        *,
        batch: int,
        device: torch.device | str,
        config: DataConfig,
    ) -> None:
        super().__init__(source, [view], batch=batch, seed=0, device=device, config=config)
        self._indices = indices
        self._size = batch

    def __len__(self) -> int:
        """Number of batches, should no file be bad."""
        return math.ceil(len(self._indices) / self._size)

    def _slots(self) -> Iterator[list[Slot]]:
        for start in range(0, len(self._indices), self._size):
            chunk = self._indices[start : start + self._size]
            yield [Slot(0, index, partial(tuple, (index,))) for index in chunk]

    def __iter__(self) -> Iterator[Batch]:
        for number, (samples, views) in enumerate(self._stream.run(self._slots())):
            yield self._batch(samples, views, epoch=0, step=number, micro=0)


def evaluation_batches(
    source: Source,
    view: View,
    *,
    batch: int,
    rank: int,
    world: int,
    device: torch.device | str,
    limit: int | None = None,
    config: DataConfig | None = None,
) -> EvaluationPass:
    """Build one pass over a source, for features and scores.

    Every sample comes once, on one rank, in the order of the source; batches may be short where samples are left over
    or bad. Ranks may differ by a batch: gather after the pass, not within it. What a view has of chance is the same in
    every pass.

    Args:
        source: What `open_source` returned.
        view: The view of every sample.
        batch: Samples per batch of one rank.
        rank: This process, from 0. It takes every `world`-th sample.
        world: Number of processes.
        device: Where the batches are wanted.
        limit: Take this many samples instead of all; always the same random ones, since sources are often sorted by
            class.
        config: As for `build_loader`.

    Returns:
        An iterable of batches with a length and with `bad_files`.
    """
    indices = np.arange(len(source))
    if limit is not None and limit < len(source):
        indices = np.sort(permutation(len(source), 0, 0)[:limit])
    return EvaluationPass(
        source,
        view,
        indices[rank::world].tolist(),
        batch=batch,
        device=device,
        config=config or DataConfig(),
    )
