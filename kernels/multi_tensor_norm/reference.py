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
    norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=_wide(tensor.dtype)).double() for tensor in tensors])
    total = torch.linalg.vector_norm(norms).float()
    return total, norms.float(), (~total.isfinite()).float()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
