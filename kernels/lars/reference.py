"""LARS with PyTorch's foreach ops."""

import math

import torch

from ..multi_tensor import check_lists, skipped, widened


def forward(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    momentum_buffers: list[torch.Tensor],
    lr: torch.Tensor,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    adapt: bool,
    lr_in_momentum: bool,
    parts: bool,
    clip_ratio: bool,
    scales: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    """Updates parameters and momenta.

    Reads scalars, norms and flags on the host. Works in float32, in float64 where the parameters are.

    Args:
        params: T floating tensors of any strides.
        grads: As many of the same shapes.
        momentum_buffers: As many of the same shapes.
        lr: float64, one element.
        momentum: Share of the momentum that stays.
        weight_decay: Decay, added to the gradient.
        trust_coefficient: Factor of the trust ratio.
        eps: Added to the sum of `parts`.
        adapt: Whether to multiply by a trust ratio at all.
        lr_in_momentum: Multiply what enters the momentum by `lr`, not what leaves it.
        parts: Divide by the sum of the norms of gradient and decay, not by the norm of their sum.
        clip_ratio: Divide the ratio by `lr`, and limit it to 1.
        scales: Multipliers of the gradients, one element or T, or None.
        found_inf: One number, or None; unless it is 0, nothing changes.
    """
    check_lists(params=params, grads=grads, momentum_buffers=momentum_buffers)
    if skipped(found_inf):
        return
    rate = lr.item()
    values, updates = widened(params), widened(grads, like=params, scales=scales)
    momenta = widened(momentum_buffers, like=params)
    decays = [weight_decay] * len(params)
    factors = [1.0] * len(params)
    if adapt and parts:
        for index, (weight, gradient) in enumerate(zip(_norms(params), _norms(updates), strict=True)):
            if weight != 0 and gradient != 0:
                ratio = trust_coefficient * weight / (gradient + weight * weight_decay + eps)
                factors[index] = _clipped(ratio, rate) if clip_ratio else ratio
            else:
                decays[index] = 0.0  # as the code that this form comes from
    updates = [
        torch.add(update, value, alpha=decay) if decay else update
        for update, value, decay in zip(updates, values, decays, strict=True)
    ]
    if adapt and not parts:
        for index, (weight, update) in enumerate(zip(_norms(params), _norms(updates), strict=True)):
            if weight > 0 and update > 0:
                ratio = trust_coefficient * weight / update
                factors[index] = _clipped(ratio, rate) if clip_ratio else ratio
    if lr_in_momentum:
        factors = [rate * factor for factor in factors]
    updates = list(torch._foreach_mul(updates, factors))
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, updates)
    torch._foreach_add_(values, momenta, alpha=-1.0 if lr_in_momentum else -rate)
    torch._foreach_copy_(momentum_buffers, momenta)
    torch._foreach_copy_(params, values)


def _norms(tensors: list[torch.Tensor]) -> list[float]:
    norms: list[float] = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).tolist()
    return norms


def _clipped(ratio: float, rate: float) -> float:
    """min(ratio / rate, 1); a NaN stays one."""
    quotient = ratio / rate if rate else ratio * math.inf
    return 1.0 if quotient > 1.0 else quotient
