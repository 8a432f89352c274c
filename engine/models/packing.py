"""Images of several sizes in one sequence, so that they share the matrix products of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How images lie one behind the other in a sequence."""

    groups: tuple[tuple[int, int], ...]
    """(images, tokens of each), group after group."""

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(images for images, _ in self.groups)

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return sum(images * tokens for images, tokens in self.groups)

    def lengths(self) -> list[int]:
        """Tokens of each image."""
        return [tokens for images, tokens in self.groups for _ in range(images)]

    def starts(self, device: torch.device) -> Tensor:
        """Place of each image's first token, int64 `[images]`."""
        parts, place = [], 0
        for images, tokens in self.groups:
            parts.append(torch.arange(images, device=device) * tokens + place)
            place += images * tokens
        return torch.cat(parts)

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """One value for each image, `[images]`, to one for each of `rows` rows: all tokens, or one of each image."""
        if rows == self.images:
            return values
        counts = torch.tensor(self.lengths(), device=values.device)
        return values.repeat_interleave(counts, output_size=self.tokens)


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """Put tokens `[B, N, D]` of several groups into one sequence `[1, sum of B N, D]`."""
    width = groups[0].shape[-1]
    sequence = torch.cat([group.reshape(-1, width) for group in groups])[None]
    return sequence, Packing(tuple((group.shape[0], group.shape[1]) for group in groups))
