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

    def subset(self, share: float, device: torch.device) -> tuple[Tensor, Tensor, Packing]:
        """A random part of each group's images, at least one.

        Returns:
            Places of their tokens, int64 `[n]`; each one's group's images over the chosen, float32 `[n]`; how the
            chosen images lie in the sequence of these tokens.
        """
        parts, factors, groups, place = [], [], [], 0
        for images, tokens in self.groups:
            kept = max(1, int(images * share))
            chosen = torch.randperm(images, device=device)[:kept]
            parts.append((place + chosen[:, None] * tokens + torch.arange(tokens, device=device)).flatten())
            factors.append(torch.full((kept * tokens,), images / kept, device=device))
            groups.append((kept, tokens))
            place += images * tokens
        return torch.cat(parts), torch.cat(factors), Packing(tuple(groups))

    def unpack(self, sequence: Tensor) -> list[Tensor]:
        """Tokens `[1, sum of B N, D]` back to `[B, N, D]` for each group; views."""
        parts = sequence[0].split([images * tokens for images, tokens in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]


def pack(groups: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """Put tokens `[B, N, D]` of several groups into one sequence `[1, sum of B N, D]`."""
    width = groups[0].shape[-1]
    sequence = torch.cat([group.reshape(-1, width) for group in groups])[None]
    return sequence, Packing(tuple((group.shape[0], group.shape[1]) for group in groups))
