"""AdamW with a moving average and bf16 copies in one pass: the op, its registration and the public function."""

from typing import Any

import torch

from .. import multi_tensor
from ..library import define
from ..multi_tensor import Scalar, Tensors, as_scalar
from ..registry import Implementation, Op, check_impl, register


def _bind(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: Scalar,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    teachers: Tensors | None = None,
    ema_momentum: Scalar = 1.0,
    param_copies: Tensors | None = None,
    teacher_copies: Tensors | None = None,
    scales: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    if teacher_copies and not teachers:
        raise ValueError("teacher_copies are given without teachers; pass both")
    return (
        *(list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs)),
        *(list(tensors or ()) for tensors in (teachers, param_copies, teacher_copies)),
        list(steps),
        as_scalar("lr", lr),
        as_scalar("ema_momentum", ema_momentum),
        *betas,
        eps,
        weight_decay,
        scales,
        found_inf,
    )


OP = register(
    Op(
        name="adamw_ema_",
        bind=_bind,
        implementations=(
            multi_tensor.implementation(
                "adamw_ema_",
                "vitrail.kernels.adamw_ema.extension",
                "float32 or bfloat16 parameters and gradients, float32 moments and teachers, bfloat16 copies; "
                "corresponding tensors laid out alike",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.adamw_ema.reference",
                reasons={"forward": lambda *_: []},
                supports="any floating dtypes and strides",
            ),
        ),
    )
)
_forward = define(
    OP,
    "forward",
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] teachers, "
    "Tensor(e!)[] param_copies, Tensor(f!)[] teacher_copies, Tensor(g!)[] steps, Tensor lr, Tensor ema_momentum, "
    "float beta1, float beta2, float eps, float weight_decay, Tensor? scales, Tensor? found_inf",
    "()",
    lambda *_: None,
    opaque=False,
)


@torch.no_grad()
def adamw_ema_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: Scalar,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    teachers: Tensors | None = None,
    ema_momentum: Scalar = 1.0,
    param_copies: Tensors | None = None,
    teacher_copies: Tensors | None = None,
    scales: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Steps AdamW, moves the average of its weights and writes bf16 copies of both, each tensor read once.

    AdamW is that of Loshchilov & Hutter 2019 (arXiv 1711.05101) as `torch.optim.AdamW` computes it; the average is
    that of the weights after the step. In float32 the result is `torch.optim.AdamW(fused=True)` followed by
    `torch._foreach_lerp_`, bit for bit. :class:`FusedAdamWEMA` is the optimiser.

    Args:
        params: T tensors, float32 or bfloat16, updated in place.
        grads: Their gradients, float32 or bfloat16 each. Not written.
        exp_avgs: First moments, float32, updated.
        exp_avg_sqs: Second moments, float32, updated.
        steps: Steps taken so far, float32 of one element each, updated.
        lr: Learning rate, a number or a tensor of one element (on the GPU read there).
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay.
        teachers: Averages to update, float32; None for none.
        ema_momentum: m of t <- m t + (1 - m) p, as `lr`.
        param_copies: bfloat16 tensors that receive the new parameters; None for none.
        teacher_copies: bfloat16 tensors that receive the new averages; None for none.
        scales: float32 [] or [T], multiplied onto the gradients: clipping, or the end of loss scaling.
        found_inf: One float32 number on the device; unless it is 0, nothing changes, not even `steps`.
        impl: `auto`, `cuda` (the compiled extension, on CPU tensors its C++ twin) or `reference`.

    Raises:
        ValueError: Lists, shapes or devices do not correspond.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        teachers=teachers,
        ema_momentum=ema_momentum,
        param_copies=param_copies,
        teacher_copies=teacher_copies,
        scales=scales,
        found_inf=found_inf,
    )
    if arguments[0]:
        _forward(*arguments, impl)
