"""Parameters that steps leave exactly as they are for a while, as DINO's last layer in the first epoch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ..methods.base import Method
from .ds import stepping_optimizer
from .param_groups import HELD, releases


class HeldParameters:
    """Holds what a method's `held` names, in every ZeRO stage: no step, no decay, no state of the optimiser.

    As in DINO's code (arXiv 2104.14294), their gradients are None when the optimiser steps, so the first step after
    their release is the first that it counts for them. Before that they are zero from the backward pass on: the norm
    that is logged and clipped is that of the others, and clipping each tensor for itself is what it is without them.

    Whether they are held follows from the epoch at every step: nothing is remembered, and resuming changes nothing.
    """

    def __init__(self, method: Method, engine: DeepSpeedEngine) -> None:
        """Watch the gradients of a method and the optimiser of the engine made of it."""
        self.epoch = 0.0
        held = releases(method)
        for parameter, release in held.items():
            parameter.register_hook(partial(self._zero, release))
        if held:
            optimizer = stepping_optimizer(engine)
            optimizer.register_step_pre_hook(self._hide)
            optimizer.register_step_post_hook(self._forget)

    def update(self, epoch: float) -> None:
        """Say how many epochs are done when the coming step begins."""
        self.epoch = epoch

    def _zero(self, release: float, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.epoch < release else None

    def _hide(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in self._held(optimizer):
            for parameter in group["params"]:
                parameter.grad = None

    def _forget(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Undo the count of steps that apex keeps for a whole group."""
        for group in self._held(optimizer):
            group.pop("step", None)

    def _held(self, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
        """The groups that are held in this step."""
        return (group for group in optimizer.param_groups if self.epoch < group.get(HELD, 0.0))
