"""What heads with prototypes give, and the centres of the teacher's logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .joint import all_ranks


class Distilled(NamedTuple):
    """What a head makes of some rows."""

    features: Tensor
    """Unit vectors `[R, d]`."""
    prototypes: Tensor
    """`[K, d]`."""


class Centers(nn.Module):
    """The moving mean of the teacher's logits that each head's are reduced by.

    Logits are linear in the features, so their mean is that of the features times the prototypes: ranks exchange d
    numbers for each head, all heads' in one message, and the logits are never there.

    Args:
        heads: number of heads.
        prototypes: number K of prototypes.
        momentum: share of the old centre in the new one.
    """

    value: Tensor

    def __init__(self, heads: int, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(heads, prototypes))
        self._seen: list[Tensor] = []  # sums of this step's micro-batches, features and rows
        self._coming: Tensor | None = None

    @torch.no_grad()
    def observe(self, *heads: Distilled, valid: Tensor | None = None) -> None:
        """Take in a micro-batch of the teacher's, whose rows count alike on all ranks and in all micro-batches.

        Without centres there is nothing to move.

        The logits are those of the prototypes before this step's update, so the new centre is made here and waits.

        Args:
            heads: what each head makes of the micro-batch.
            valid: the rows that count, bool `[R]`, where others only fill up a buffer; None counts all.
        """
        if not len(self.value):
            return
        sums = torch.stack([_summed(head.features, valid) for head in heads])
        group = all_ranks()
        if group is not None:
            dist.all_reduce(sums, group=group)
        self._seen.append(sums)
        sums = torch.stack(self._seen).sum(0)
        mean = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        with torch.autocast(mean.device.type, enabled=False):
            logits = torch.stack([head.prototypes.to(row.dtype) @ row for head, row in zip(heads, mean, strict=True)])
        self._coming = self.value.lerp(logits.to(self.value.dtype), 1 - self.momentum)

    @torch.no_grad()
    def settle(self, applied: bool) -> None:
        """Move the centres if the step was applied."""
        if applied and self._coming is not None:
            self.value.copy_(self._coming)
        self._seen, self._coming = [], None


def _summed(features: Tensor, valid: Tensor | None) -> Tensor:
    """The sum of the rows that count, and how many they are, `[d + 1]`; no product, which autocast would round."""
    if valid is None:
        return torch.cat([features.sum(0), features.new_full((1,), len(features))])
    return torch.cat([torch.where(valid[:, None], features, 0).sum(0), valid.sum(dtype=features.dtype)[None]])
