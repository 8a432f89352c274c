"""Gradient caching: the loss of a whole batch, its backbone run over one micro-batch at a time.

Accumulating gradients over micro-batches cannot replace a large batch where images are compared with each other: each
micro-batch would have its own, fewer negatives and its own batch statistics. Gradient caching (Gao et al.,
arXiv 2101.06983) gives the exact gradient in the memory of a micro-batch, for one more forward pass of the backbone:

1. features of all micro-batches, without a graph;
2. heads and loss on all of them, for the loss's gradient to the features;
3. the backbone again, one micro-batch at a time, sending its part of that gradient back, and the heads once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import Batch
from ..methods.base import Method, Schedule
from ..methods.joint import Cached, Encoded, JointEmbedding
from ..models.batch_norm import BatchNorm, settle_statistics
from .config import ConfigError, RunConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def compared_images(config: RunConfig, world: int) -> int:
    """Images that one loss sees: the global batch, or a micro-batch of all ranks where gradients are accumulated."""
    return config.train.batch_size if config.train.grad_cache else config.train.micro_batch * world


def check_comparisons(method: Method, config: RunConfig, world: int) -> str | None:
    """Refuse to let accumulation change a loss that compares images, unless it is asked for by number.

    Returns:
        What a reader of the run must know: accumulation was asked for, and the loss sees part of the batch.

    Raises:
        ConfigError: it was not asked for; or gradients are to be cached of a method that cannot be cached.
    """
    train, name = config.train, type(method).__name__
    if train.grad_cache:
        _check_cachable(method, name)
    accumulation, seen = config.accumulation(world), compared_images(config, world)
    compares = method.compares_images or isinstance(method, JointEmbedding)
    if train.grad_cache or accumulation == 1 or not compares:
        return None
    told = (
        f"{accumulation} micro-batches are accumulated: {name} sees {seen} images at a time, not {train.batch_size}, "
        "in its batch statistics" + (" and in what it compares images with" if method.compares_images else "")
    )
    if method.compares_images and train.accumulation is None:
        cachable = isinstance(method, JointEmbedding) and not _has_batch_norm(method)
        caching = "--train.grad-cache, or " if cachable else ""
        raise ConfigError(
            f"{told}; pass {caching}--train.micro-batch {train.batch_size // world} if memory allows, or take more "
            f"GPUs, or --train.accumulation {accumulation} to accept it"
        )
    return told


def _check_cachable(method: Method, name: str) -> None:
    if not isinstance(method, JointEmbedding):
        raise ConfigError(
            f"train.grad_cache is for losses on two views, and {name} looks at each image alone: "
            "pass --train.no-grad-cache"
        )
    if _has_batch_norm(method):
        raise ConfigError(
            f"train.grad_cache cannot run {name} on a backbone with batch normalisation, whose statistics would be "
            "those of a micro-batch: pass --train.no-grad-cache, and more ranks or a smaller batch"
        )


def _has_batch_norm(method: JointEmbedding) -> bool:
    return any(isinstance(module, BatchNorm) for module in method.encoder.modules())


class GradientCache:
    """Losses of the micro-batches of a step, whose gradients add up to that of the whole batch's loss."""

    def __init__(self, method: Method, engine: DeepSpeedEngine, precision: str) -> None:
        """Take a method that `check_comparisons` has passed."""
        assert isinstance(method, JointEmbedding)
        self.method, self.engine = method, engine
        self.autocast = precision == "bf16"
        # DeepSpeed reduces a step's gradients with its last micro-batch, of those parameters that have one then; stage
        # 3 does with every one, but what the first leaves untouched keeps the gradient of the step before.
        self.with_heads = 0 if engine.zero_optimization_stage() == 3 else engine.gradient_accumulation_steps() - 1

    def losses(
        self, batches: Sequence[Batch], schedules: Sequence[Schedule]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Run all parts of a step; send each loss back before asking for the next one.

        Args:
            batches: micro-batches of this rank.
            schedules: where they stand.

        Yields:
            For each micro-batch a loss whose gradient, averaged over the micro-batches as DeepSpeed does, is its part
            of the whole loss's, and metrics of the whole batch.
        """
        states = []
        with torch.autocast(batches[0].views[0].device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                encoded = []
                for batch, schedule in zip(batches, schedules, strict=True):
                    states.append(_random_state(batch))
                    encoded.append(self.method.encode(batch, schedule))
            whole = _concatenated(encoded)
            del encoded
            loss, metrics = self.method.criterion(whole, schedules[self.with_heads])
        (gradient,) = torch.autograd.grad(loss, whole.student)
        whole.student.requires_grad_(False)
        settle_statistics(self.method, applied=False)  # the heads will see the same batch again
        first = 0
        for number, (batch, schedule) in enumerate(zip(batches, schedules, strict=True)):
            count = len(batch.indices)
            cached = Cached(gradient[:, first : first + count], whole if number == self.with_heads else None)
            first += count
            with torch.random.fork_rng(devices=_devices(batch)):
                _restore(states[number])
                part, _ = self.engine(batch, schedule, cached)
            yield part * len(batches), metrics


def _concatenated(parts: Sequence[Encoded]) -> Encoded:
    """The features of all micro-batches, those of the student as a leaf that gradients stop at."""
    student = torch.cat([part.student for part in parts], dim=1).requires_grad_()
    teachers = [part.teacher for part in parts if part.teacher is not None]
    return Encoded(student, torch.cat(teachers, dim=1) if teachers else None)


def _devices(batch: Batch) -> list[torch.device]:
    device = batch.views[0].device
    return [device] if device.type == "cuda" else []


def _random_state(batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """State of the generators that a forward pass may draw from: stochastic depth must drop the same blocks twice."""
    return torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in _devices(batch)]


def _restore(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state(state[1][0])
