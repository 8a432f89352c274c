"""The optimiser's groups: with and without weight decay, off the schedule, and held for a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..methods.base import Method
from .config import RunConfig

HELD = "held"
"""Key of the groups of parameters that `Method.held` names."""
SCHEDULED = "scheduled_decay"
"""Key of the groups whose weight decay moves with the steps."""


def parameter_groups(method: Method, config: RunConfig) -> list[dict[str, Any]]:
    """Split the trained parameters as `optim.decay` and the method say, each group in module order.

    With "matrices", vectors and biases are not decayed, as in the official MAE code; everything else is, class and mask
    tokens (three-dimensional) included. With "all" nothing is spared, as in the official code of MoCo v2, SimSiam and
    MoCo v3's transformers.

    Returns:
        `[no decay, decay]` of what follows the learning rate's schedule, then of `method.unscheduled()`, and the same
        once more of `method.held(0.0)`, without empty groups. What does not follow the schedule holds the peak
        learning rate as `fixed_lr`; ZeRO's shards and checkpoints keep it.

    Raises:
        ValueError: nothing is trained.
    """
    fixed = {parameter for network in method.unscheduled() for parameter in network.parameters()}
    held = held_parameters(method, 0.0)
    split: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            decayed = config.optim.decay == "all" or not (parameter.dim() == 1 or name.endswith(".bias"))
            split.setdefault((parameter in held, parameter in fixed, decayed), []).append(parameter)
    if not split:
        raise ValueError("the method has no trainable parameter")
    return [_group(split[kind], config, *kind) for kind in sorted(split)]


def _group(
    parameters: Sequence[nn.Parameter], config: RunConfig, held: bool, fixed: bool, decayed: bool
) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": config.optim.weight_decay if decayed else 0.0}
    if fixed:
        group["fixed_lr"] = config.peak_lr
    if decayed and config.optim.final_weight_decay is not None:
        group[SCHEDULED] = True
    if held:
        group[HELD] = True
    return group


def held_parameters(method: Method, epoch: float) -> set[nn.Parameter]:
    """Trained parameters among those that `method.held` names after so many epochs."""
    return {parameter for parameter in method.held(epoch) if parameter.requires_grad}
