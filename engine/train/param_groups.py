"""Optimiser groups with and without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters as the official MAE code does: `[no decay, decay]`, each in module order.

    Vectors and biases are not decayed; everything else is, class and mask tokens (three-dimensional) included.

    Raises:
        ValueError: nothing is trainable.
    """
    kept: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.dim() == 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
    if not kept and not decayed:
        raise ValueError("the method has no trainable parameter")
    return [group for group in groups if group["params"]]
