"""Scaling in the compiled extension."""

import torch

from ..multi_tensor import call


def forward(tensors: list[torch.Tensor], scales: torch.Tensor) -> None:
    """Scales the tensors; arguments as in :func:`.reference.forward`."""
    call("multi_tensor_scale_", tensors, scales, changes=(tensors,))
