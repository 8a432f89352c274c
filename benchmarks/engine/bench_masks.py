"""Block-wise masks of a batch, noise included, against the rule that a loader applies to one image after another.

A step draws them before it can begin: for 256 images on two cores they are meant to take less than 5 ms.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from bench import Case, Sizes, measures

from vitrail.engine.methods.masks import BLOCK_COLUMNS, block_masks, ibot_columns, ibot_counts

Tensor = torch.Tensor

SIDE, LEAST, TRIES, ASPECT = 14, 16, 10, 0.3
TOKENS = SIDE**2


@dataclass(frozen=True)
class Wanted:
    """How many tokens of an image a method masks."""

    name: str
    count: int | None
    """None where iBOT draws it."""

    def draw(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and counts for as many images as `place` has rows, on its device."""
        noise = torch.rand(len(place), BLOCK_COLUMNS, device=place.device)
        if self.count is not None:
            return noise, torch.full((len(place),), self.count, device=place.device)
        return noise, ibot_counts(torch.rand(len(place), ibot_columns(), device=place.device), TOKENS)


def at_once(place: Tensor, wanted: Wanted) -> Tensor:
    noise, counts = wanted.draw(place)
    return block_masks(noise, (SIDE, SIDE), counts, least_area=LEAST, aspect=ASPECT, tries=TRIES)


def one_by_one(place: Tensor, wanted: Wanted) -> Tensor:
    """The same noise, image after image, with a NumPy array for each mask."""
    noise, counts = wanted.draw(place)
    masks = [mask(row, count) for row, count in zip(noise.tolist(), counts.tolist(), strict=True)]
    return torch.from_numpy(np.stack(masks)).flatten(1).to(place.device)


def mask(row: list[float], wanted: float) -> np.ndarray:
    masked = np.zeros((SIDE, SIDE), dtype=bool)
    numbers, count = iter(row), 0
    while count < wanted:
        added = add_block(masked, wanted - count, numbers)
        if not added:
            break
        count += added
    return masked


def add_block(masked: np.ndarray, missing: float, numbers: Iterator[float]) -> int:
    """Mask the first acceptable rectangle; returns the number of new tokens, 0 if no attempt is acceptable."""
    for _ in range(TRIES):
        area = LEAST + (missing - LEAST) * next(numbers)
        ratio = math.exp(math.log(ASPECT) * (1 - 2 * next(numbers)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        place = next(numbers)
        if height >= SIDE or width >= SIDE:
            continue
        columns = SIDE - width + 1
        top, left = divmod(int(place * ((SIDE - height + 1) * columns)), columns)
        block = masked[top : top + height, left : left + width]
        added = height * width - int(block.sum())
        if 0 < added <= missing:
            block[:] = True
            return added
    return 0


def case(wanted: Wanted, batch: int) -> Case:
    ours, theirs = (partial(function, wanted=wanted) for function in (at_once, one_by_one))
    return Case(
        op="block_masks",
        name=wanted.name,
        shape={"batch": batch, "tokens": TOKENS},
        dtype=torch.float32,
        inputs=lambda device: {"place": torch.empty(batch, 0, device=device)},
        truth=theirs,
        implementations={"vitrail": lambda: ours, "one by one": lambda: theirs},
        bytes={"forward": batch * (4 * BLOCK_COLUMNS + TOKENS)},  # the noise in, the masks out
        flops={},
    )


def cases(sizes: Sizes) -> list[Case]:
    batch = sizes.batch if sizes.dry else 256
    return [case(wanted, batch) for wanted in (Wanted("BEiT", 75), Wanted("iBOT", None))]


test_block_masks = measures(cases)
