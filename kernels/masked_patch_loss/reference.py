"""The masked-patch loss in plain PyTorch, with the backward that the kernels use: statistics are recomputed."""

from collections.abc import Sequence

import torch

from ..masked_patch_gather import reference as gather
from ..patches import patch_width

EPS = 1e-6


def compute_dtype(pred: torch.Tensor) -> torch.dtype:
    """Returns the dtype of targets, statistics and loss: float64 for float64 predictions, else float32."""
    return torch.float64 if pred.dtype == torch.float64 else torch.float32


def targets(
    pred: torch.Tensor,
    images: torch.Tensor,
    masked_indices: torch.Tensor,
    patch_size: int,
    norm_pix: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Returns the target of every masked patch: [B, M, 3 P²], float32, or float64 for float64 predictions."""
    width = patch_width(patch_size)
    target = gather.forward(images, masked_indices, patch_size, mean, std, width, compute_dtype(pred))
    if norm_pix:
        target -= target.mean(-1, keepdim=True)
        variance = target.square().sum(-1, keepdim=True).div_(width - 1)
        target *= variance.add_(EPS).rsqrt_()
    return target


def forward(
    pred: torch.Tensor,
    images: torch.Tensor,
    masked_indices: torch.Tensor,
    patch_size: int,
    norm_pix: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Computes the mean squared error against the pixels of the masked patches.

    Args:
        pred: [B, M, columns], columns at least 3 P²; the surplus is ignored.
        images: [B, H, W, 3] or [B, 3, H, W], uint8 or floating.
        masked_indices: [B, M] int64.
        patch_size: Side of a patch in pixels.
        norm_pix: Whether to normalise each target patch by its own mean and unbiased variance.
        mean: Three channel means, or empty for none.
        std: Three channel standard deviations, or empty for none.

    Returns:
        A scalar, float32, or float64 for float64 predictions.
    """
    difference = targets(pred, images, masked_indices, patch_size, norm_pix, mean, std)
    difference -= pred[..., : difference.shape[-1]]
    return difference.square_().mean()


def backward(
    grad: torch.Tensor,
    pred: torch.Tensor,
    images: torch.Tensor,
    masked_indices: torch.Tensor,
    patch_size: int,
    norm_pix: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Computes the gradient of the predictions: `2 grad (pred - target) / (B M K)`, zero in surplus columns.

    Args:
        grad: Scalar, the gradient of the loss; read on the device.
        pred: As in `forward`.
        images: As in `forward`.
        masked_indices: As in `forward`.
        patch_size: As in `forward`.
        norm_pix: As in `forward`.
        mean: As in `forward`.
        std: As in `forward`.

    Returns:
        Like `pred`, contiguous.
    """
    target = targets(pred, images, masked_indices, patch_size, norm_pix, mean, std)
    width = target.shape[-1]
    result = torch.empty_like(pred, memory_format=torch.contiguous_format)
    difference = target.sub_(pred[..., :width])
    result[..., :width] = difference.mul_(grad * (-2 / difference.numel()))
    result[..., width:] = 0
    return result
