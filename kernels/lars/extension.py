"""LARS in the compiled extension."""

from typing import Any

import torch

from ..multi_tensor import call


def forward(
    params: list[torch.Tensor], grads: list[torch.Tensor], momentum_buffers: list[torch.Tensor], *rest: Any
) -> None:
    """Updates parameters and momenta; arguments as in :func:`.reference.forward`."""
    call("lars_", params, grads, momentum_buffers, *rest, changes=(params, momentum_buffers))
