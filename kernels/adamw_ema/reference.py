"""AdamW with a moving average, with PyTorch's foreach ops."""

import math

import torch

from ..multi_tensor import check_lists, skipped, widened


def forward(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    teachers: list[torch.Tensor],
    param_copies: list[torch.Tensor],
    teacher_copies: list[torch.Tensor],
    steps: list[torch.Tensor],
    lr: torch.Tensor,
    ema_momentum: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scales: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    """Updates everything but the gradients.

    Reads scalars, steps and flags on the host. Works in float32, in float64 where the parameters are.

    Args:
        params: T floating tensors of any strides.
        grads: As many of the same shapes.
        exp_avgs: First moments.
        exp_avg_sqs: Second moments.
        teachers: Averages, or an empty list.
        param_copies: Copies of the parameters, or an empty list.
        teacher_copies: Copies of the averages, or an empty list.
        steps: T tensors of one element.
        lr: float64, one element.
        ema_momentum: float64, one element.
        beta1: Decay rate of the first moments.
        beta2: Decay rate of the second moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay.
        scales: Multipliers of the gradients, one element or T, or None.
        found_inf: One number, or None; unless it is 0, nothing changes.
    """
    optional = {"teachers": teachers, "param_copies": param_copies, "teacher_copies": teacher_copies}
    given = {name: tensors for name, tensors in optional.items() if tensors}
    check_lists(params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, **given)
    if skipped(found_inf):
        return
    rate = lr.item()
    torch._foreach_add_(steps, 1.0)
    counts = torch.stack(steps).tolist()
    values, gradients = widened(params), widened(grads, like=params, scales=scales)
    torch._foreach_mul_(values, 1.0 - rate * weight_decay)
    torch._foreach_lerp_(exp_avgs, gradients, 1.0 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1.0 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, [math.sqrt(1.0 - beta2**count) for count in counts])
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(values, exp_avgs, denominators, [-rate / (1.0 - beta1**count) for count in counts])
    torch._foreach_copy_(params, values)
    if teachers:
        current = [param.to(teacher.dtype) for param, teacher in zip(params, teachers, strict=True)]
        torch._foreach_lerp_(teachers, current, 1.0 - ema_momentum.item())
    if param_copies:
        torch._foreach_copy_(param_copies, params)
    if teacher_copies:
        torch._foreach_copy_(teacher_copies, teachers)
