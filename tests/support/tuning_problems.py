"""Tiny calls of every op, odd in every size, larger than one tile of the default in most."""

from functools import partial
from typing import Any

import torch
from ladder import Problem

from vitrail.kernels import masked_patch_gather, masked_patch_loss, random_masking, restore_tokens

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FUNCTIONS = {
    "random_masking": random_masking,
    "masked_patch_gather": masked_patch_gather,
    "restore_tokens": restore_tokens,
    "masked_patch_loss": masked_patch_loss,
}


def _pixels(patch: int, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(patch)
    size = (batch, grid[0] * patch, grid[1] * patch, 3)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return {"images": images, "patch_size": patch, "mean": MEAN, "std": STD, "pad_to": -(-3 * patch * patch // 8) * 8}


def _masking(batch: int, length: int, keep: int) -> Problem:
    noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(length))
    noise[:, 1::3] = noise[:, :1]  # ties
    return Problem({"batch": batch, "length": length, "keep": keep, "noise": noise})


def _gather(patch: int, grid: tuple[int, int], count: int) -> Problem:
    call = _pixels(patch, grid, 3)
    indices = torch.randint(0, grid[0] * grid[1], (3, count), generator=torch.Generator().manual_seed(count))
    return Problem({**call, "images": call["images"] / 255, "indices": indices}, ("images",))


def _loss(patch: int, grid: tuple[int, int], masked: int) -> Problem:
    call = _pixels(patch, grid, 2)
    generator = torch.Generator().manual_seed(masked)
    length = grid[0] * grid[1]
    indices = random_masking(2, length, length - masked, generator=generator)[1]
    pred = torch.randn(2, masked, call["pad_to"], generator=generator)
    return Problem({**call, "pred": pred, "masked_indices": indices}, ("pred",))


def _restore(batch: int, length: int, visible: int, width: int) -> Problem:
    generator = torch.Generator().manual_seed(width)
    randn = partial(torch.randn, generator=generator)
    ids_restore = random_masking(batch, length, visible, generator=generator)[2]
    inputs = {
        "visible": randn(batch, 1 + visible, width),
        "ids_restore": ids_restore,
        "mask_token": randn(width),
        "pos_embed": randn(1 + length, width),
    }
    return Problem(inputs, ("visible", "mask_token", "pos_embed"))


PROBLEMS = {
    "random_masking": [_masking(2, 7, 3), _masking(1, 131, 33)],
    "masked_patch_gather": [_gather(8, (3, 1), 3), _gather(14, (1, 2), 3)],
    "restore_tokens": [_restore(9, 4, 1, 7), _restore(2, 5, 2, 1030)],
    "masked_patch_loss": [_loss(8, (3, 1), 2), _loss(14, (1, 2), 1)],
}


def tiny_gather(device: torch.device | str) -> dict[str, tuple[Any, ...]]:
    """Returns arguments of the gather's passes: 18 patches of fp32 images."""
    call = _gather(8, (1, 3), 6).to(torch.float32, device).inputs
    images, indices = call["images"].permute(0, 3, 1, 2).contiguous(), call["indices"]
    grad = torch.ones(3, 6, 192, device=device)
    return {
        "forward": (images, indices, 8, MEAN, STD, 192, torch.float32),
        "backward": (grad, images, indices, 8, STD),
    }
