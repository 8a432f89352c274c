"""Patch gather in plain PyTorch: choose among the raw pixels, and convert only what was chosen."""

from collections.abc import Sequence

import torch

from ..patches import CHANNELS, channels_last, image_size, patch_view, patch_width


def check_range(indices: torch.Tensor, images: torch.Tensor, patch_size: int) -> None:
    """Checks on the CPU, where it costs no wait, that every index names a patch.

    Raises:
        IndexError: One is negative or beyond the last patch.
    """
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    height, width = image_size(images)
    patches = (height // patch_size) * (width // patch_size)
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= patches:
        raise IndexError(
            f"indices reach from {low} to {high}; images of {height} x {width} pixels have patches 0 to {patches - 1}"
        )


def forward(
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gathers and normalises patches.

    Args:
        images: [B, H, W, 3] or [B, 3, H, W], uint8 or floating, any strides.
        indices: [B, V] int64, row-major patch numbers.
        patch_size: Side of a patch in pixels.
        mean: Three channel means, or empty for none.
        std: Three channel standard deviations, or empty for none.
        columns: Width of the result, at least 3 P²; the surplus is zero.
        dtype: Of the result.

    Returns:
        [B, V, columns]; each row holds a patch in the order (row, column, channel).

    Raises:
        IndexError: On the CPU, an index is out of range.
    """
    check_range(indices, images, patch_size)
    width = patch_width(patch_size)
    compute = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    # Reordering all raw pixels, then copying whole rows, is faster than picking patches from a six-dimensional view.
    patches = patch_view(images, patch_size).flatten(1, 2).flatten(2)
    batch = torch.arange(images.shape[0], device=images.device)[:, None]
    values = patches[batch, indices].to(compute)
    if images.dtype == torch.uint8:
        values = values.div_(255)
    if mean:
        # One vector as wide as a patch: a broadcast over three channels would run the CPU's inner loop three wide.
        pixels = width // CHANNELS
        values = values - values.new_tensor(mean).repeat(pixels)
        values.div_(values.new_tensor(std).repeat(pixels))
    if columns == width:
        return values.to(dtype)
    padded = values.new_zeros((*values.shape[:2], columns), dtype=dtype)
    padded[..., :width] = values
    return padded


def backward(
    grad: torch.Tensor,
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    std: Sequence[float],
) -> torch.Tensor:
    """Adds the gradient of every gathered patch to its place in the images.

    Args:
        grad: [B, V, columns], any strides.
        images: As in :func:`forward`; only their shape, strides and dtype are used.
        indices: As in :func:`forward`. A patch that was gathered twice receives both gradients.
        patch_size: As in :func:`forward`.
        std: As in :func:`forward`.

    Returns:
        The gradient, with the images' shape, dtype and memory order.
    """
    width = patch_width(patch_size)
    compute = torch.float64 if torch.float64 in (images.dtype, grad.dtype) else torch.float32
    values = grad[..., :width].to(compute)
    if std:
        values = values / values.new_tensor(std).repeat(width // CHANNELS)
    result = torch.empty_like(images)
    view = patch_view(result, patch_size)
    count, grid_height, grid_width = view.shape[:3]
    total = values.new_zeros(count, grid_height * grid_width, width)
    batch = torch.arange(count, device=images.device)[:, None]
    # index_put_ sums duplicates in a fixed order on every device; index_add_ would use atomics on CUDA.
    total.index_put_((batch, indices), values, accumulate=True)
    grid = total.view(count, grid_height, grid_width, patch_size, patch_size, CHANNELS)
    channels_last(result).copy_(grid.transpose(2, 3).reshape(channels_last(result).shape))
    return result
