"""Norms in the compiled extension."""

import torch

from ..multi_tensor import call


def forward(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns total, norms and the flag; as :func:`.reference.forward`."""
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = call("multi_tensor_norm", tensors)
    return result
