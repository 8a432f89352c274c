"""Patch gather from uint8, against normalising and patchifying whole images and then choosing."""

from functools import partial
from typing import Any

import torch
from bench import Case, Sizes, compiled, measures
from bench.images import GRIDS, MEAN, STD, Grid, normalised, patchify, random_images

from vitrail.kernels import masked_patch_gather, random_masking


def inputs(grid: Grid, batch: int, planes: bool, device: torch.device) -> dict[str, torch.Tensor]:
    ids_keep, _, _ = random_masking(batch, grid.length, grid.keep, device=device)
    return {"images": random_images(batch, device, planes=planes), "indices": ids_keep}


def eager(images: torch.Tensor, indices: torch.Tensor, patch: int, dtype: torch.dtype) -> torch.Tensor:
    rows = patchify(normalised(images, torch.float64 if dtype == torch.float64 else torch.float32), patch)
    return rows.to(dtype).take_along_dim(indices[..., None], 1)


def lightly(patch: int) -> Any:
    from lightly.models.utils import get_at_index, patchify

    return lambda images, indices: get_at_index(patchify(normalised(images), patch).bfloat16(), indices)


def case(grid: Grid, batch: int, *, planes: bool = False) -> Case:
    ours = partial(masked_patch_gather, patch_size=grid.patch, mean=MEAN, std=STD, dtype=torch.bfloat16)
    theirs = partial(eager, patch=grid.patch, dtype=torch.bfloat16)
    chosen = batch * grid.keep
    return Case(
        op="masked_patch_gather",
        name=grid.name + (" planes" if planes else ""),
        shape={**grid.shape(batch), "layout": "CHW" if planes else "HWC"},
        dtype=torch.bfloat16,
        inputs=partial(inputs, grid, batch, planes),
        truth=partial(eager, patch=grid.patch, dtype=torch.float64),
        implementations={
            "vitrail": lambda: ours,
            "eager": lambda: theirs,
            "compiled": compiled(theirs),
            "lightly": partial(lightly, grid.patch),
        },
        bytes={"forward": chosen * (grid.values * (1 + 2) + 8)},  # uint8 in, bf16 out, and the index
        flops={},
    )


def cases(sizes: Sizes) -> list[Case]:
    return [*(case(grid, sizes.batch) for grid in GRIDS), case(GRIDS[1], sizes.batch, planes=True)]


test_masked_patch_gather = measures(cases)
