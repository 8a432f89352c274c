"""Patch gather from uint8 against normalising and patchifying whole images: a quarter of the patches visible."""

import pytest
import torch

from vitrail.kernels import masked_patch_gather, random_masking

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eager(images: torch.Tensor, indices: torch.Tensor, patch: int, dtype: torch.dtype) -> torch.Tensor:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = (torch.tensor(values, dtype=compute, device=images.device) for values in (MEAN, STD))
    pixels = (images.to(compute) / 255 - mean) / std
    rows = pixels.unflatten(1, (-1, patch)).unflatten(3, (-1, patch)).transpose(2, 3).flatten(1, 2).flatten(2)
    return rows.to(dtype).take_along_dim(indices[..., None], 1)


@pytest.mark.benchmark(group="masked_patch_gather")
@pytest.mark.parametrize("peer", ["vitrail", "eager"])
@pytest.mark.parametrize("patch", [14, 16])
def test_masked_patch_gather(measure, device, batch, patch, peer):
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device=device)
    length = (224 // patch) ** 2
    indices, _, _ = random_masking(batch, length, length // 4, device=device)
    calls = {
        "vitrail": lambda: masked_patch_gather(images, indices, patch, mean=MEAN, std=STD, dtype=torch.bfloat16),
        "eager": lambda: eager(images, indices, patch, torch.bfloat16),
    }
    bytes_moved = indices.numel() * (3 * patch * patch * (1 + 2) + 8)  # uint8 in, bf16 out, and the index
    truth = eager(images, indices, patch, torch.float64)
    measure(calls[peer], truth=truth, bytes_moved=bytes_moved, tolerance=2**-8)
