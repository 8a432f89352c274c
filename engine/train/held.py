"""Parameters that steps leave exactly as they are for a while, as DINO's last layer in the first epoch."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ..methods.base import Method
from .ds import stepping_optimizer
from .param_groups import HELD, held_parameters


class HeldParameters:
    """Holds what a method's `held` names, in every ZeRO stage: no step, no decay, no state of the optimiser.

    As in DINO's code (arXiv 2104.14294), their gradients are None when the optimiser steps, so the first step after
    their release is the first that it counts for them. Before that they are zero from the backward pass on: the norm
    that is logged and clipped is that of the others, and clipping each tensor for itself is what it is without them.

    Whether they are held is asked of the method at every step: nothing is remembered, and resuming changes nothing.
    """

    def __init__(self, method: Method, engine: DeepSpeedEngine) -> None:
        """Watch the gradients of a method and the optimiser of the engine made of it."""
        self.method, self.held = method, False
        self.parameters = held_parameters(method, 0.0)
        for parameter in self.parameters:
            parameter.register_hook(self._zero)
        if self.parameters:
            optimizer = stepping_optimizer(engine)
            optimizer.register_step_pre_hook(self._hide)
            optimizer.register_step_post_hook(self._forget)

    def update(self, epoch: float) -> None:
        """Hold them, or let them go, in the step that begins after so many epochs.

        Raises:
            ValueError: the method names others than in the first step; flat shards cannot tell them apart.
        """
        held = held_parameters(self.method, epoch)
        if held and held != self.parameters:
            raise ValueError(
                f"{type(self.method).__name__}.held({epoch:g}) names other parameters than held(0): "
                "name the same ones, or none"
            )
        self.held = bool(held)

    def _zero(self, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.held else None

    def _hide(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if self.held and HELD in group:
                for parameter in group["params"]:
                    parameter.grad = None

    def _forget(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Undo the count of steps that apex keeps for a whole group."""
        for group in optimizer.param_groups:
            if self.held and HELD in group:
                group.pop("step", None)
