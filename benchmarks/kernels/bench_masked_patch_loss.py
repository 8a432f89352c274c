"""The masked-patch loss from uint8, against patchifying and normalising every patch and a mask over the squares."""

from functools import partial
from typing import Any

import torch
from bench import Case, Sizes, compiled, measures
from bench.images import GRIDS, MEAN, STD, Grid, mae_methods, normalised, patchify, random_images

from vitrail.kernels import masked_patch_loss, random_masking

Tensor = torch.Tensor


def inputs(grid: Grid, batch: int, device: torch.device) -> dict[str, Tensor]:
    _, ids_mask, _ = random_masking(batch, grid.length, grid.keep, device=device)
    pred = torch.randn(*ids_mask.shape, grid.values, device=device).bfloat16()
    return {"pred": pred, "images": random_images(batch, device), "masked_indices": ids_mask}


def all_rows(pred: Tensor, masked_indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Predictions of every patch and the mask, as the official decoder returns them: what was not predicted is zero."""
    rows = masked_indices[..., None].expand(-1, -1, pred.shape[-1])
    everything = pred.new_zeros(len(pred), length, pred.shape[-1]).scatter(1, rows, pred)
    mask = torch.zeros(len(pred), length, device=pred.device).scatter(1, masked_indices, 1.0)
    return everything, mask


def eager(pred: Tensor, images: Tensor, masked_indices: Tensor, grid: Grid) -> Tensor:
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    target = patchify(normalised(images, compute), grid.patch)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    everything, mask = all_rows(pred, masked_indices, grid.length)
    return ((everything - target).square().mean(-1) * mask).sum() / mask.sum()


def lightly(grid: Grid) -> Any:
    from lightly.models.utils import get_at_index, normalize_mean_var, patchify

    def loss(pred: Tensor, images: Tensor, masked_indices: Tensor) -> Tensor:
        target = normalize_mean_var(get_at_index(patchify(normalised(images), grid.patch), masked_indices))
        return torch.nn.functional.mse_loss(pred.float(), target)

    return loss


def transformers(grid: Grid) -> Any:
    model: Any = mae_methods(grid)()

    def loss(pred: Tensor, images: Tensor, masked_indices: Tensor) -> Tensor:
        # What ViTMAEForPreTraining.forward does between its decoder and its loss.
        target = model.patchify(normalised(images))
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
        everything, mask = all_rows(pred, masked_indices, grid.length)
        return (((everything - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()

    return loss


def case(grid: Grid, batch: int) -> Case:
    ours = partial(masked_patch_loss, patch_size=grid.patch, mean=MEAN, std=STD)
    theirs = partial(eager, grid=grid)
    rows = batch * (grid.length - grid.keep)
    read = rows * (grid.values * (2 + 1) + 8)  # bf16 predictions, uint8 pixels, and the index
    return Case(
        op="masked_patch_loss",
        name=grid.name,
        shape=grid.shape(batch),
        dtype=torch.bfloat16,
        inputs=partial(inputs, grid, batch),
        truth=theirs,
        implementations={
            "vitrail": lambda: ours,
            "eager": lambda: theirs,
            "compiled": compiled(theirs),
            "lightly": partial(lightly, grid),
            "transformers": partial(transformers, grid),
        },
        bytes={"forward": read, "forward+backward": 2 * read + rows * grid.values * 2},
        flops={},
        differentiable=("pred",),
    )


def cases(sizes: Sizes) -> list[Case]:
    return [case(grid, sizes.batch) for grid in GRIDS]


test_masked_patch_loss = measures(cases)
