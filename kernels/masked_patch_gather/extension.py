"""Patch gather of uint8 images in the compiled extension: aligned 16-byte reads of any layout, 16-byte writes."""

from collections.abc import Sequence

import torch

from .. import extension
from ..patches import channel_affine, image_size


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
        IndexError: On the CPU, where it costs no wait: an index that is negative or beyond the last patch.
    """
    if indices.device.type == "cpu":
        _check_range(indices, images, patch_size)
    out = torch.empty((*indices.shape, columns), dtype=dtype, device=images.device)
    scale, shift = channel_affine(images, mean, std)
    extension.ops().masked_patch_gather_out(out, images, indices, patch_size, scale, shift)
    return out


def _check_range(indices: torch.Tensor, images: torch.Tensor, patch_size: int) -> None:
    """Raises IndexError unless every index names a patch. The op itself would write rows of zeros, as on a GPU."""
    if indices.numel() == 0:
        return
    height, width = image_size(images)
    patches = (height // patch_size) * (width // patch_size)
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= patches:
        raise IndexError(
            f"indices reach from {low} to {high}; images of {height} x {width} pixels have patches 0 to {patches - 1}"
        )
