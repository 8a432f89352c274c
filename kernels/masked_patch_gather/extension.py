"""Patch gather of uint8 images in the compiled extension: aligned 16-byte reads of any layout, 16-byte writes."""

from collections.abc import Sequence

import torch

from .. import extension
from ..patches import channel_affine
from .reference import check_range


def forward(
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gathers and normalises. Arguments and result as in the reference.

    Raises:
        IndexError: On the CPU, an index is out of range.
    """
    check_range(indices, images, patch_size)  # the op itself would write a row of zeros, as on a GPU
    out = torch.empty((*indices.shape, columns), dtype=dtype, device=images.device)
    scale, shift = channel_affine(images, mean, std)
    extension.ops().masked_patch_gather_out(out, images, indices, patch_size, scale, shift)
    return out
