"""Random masking in one sort, against two argsorts; from given noise, and with drawing it."""

from functools import partial
from typing import Any

import torch
from bench import Case, Sizes, compiled, measures
from bench.images import GRIDS, Grid, mae_methods

from vitrail.kernels import random_masking

Tensor = torch.Tensor


def noise(grid: Grid, batch: int, device: torch.device) -> dict[str, Tensor]:
    # No two alike in a row, since some peers' sorts are not stable.
    return {"noise": torch.rand(batch, grid.length, device=device).argsort(1).float() / grid.length}


def two_argsorts(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    shuffle = torch.argsort(noise, dim=1)
    return shuffle[:, :keep], torch.argsort(shuffle, dim=1)


def transformers(grid: Grid) -> Any:
    embeddings: Any = mae_methods(grid)().vit.embeddings  # type: ignore[attr-defined]

    def masking(noise: Tensor) -> tuple[Tensor, Tensor]:
        # It gathers a sequence on the way: of the positions themselves, which makes that part nearly free.
        positions = torch.arange(noise.shape[1], device=noise.device).expand(len(noise), -1)[..., None]
        visible, _, restore = embeddings.random_masking(positions, noise=noise)
        return visible[..., 0], restore

    return masking


def from_noise(grid: Grid, batch: int) -> Case:
    def ours(noise: Tensor) -> tuple[Tensor, Tensor]:
        ids_keep, _, ids_restore = random_masking(batch, grid.length, grid.keep, noise=noise)
        return ids_keep, ids_restore

    theirs = partial(two_argsorts, keep=grid.keep)
    return Case(
        op="random_masking",
        name=grid.name,
        shape=grid.shape(batch),
        dtype=torch.float32,
        inputs=partial(noise, grid, batch),
        truth=theirs,
        implementations={
            "vitrail": lambda: ours,
            "eager": lambda: theirs,
            "compiled": compiled(theirs),
            "transformers": partial(transformers, grid),
        },
        bytes={"forward": batch * grid.length * (4 + 2 * 8)},  # noise in; two lists that hold every position, and ranks
        flops={},
    )


# The kept patches are all that these peers return; ours finds the inverse permutation as well.
def kept(batch: int, length: int, keep: int, device: torch.device) -> Tensor:
    return torch.argsort(torch.rand(batch, length, device=device), dim=1)[:, :keep]


def lightly(grid: Grid, batch: int) -> Any:
    from lightly.models.utils import random_token_mask

    return lambda device: random_token_mask((batch, grid.length), 0.75, mask_class_token=True, device=device)[0]


def with_draw(grid: Grid, batch: int) -> Case:
    eager = partial(kept, batch, grid.length, grid.keep)
    return Case(
        op="random_masking",
        name=f"{grid.name} with the draw",
        shape=grid.shape(batch),
        dtype=torch.float32,
        inputs=lambda device: {"device": device},
        truth=eager,
        implementations={
            "vitrail": lambda: lambda device: random_masking(batch, grid.length, grid.keep, device=device)[0],
            "eager": lambda: eager,
            "lightly": partial(lightly, grid, batch),
        },
        bytes={"forward": batch * grid.length * 2 * 8},
        flops={},
        compared=lambda ids_keep: ids_keep.sort(1).values,  # which patches are kept; equal draws may change places
    )


def cases(sizes: Sizes) -> list[Case]:
    return [make(grid, sizes.batch) for make in (from_noise, with_draw) for grid in GRIDS]


test_random_masking = measures(cases)
