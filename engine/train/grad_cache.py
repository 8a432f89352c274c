"""Gradient caching: the loss of a whole batch, its backbone run over one micro-batch at a time.

Accumulating gradients over micro-batches cannot replace a large batch where images are compared with each other: each
micro-batch would have its own, fewer negatives and its own batch statistics. Gradient caching (Gao et al.,
arXiv 2101.06983) gives the exact gradient in the memory of a micro-batch, for one more forward pass of the backbone:

1. features of all micro-batches, without a graph;
2. heads and loss on all of them, and the loss's gradient to the features;
3. the backbone again, one micro-batch at a time, sending its part of that gradient back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ..data import Batch
from ..methods.base import Method, Schedule
from ..methods.joint import Cached, Encoded, JointEmbedding
from ..models.batch_norm import BatchNorm
from .config import ConfigError


class GradientCache:
    """Losses of the micro-batches of a step, whose gradients add up to that of the whole batch's loss."""

    def __init__(self, method: Method, engine: DeepSpeedEngine, *, precision: str) -> None:
        """Check that the method can be cached.

        Raises:
            ConfigError: its loss is that of each image alone, or its backbone looks at several images at once.
        """
        name = type(method).__name__
        if not isinstance(method, JointEmbedding):
            raise ConfigError(
                f"train.grad_cache is for losses that compare images, and {name}'s does not: pass --no-train.grad-cache"
            )
        if any(isinstance(module, BatchNorm) for module in method.encoder.modules()):
            raise ConfigError(
                f"train.grad_cache cannot run {name} on a backbone with batch normalisation, whose statistics would be "
                "those of a micro-batch: pass --no-train.grad-cache, and more ranks or a smaller batch"
            )
        self.method, self.engine = method, engine
        self.autocast = precision == "bf16"

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
            loss, metrics = self.method.criterion(whole, schedules[0])
        # The heads' own gradients wait for the last micro-batch: there DeepSpeed reduces what a step has gathered.
        (gradient,) = torch.autograd.grad(loss, whole.student, retain_graph=True)
        first = 0
        for number, (batch, schedule) in enumerate(zip(batches, schedules, strict=True), start=1):
            count = len(batch.indices)
            last = number == len(batches)
            cached = Cached(gradient[:, first : first + count], loss if last else None)
            first += count
            with torch.random.fork_rng(devices=_devices(batch)):
                _restore(states[number - 1])
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
