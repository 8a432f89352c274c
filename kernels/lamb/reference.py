"""LAMB with PyTorch's foreach ops."""

import math

import torch

from ..multi_tensor import check_lists, skipped, widened


def forward(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_averaging: bool,
    adapt: bool,
    scales: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    """Updates everything but the gradients.

    Reads scalars, norms, steps and flags on the host. Works in float32, in float64 where the parameters are.

    Args:
        params: T floating tensors of any strides.
        grads: As many of the same shapes.
        exp_avgs: First moments.
        exp_avg_sqs: Second moments.
        steps: T tensors of one element.
        lr: float64, one element.
        beta1: Decay rate of the first moments.
        beta2: Decay rate of the second moments.
        eps: Added to the denominator.
        weight_decay: Decay, a part of the update whose norm is taken.
        grad_averaging: Multiply the gradient by 1 - beta1 in the first moment.
        adapt: Whether to multiply by a trust ratio.
        scales: Multipliers of the gradients, one element or T, or None.
        found_inf: One number, or None; unless it is 0, nothing changes.
    """
    check_lists(params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if skipped(found_inf):
        return
    rate = lr.item()
    torch._foreach_add_(steps, 1.0)
    counts = torch.stack(steps).tolist()
    values, gradients = widened(params), widened(grads, like=params, scales=scales)
    means, squares = widened(exp_avgs, like=params), widened(exp_avg_sqs, like=params)
    if grad_averaging:
        torch._foreach_lerp_(means, gradients, 1.0 - beta1)
    else:
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, gradients)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)
    torch._foreach_copy_(exp_avgs, means)
    torch._foreach_copy_(exp_avg_sqs, squares)
    # The update is that of the moments as they are stored.
    means, squares = widened(exp_avgs, like=params), widened(exp_avg_sqs, like=params)
    denominators = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(denominators, [math.sqrt(1.0 - beta2**count) for count in counts])
    torch._foreach_add_(denominators, eps)
    updates = list(torch._foreach_mul(values, weight_decay))
    torch._foreach_addcdiv_(updates, means, denominators, [1.0 / (1.0 - beta1**count) for count in counts])
    ratios = _ratios(values, updates) if adapt else [1.0] * len(params)
    torch._foreach_mul_(updates, [-(rate * ratio) for ratio in ratios])
    torch._foreach_add_(values, updates)
    torch._foreach_copy_(params, values)


def _ratios(values: list[torch.Tensor], updates: list[torch.Tensor]) -> list[float]:
    """Norm of the parameter over that of the update; 1 where either is zero, or no number."""
    norms = [
        torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).tolist()
        for tensors in (values, updates)
    ]
    return [value / update if value > 0 and update > 0 else 1.0 for value, update in zip(*norms, strict=True)]
