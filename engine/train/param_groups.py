"""The optimiser's groups: with and without weight decay, off the schedule, slower, and held for a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..methods.base import Method
from .config import RunConfig

HELD = "held_until"
"""Key of the groups of parameters that `Method.held` names: the epoch of their release."""
SCHEDULED = "scheduled_decay"
"""Key of the groups whose weight decay moves with the steps."""
SCALE = "lr_scale"
"""Key of the groups whose learning rate is not the schedule's itself: its factor."""
PART = "clip_part"
"""Key of the groups of the parts that `Method.clip_groups` names: the part's number, from 1 on."""


def parameter_groups(method: Method, config: RunConfig) -> list[dict[str, Any]]:
    """Split the trained parameters as `optim.decay` and the method say, each group in module order.

    With "matrices", vectors and biases are not decayed, as in the official MAE code; everything else is, class and mask
    tokens (three-dimensional) included, but for what `method.undecayed()` names. With "all" nothing is spared, as in
    the official code of MoCo v2, SimSiam and MoCo v3's transformers.

    Returns:
        `[no decay, decay]` of what follows the learning rate's schedule, then of `method.unscheduled()`, and the same
        once more for each epoch that `method.held()` names, without empty groups. What does not follow the schedule
        holds the peak learning rate as `fixed_lr`; ZeRO's shards and checkpoints keep it. Groups are split further by
        the factors of `method.lr_scales()`, and by the parts of `method.clip_groups()` where `optim.clip_per_part`
        asks for them.

    Raises:
        ValueError: nothing is trained.
    """
    fixed = {parameter for network in method.unscheduled() for parameter in network.parameters()}
    held, spared = releases(method), set(method.undecayed())
    scales = {parameter: scale for scale, parameters in method.lr_scales() for parameter in parameters}
    groups = method.clip_groups() if config.optim.clip_per_part else []
    parts = {parameter: number for number, group in enumerate(groups, 1) for parameter in group}
    split: dict[tuple[float, bool, float, int, bool], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            vector = parameter.dim() == 1 or name.endswith(".bias")
            decayed = config.optim.decay == "all" or not (vector or parameter in spared)
            scale, part = scales.get(parameter, 1.0), parts.get(parameter, 0)
            kind = (held.get(parameter, 0.0), parameter in fixed, scale, part, decayed)
            split.setdefault(kind, []).append(parameter)
    if not split:
        raise ValueError("the method has no trainable parameter")
    return [_group(split[kind], config, *kind) for kind in sorted(split)]


def _group(
    parameters: Sequence[nn.Parameter],
    config: RunConfig,
    held: float,
    fixed: bool,
    scale: float,
    part: int,
    decayed: bool,
) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": config.optim.weight_decay if decayed else 0.0}
    if fixed:
        group["fixed_lr"] = config.peak_lr
    if decayed and config.optim.final_weight_decay is not None:
        group[SCHEDULED] = True
    if held:
        group[HELD] = held
    if scale != 1.0:
        group[SCALE] = scale
    if part:
        group[PART] = part
    return group


def releases(method: Method) -> dict[nn.Parameter, float]:
    """The epoch until which each trained parameter is held, of those that `method.held` names with one after 0."""
    found: dict[nn.Parameter, float] = {}
    for epoch, parameters in method.held():
        for parameter in parameters:
            if parameter.requires_grad and epoch > 0:
                found[parameter] = max(epoch, found.get(parameter, 0.0))
    return found
