"""LAMB in the compiled extension."""

from typing import Any

import torch

from ..multi_tensor import call


def forward(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    *rest: Any,
) -> None:
    """Updates everything but the gradients; arguments as in :func:`.reference.forward`."""
    states = (exp_avgs, exp_avg_sqs, steps)
    call("lamb_", params, grads, *states, *rest, changes=(params, *states))
