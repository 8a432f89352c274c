"""Scaling in plain PyTorch."""

import torch

from ..multi_tensor import check_lists


def forward(tensors: list[torch.Tensor], scales: torch.Tensor) -> None:
    """Multiplies every tensor by its scale.

    Args:
        tensors: At least one floating tensor, any dtype and strides.
        scales: float32, one element or one for each tensor, on the same device.
    """
    check_lists(tensors=tensors)
    for tensor, scale in zip(tensors, scales.expand(len(tensors)), strict=True):
        tensor.mul_(scale)
