"""Raw images as the input of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.kernels.patches import channels_last, check_images


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
