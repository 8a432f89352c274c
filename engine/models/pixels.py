"""Raw images as the input of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.kernels.patches import channels_last, check_images

MEAN, STD, LEAST = 0.46, 0.225, 0.016  # in 0-1 units: about those of ImageNet, and an eighth of a dim image's


def standardised(images: Tensor) -> Tensor:
    """Give each channel of each image the same mean and deviation, about those of ImageNet's pixels.

    What is left is what differs within an image: neither its light nor the colour of it. Known as per-image
    standardisation from networks for small images; here each channel by itself, and the result is of the same dtype,
    so that whatever reads raw images can read it.

    Args:
        images: `[B, H, W, 3]` or `[B, 3, H, W]`, uint8 or floating in 0-1 units.

    Returns:
        The same shape and dtype; uint8 is rounded and clipped.
    """
    dims = (1, 2) if images.shape[-1] == 3 else (2, 3)
    full = 1.0 if images.is_floating_point() else 255.0
    pixels = images if images.is_floating_point() else images.float()
    std, mean = torch.std_mean(pixels, dim=dims, keepdim=True)
    pixels = (pixels - mean) * (STD * full / (std + LEAST * full)) + MEAN * full
    return pixels if images.is_floating_point() else pixels.clamp(0, 255).round().to(images.dtype)


class PixelNormalisation(nn.Module):
    """Brings pixels to zero mean and unit deviation per channel, on the device that computes.

    It has no state of its own in a state dict.

    Args:
        mean: channel means, in 0-1 units.
        std: channel standard deviations, in 0-1 units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images.

        Args:
            images: `[B, H, W, 3]` or `[B, 3, H, W]`, uint8 or floating in 0-1 units.

        Returns:
            float32 `[B, 3, H, W]`, stored with the channels last, as convolutions on tensor cores want it.

        Raises:
            TypeError: the images are neither uint8 nor floating.
            ValueError: the shape is neither.
        """
        check_images(images, 1)
        full = 1 if images.is_floating_point() else 255
        normalised = channels_last(images) * (1 / (full * self.std)) - self.mean / self.std
        return normalised.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
