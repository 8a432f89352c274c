"""Projection and prediction heads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch_norm import BatchNorm
from .initialisation import truncated_init_

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


class Prototypes(nn.Module):
    """The last layer of DINO's head: K directions with lengths, which features are multiplied with (weight norm).

    The parameters are those of `torch.nn.utils.weight_norm`, so that the released checkpoints fit. The products are not
    here but in the loss, which never holds all of them.

    Args:
        count: number K of prototypes.
        width: width d of the features.
        trained_length: whether the lengths, 1 at the start, are trained.
    """

    def __init__(self, count: int, width: int, *, trained_length: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=trained_length)
        self.weight_v = nn.Parameter(torch.empty(count, width))
        bound = 1 / math.sqrt(width)  # what the official head leaves it at: the default of a linear layer
        nn.init.uniform_(self.weight_v, -bound, bound)

    def forward(self) -> Tensor:
        """The prototypes `[K, d]`."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)


class DINOHead(nn.Module):
    """The head of DINO, EsViT and iBOT: three linear layers with GELU, unit length, prototypes.

    State-dict keys are those of the released checkpoints: `mlp.{0,2,4}` (`mlp.{0,3,6}` with batch normalisation),
    `last_layer.weight_g`, `last_layer.weight_v`, and `last_layer2` likewise where patches have prototypes of their own.
    iBOT's released code has both names also where they are one layer; here that is `last_layer` alone.

    Args:
        width: of the input.
        prototypes: number K of prototypes.
        patch_prototypes: number of the patches' own; None: they share those of views.
        hidden: width of the hidden layers.
        bottleneck: width d of the vector that prototypes are multiplied with.
        batch_norm: whether batch normalisation follows the hidden layers.
        trained_length: whether the lengths of the prototypes are trained.
    """

    def __init__(
        self,
        width: int,
        prototypes: int = 65_536,
        *,
        patch_prototypes: int | None = None,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
        trained_length: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((width, hidden, hidden)):
            layers += [nn.Linear(before, after), *([BatchNorm(after)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        truncated_init_(self.mlp)
        self.last_layer = Prototypes(prototypes, bottleneck, trained_length=trained_length)
        self.last_layer2 = (
            None
            if patch_prototypes is None
            else Prototypes(patch_prototypes, bottleneck, trained_length=trained_length)
        )

    def forward(self, x: Tensor, patches: bool = False) -> tuple[Tensor, Tensor]:
        """`[N, width]` to unit vectors `[N, d]`, float32 at least, and prototypes `[K, d]`: of views, or of patches."""
        x = self.mlp(x)
        layer = self.last_layer2 if patches and self.last_layer2 is not None else self.last_layer
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1), layer()


def head_flops(head: nn.Module) -> float:
    """Floating-point operations of a head on one vector, forward, two per multiply-accumulate."""
    linear = sum(2.0 * m.in_features * m.out_features for m in head.modules() if isinstance(m, nn.Linear))
    return linear + sum(2.0 * m.weight_v.numel() for m in head.modules() if isinstance(m, Prototypes))
