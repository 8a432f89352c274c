"""Norms with PyTorch's own reductions."""

import torch

from ..multi_tensor import check_lists


def forward(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the norm of all elements, the norms of the tensors, and 1 if the former is not finite.

    Args:
        tensors: At least one floating tensor, any dtype and strides.

    Returns:
        float32 tensors of shapes [], [T] and [].
    """
    check_lists(tensors=tensors)
    # PyTorch adds float32 squares in float32, and is off by 2e-6 of the sum of some ten thousand.
    norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    total = torch.linalg.vector_norm(norms).float()
    return total, norms.float(), (~total.isfinite()).float()
