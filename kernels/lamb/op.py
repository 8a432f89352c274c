"""Adam with a trust ratio for each tensor: the op, its registration and the public function."""

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
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    grad_averaging: bool = True,
    adapt: bool = True,
    use_nvlamb: bool = False,
    scales: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments."""
    return (
        *(list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)),
        as_scalar("lr", lr),
        *betas,
        eps,
        weight_decay,
        grad_averaging,
        adapt and (use_nvlamb or weight_decay != 0),
        scales,
        found_inf,
    )


OP = register(
    Op(
        name="lamb_",
        bind=_bind,
        implementations=(
            multi_tensor.implementation(
                "lamb_",
                "vitrail.kernels.lamb.extension",
                "float32 or bfloat16 parameters, gradients and moments, both moments of a tensor alike; "
                "corresponding tensors laid out alike",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.lamb.reference",
                reasons={"forward": lambda *_: []},
                supports="any floating dtypes and strides",
            ),
        ),
    )
)
_forward = define(
    OP,
    "forward",
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool grad_averaging, bool adapt, "
    "Tensor? scales, Tensor? found_inf",
    "()",
    lambda *_: None,
    opaque=False,
)


@torch.no_grad()
def lamb_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: Scalar,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    grad_averaging: bool = True,
    adapt: bool = True,
    use_nvlamb: bool = False,
    scales: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Steps Adam with decoupled decay, each tensor's update scaled to the norm of its weights.

    LAMB (You et al. 2020, arXiv 1904.00962) with bias correction, as NVIDIA's apex computes it in its AdamW mode.
    :class:`FusedLAMB` is the optimiser. The update is recomputed from the stored moments once its norm is known, not
    stored: 40 bytes a float32 parameter.

    Args:
        params: T tensors p, float32 or bfloat16, updated in place.
        grads: Their gradients, float32 or bfloat16 each. Not written.
        exp_avgs: First moments, float32 or bfloat16, updated.
        exp_avg_sqs: Second moments, of the same dtype, updated.
        steps: Steps taken so far, float32 of one element each, updated.
        lr: Learning rate, a number or a tensor of one element (on the GPU read there).
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decay: u = Adam's direction + decay p.
        grad_averaging: Multiply the gradient by 1 - beta1 in the first moment.
        adapt: Multiply u by the trust ratio |p| / |u|, 1 where a norm is 0.
        use_nvlamb: Also without decay; the published LAMB adapts decayed tensors alone.
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
        grad_averaging=grad_averaging,
        adapt=adapt,
        use_nvlamb=use_nvlamb,
        scales=scales,
        found_inf=found_inf,
    )
    if arguments[0]:
        _forward(*arguments, impl)
