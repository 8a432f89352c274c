"""Projection and prediction heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import nn

from .batch_norm import BatchNorm

LastNorm = Literal["none", "plain", "scale"]
"""After the last layer: nothing, batch normalisation without parameters, or with a scale but no shift."""


def mlp_head(
    widths: Sequence[int],
    *,
    hidden_norm: bool = True,
    last_norm: LastNorm = "none",
    last_bias: bool = False,
    groups: int = 1,
    sync: bool = True,
) -> nn.Sequential:
    """Linear layers with ReLU between them, and with batch normalisation before each ReLU.

    Linear layers keep PyTorch's default initialisation, as in the official codes. Those that batch normalisation
    follows have no bias; hidden ones without it have one.

    Args:
        widths: of the input, the hidden layers and the output.
        hidden_norm: whether batch normalisation follows the hidden layers.
        last_norm: what follows the last layer.
        last_bias: whether the last layer has a bias.
        groups: views that lie one after the other in a batch, each normalised by statistics of its own.
        sync: whether statistics are those of all ranks.

    Returns:
        A module from `[N, widths[0]]` to `[N, widths[-1]]`, its layers numbered as in the official checkpoints.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(before, after, bias=not hidden_norm))
        if hidden_norm:
            layers.append(BatchNorm(after, groups=groups, sync=sync))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm == "plain":
        layers.append(BatchNorm(widths[-1], affine=False, groups=groups, sync=sync))
    elif last_norm == "scale":
        layers.append(BatchNorm(widths[-1], shift=False, groups=groups, sync=sync))
    return nn.Sequential(*layers)


def head_flops(head: nn.Module) -> float:
    """Floating-point operations of a head on one vector, forward, two per multiply-accumulate."""
    return sum(2.0 * m.in_features * m.out_features for m in head.modules() if isinstance(m, nn.Linear))
