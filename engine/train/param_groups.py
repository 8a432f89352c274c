"""The optimiser's groups: parameters with and without weight decay, and those whose learning rate stays."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..methods.base import Method
from .config import RunConfig


def parameter_groups(method: Method, config: RunConfig) -> list[dict[str, Any]]:
    """Split the trained parameters as `optim.decay` and `method.unscheduled()` say, each group in module order.

    With "matrices", vectors and biases are not decayed, as in the official MAE code; everything else is, class and mask
    tokens (three-dimensional) included. With "all" nothing is spared, as in the official code of MoCo v2, SimSiam and
    MoCo v3's transformers.

    Returns:
        `[no decay, decay]` of what follows the schedule, then of what does not, without empty groups. The latter hold
        the peak learning rate as `fixed_lr`; ZeRO's shards and checkpoints keep it.

    Raises:
        ValueError: nothing is trained.
    """
    fixed = {parameter for network in method.unscheduled() for parameter in network.parameters()}
    split: dict[tuple[bool, bool], list[nn.Parameter]] = {(f, d): [] for f in (False, True) for d in (False, True)}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            vector = parameter.dim() == 1 or name.endswith(".bias")
            split[parameter in fixed, config.optim.decay == "all" or not vector].append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": config.optim.weight_decay if decayed else 0.0,
            **({"fixed_lr": config.peak_lr} if held else {}),
        }
        for (held, decayed), parameters in split.items()
        if parameters
    ]
    if not groups:
        raise ValueError("the method has no trainable parameter")
    return groups
