"""Images as grids of patches: layouts, sizes, views and pixel normalisation, shared by the ops that read images."""

import math
from collections.abc import Sequence

import torch

CHANNELS = 3


def check_images(images: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """Checks images against a patch size.

    Args:
        images: [B, H, W, 3] or [B, 3, H, W], uint8 or floating.
        patch_size: Side of the square patches, in pixels.

    Returns:
        Patches per column and per row of an image: (H / patch_size, W / patch_size).

    Raises:
        TypeError: The images are neither uint8 nor floating.
        ValueError: The layout cannot be told, or a side is not a multiple of the patch size.
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating, got {images.dtype}; convert them with .to(torch.uint8)")
    # Written as comparisons: torch 2.11 cannot compile a search among sizes that it does not know.
    if images.ndim != 4 or (images.shape[1] != CHANNELS and images.shape[3] != CHANNELS):
        raise ValueError(f"images must have shape [B, H, W, 3] or [B, 3, H, W], got {list(images.shape)}")
    if images.shape[1] == images.shape[3]:
        raise ValueError(
            f"images of shape {list(images.shape)} are ambiguous: dimension 1 and dimension 3 could both be the "
            "channels; pad the images so that only one of them is 3"
        )
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    height, width = image_size(images)
    for side, size in (("height", height), ("width", width)):
        if size % patch_size or size == 0:
            raise ValueError(
                f"the image {side} {size} is not a positive multiple of patch_size={patch_size}; "
                f"crop or resize the images to {max(size // patch_size, 1) * patch_size}"
            )
    return height // patch_size, width // patch_size


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """Returns the images as a [B, H, W, 3] view, whatever their layout. Copies nothing."""
    return images if images.shape[3] == CHANNELS else images.permute(0, 2, 3, 1)


def image_size(images: torch.Tensor) -> tuple[int, int]:
    """Returns the height and width of images in either layout."""
    shape = channels_last(images).shape
    return shape[1], shape[2]


def patch_view(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Returns the images as a [B, H/P, W/P, P, P, 3] view: patch row, patch column, then (row, column, channel)."""
    pixels = channels_last(images)
    rows: torch.Tensor = pixels.unflatten(1, (pixels.shape[1] // patch_size, patch_size))
    grid: torch.Tensor = rows.unflatten(3, (pixels.shape[2] // patch_size, patch_size))
    return grid.transpose(2, 3)


def patch_width(patch_size: int) -> int:
    """Returns the number of values in one patch: 3 P²."""
    return CHANNELS * patch_size * patch_size


def check_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Checks the channel statistics and returns them as tuples, empty when none are given.

    Raises:
        ValueError: Only one is given, there are not three of each, or a value is not finite or not positive.
    """
    if mean is None and std is None:
        return (), ()
    if mean is None or std is None:
        missing, given = ("mean", "std") if mean is None else ("std", "mean")
        raise ValueError(f"{given} is given without {missing}; pass both, or neither")
    values = []
    for name, statistic in (("mean", mean), ("std", std)):
        channel_values = tuple(float(value) for value in statistic)
        if len(channel_values) != CHANNELS:
            raise ValueError(f"{name} must hold {CHANNELS} values, one for each channel, got {channel_values}")
        if not all(abs(value) < math.inf for value in channel_values):  # math.isfinite takes no symbol of a compiler
            raise ValueError(f"{name} must be finite, got {channel_values}")
        values.append(channel_values)
    if min(values[1]) <= 0:
        raise ValueError(f"std must be positive, got {values[1]}; in 0-1 units, ImageNet's is (0.229, 0.224, 0.225)")
    return values[0], values[1]


def check_columns(pad_to: int | None, patch_size: int) -> int:
    """Returns the number of columns of a patch matrix: `pad_to`, or 3 P² when it is None.

    Raises:
        ValueError: `pad_to` is smaller than a patch.
    """
    width = patch_width(patch_size)
    if pad_to is None:
        return width
    if pad_to < width:
        raise ValueError(f"pad_to={pad_to} is smaller than the {width} values of a {patch_size}x{patch_size} patch")
    return pad_to


def check_patch_indices(name: str, indices: torch.Tensor, images: torch.Tensor) -> None:
    """Raises unless `indices` is an int64 [B, count] matrix for the same batch as `images`."""
    if indices.dtype != torch.int64:
        raise TypeError(f"{name} must be of dtype torch.int64, got {indices.dtype}; convert it with .long()")
    if indices.ndim != 2 or indices.shape[0] != images.shape[0]:
        raise ValueError(
            f"{name} must have shape [B, count] with B={images.shape[0]} as in images, got {list(indices.shape)}"
        )


def channel_affine(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns scale and shift for each channel such that `value * scale + shift` normalises a pixel.

    Args:
        images: Their dtype decides: uint8 values are divided by 255 first.
        mean: Three channel means in 0-1 units, or empty for none.
        std: Three channel standard deviations, or empty for none.
    """
    unit = 1 / 255 if images.dtype == torch.uint8 else 1.0
    if not mean:
        return (unit,) * CHANNELS, (0.0,) * CHANNELS
    return tuple(unit / s for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
