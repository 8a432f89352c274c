"""Moving average in the compiled extension."""

import torch

from ..multi_tensor import call


def forward(
    teacher: list[torch.Tensor],
    student: list[torch.Tensor],
    shadow: list[torch.Tensor],
    momentum: torch.Tensor,
    found_inf: torch.Tensor | None,
) -> None:
    """Updates the teachers; arguments as in :func:`.reference.forward`."""
    call("multi_tensor_ema_", teacher, student, shadow, momentum, found_inf, changes=(teacher, shadow))
