"""Activation checkpointing of a network's blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A block of a network, the unit of activation checkpointing and of compilation."""

    recompute = False
    """Whether the backward pass computes the block's activations again, in place of keeping them."""


def run(block: nn.Module, *inputs: Any) -> Tensor:
    """Call a `Recomputable`, as its `recompute` says.

    Only non-reentrant checkpointing is correct here: the reentrant form computes wrong gradients under ZeRO-3 for
    modules that are applied more than once in a step.
    """
    assert isinstance(block, Recomputable)
    if block.recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
