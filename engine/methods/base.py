"""What the trainer asks of a method, and what it tells the method at each step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.views import View


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where a micro-batch stands in the run."""

    step: int
    """Optimiser steps done."""
    total_steps: int
    """Optimiser steps of the whole run."""
    epoch: float
    """Epochs done, fractional."""
    seed: int
    """Seed of the run."""
    first_row: int
    """Place of this micro-batch's first sample in the global batch."""
    global_rows: int
    """Size of the global batch."""

    def uniform(self, rows: int, columns: int, device: torch.device, *, stream: int = 0) -> Tensor:
        """Draw U[0, 1) noise that depends on the sample's place in the global batch and on nothing else.

        The noise of the whole global batch is drawn from a generator seeded by the step, and this micro-batch's rows
        are returned: any number of ranks and any accumulation see the same masks, and resuming needs no state.

        Args:
            rows: samples of this micro-batch.
            columns: numbers for each sample.
            device: where to draw; the CPU and a GPU draw different numbers.
            stream: which of the step's draws this is, 0 to 127: a step that draws for several purposes numbers them.

        Returns:
            float32 `[rows, columns]` on `device`.
        """
        noise = self.uniform_everywhere(columns, device, stream=stream)
        return noise[self.first_row : self.first_row + rows]

    def uniform_everywhere(self, columns: int, device: torch.device, *, stream: int = 0) -> Tensor:
        """The noise of the whole global batch, float32 `[global_rows, columns]`, of which `uniform` returns a part."""
        generator = torch.Generator(device).manual_seed((stream << 56) + (self.seed << 32) + self.step)
        return torch.rand(self.global_rows, columns, generator=generator, device=device)


@dataclass(frozen=True)
class MomentumPair:
    """A network that follows another one as the exponential moving average of its weights.

    The trainer pairs the parameters of both by name; buffers, such as the statistics of BatchNorm, are not averaged.
    The teacher's parameters must be float32 and must not require gradients.
    """

    teacher: nn.Module
    """The network that follows."""
    student: nn.Module
    """The network that is trained; its frozen parameters are averaged as well."""
    student_only: tuple[str, ...] = ()
    """Names of the student's parameters that the teacher lacks, such as iBOT's mask token."""


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """Length and optimiser of a method's demo; the published ones hold for millions of images."""

    epochs: float = 12
    """Passes over the 12,000 images."""
    batch_size: int = 128
    """Images per step, over all ranks."""
    lr: float = 4e-3
    """Peak learning rate of the recipe's optimiser."""
    warmup_epochs: float = 1
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """Of that optimiser."""
    rival_share: float = 1.0
    """Length of the variants that are trained for comparison, over that of the demo itself."""


@dataclass(kw_only=True)
class MethodConfig(ABC):
    """Published defaults of a method; each method derives its own."""

    @abstractmethod
    def build(self) -> Method:
        """Construct the method with freshly initialised weights."""

    def missing(self) -> list[str]:
        """What a run needs beside images and does not find, each with its remedy; asked before a GPU is touched."""
        return []

    @abstractmethod
    def demo(self) -> MethodConfig:
        """The same method small enough for 32-pixel images and two CPU cores."""

    def demo_run(self) -> DemoRun:
        """How long and how fast the demo trains."""
        return DemoRun()

    def demo_rivals(self) -> dict[str, MethodConfig]:
        """Variants that a demo trains after the method itself, by name, for its report to compare; usually none."""
        return {}


class Method(nn.Module, ABC):
    """A self-supervised method: one module that turns a batch into a loss.

    It holds everything that is trained or updated (student, teacher, heads, queues) and knows nothing of DeepSpeed,
    DALI, loggers or the trainer.
    """

    compares_images = False
    """Whether the loss compares the images of a micro-batch with each other: accumulation then changes what it is."""

    compares_regions = False
    """Whether the loss compares parts of images with each other: their correspondence then tells what it learned."""

    @abstractmethod
    def views(self) -> list[View]:
        """The crops and augmentations that `forward` needs, as data."""

    @abstractmethod
    def forward(self, batch: Any, schedule: Schedule) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch.

        Args:
            batch: an object with `views`, uint8 tensors `[B, H, W, 3]` in the order of `views`.
            schedule: where the run stands.

        Returns:
            The scalar loss, and detached scalar tensors to log.
        """

    def prepare(self, images: Callable[[View, int], Iterator[Tensor]]) -> None:
        """Fill buffers that are neither trained nor drawn at random, such as a codebook.

        Called before the first step of a run that starts from no checkpoint; all ranks go on with what rank 0 found.

        Args:
            images: gives so many training images in a view, in batches uint8 `[b, H, W, 3]`, the same in every call.

        Raises:
            ValueError: they cannot be filled; with the remedy.
        """

    def momentum_pairs(self) -> list[MomentumPair]:
        """The teachers that the trainer updates after every applied step; none unless the method says otherwise."""
        return []

    def ema_momentum(self, taken: Schedule, coming: Schedule) -> float:
        """Momentum m of the teachers' update `teacher = m * teacher + (1 - m) * student` that follows a step.

        Args:
            taken: where the step just taken stood. DINO and its descendants take their momentum from it.
            coming: where the next step stands. MoCo v3 updates before it encodes the keys, with weights that the step
                has not changed yet: that is the update after the step before, with the momentum of the coming one.
        """
        raise NotImplementedError(f"{type(self).__name__} has momentum_pairs and must define ema_momentum")

    def unscheduled(self) -> list[nn.Module]:
        """Networks whose learning rate stays at its peak, such as SimSiam's predictor; none unless a method says so."""
        return []

    def lr_scales(self) -> list[tuple[float, Sequence[nn.Parameter]]]:
        """Factors of the learning rate with the parameters that they are for; all others follow the schedule itself."""
        return []

    def clip_groups(self) -> list[Sequence[nn.Parameter]]:
        """Parts whose gradients `optim.clip_per_part` clips each by a norm of its own; what is in none is one more."""
        return []

    def held(self) -> list[tuple[float, Sequence[nn.Parameter]]]:
        """Parameters that stay as they are in the first epochs, with the epoch of their release; none as a rule.

        Until then they are not decayed, the optimiser has no state of them, and their gradients count neither for the
        global norm nor for its clipping. Of several epochs for one parameter the last holds.
        """
        return []

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that the published code does not decay although they are no vectors, such as a class token."""
        return []

    def first_layer(self) -> list[nn.Parameter]:
        """Trained parameters of the layer next to the pixels, where instability shows first (arXiv 2104.02057, 4.1).

        The default is the first trained convolution or linear layer: the patch projection, or the first block's qkv
        where the projection is frozen.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                trained = [p for p in module.parameters(recurse=False) if p.requires_grad]
                if trained:
                    return trained
        return []

    def chance_loss(self, images: int) -> float | None:
        """Loss of a network to which all images look alike, None where no such number tells of a collapse.

        Args:
            images: images that a loss compares: a micro-batch of all ranks, or the global batch.
        """
        return None

    def after_step(self, applied: bool) -> None:
        """Update state outside the optimiser (queue, centre), only if the step was applied.

        The teachers of `momentum_pairs` have been updated by then.
        """

    def backbone(self) -> nn.Module:
        """The network that is kept after pre-training and shown in pictures: DINO's is the teacher's."""
        raise NotImplementedError(f"{type(self).__name__} must define backbone to be shown or exported")

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Frozen features for probes and export: uint8 `[B, H, W, 3]` to float32 `[B, D]`."""

    @abstractmethod
    def flops(self, images: int) -> float:
        """Floating-point operations of a training step on `images` images, recomputation not counted."""
