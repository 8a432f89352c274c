"""Layer-wise adaptive rate scaling: the op, its registration and the public function."""

from typing import Any

import torch

from .. import multi_tensor
from ..library import define
from ..multi_tensor import Scalar, Tensors, as_scalar
from ..registry import Implementation, Op, check_impl, register

DENOMINATORS = ("sum", "parts")


def check_denominator(denominator: str) -> None:
    """Raises ValueError unless `denominator` is one of `DENOMINATORS`."""
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator must be one of {', '.join(map(repr, DENOMINATORS))}, got {denominator!r}")


def _bind(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    *,
    lr: Scalar,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
    adapt: bool = True,
    lr_in_momentum: bool = False,
    denominator: str = "sum",
    clip_ratio: bool = False,
    scales: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments."""
    check_denominator(denominator)
    return (
        *(list(tensors) for tensors in (params, grads, momentum_buffers)),
        as_scalar("lr", lr),
        momentum,
        weight_decay,
        trust_coefficient,
        eps,
        adapt,
        lr_in_momentum,
        denominator == "parts",
        clip_ratio,
        scales,
        found_inf,
    )


OP = register(
    Op(
        name="lars_",
        bind=_bind,
        implementations=(
            multi_tensor.implementation(
                "lars_",
                "vitrail.kernels.lars.extension",
                "float32 or bfloat16 parameters and gradients, float32 momenta; corresponding tensors laid out alike",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.lars.reference",
                reasons={"forward": lambda *_: []},
                supports="any floating dtypes and strides",
            ),
        ),
    )
)
_forward = define(
    OP,
    "forward",
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, float momentum, "
    "float weight_decay, float trust_coefficient, float eps, bool adapt, bool lr_in_momentum, bool parts, "
    "bool clip_ratio, Tensor? scales, Tensor? found_inf",
    "()",
    lambda *_: None,
    opaque=False,
)


@torch.no_grad()
def lars_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    *,
    lr: Scalar,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
    adapt: bool = True,
    lr_in_momentum: bool = False,
    denominator: str = "sum",
    clip_ratio: bool = False,
    scales: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Steps SGD with momentum whose rate is scaled, tensor by tensor, to the norm of the weights.

    LARS (You, Gitman & Ginsburg 2017, arXiv 1708.03888) in the forms that self-supervised learning uses; the defaults
    are those of MoCo v3's official code. :class:`FusedLARS` is the optimiser and names the forms.

    Args:
        params: T tensors p, float32 or bfloat16, updated in place.
        grads: Their gradients g, float32 or bfloat16 each. Not written.
        momentum_buffers: Momenta, float32, updated; zeros before the first step.
        lr: Learning rate, a number or a tensor of one element (on the GPU read there).
        momentum: Share of the momentum that stays.
        weight_decay: Decay, added to the gradient: u = g + decay p.
        trust_coefficient: Factor of the trust ratio.
        eps: Added to the denominator `parts`.
        adapt: Multiply u by the trust ratio; without it, this is SGD.
        lr_in_momentum: Put lr u into the momentum (SimCLR), not lr times the momentum into the weights.
        denominator: `sum`: the ratio is trust |p| / |u|, and 1 where a norm is 0. `parts`: it is
            trust |p| / (|g| + decay |p| + eps), and where a norm is 0 there is no decay either.
        clip_ratio: Replace the ratio by min(ratio / lr, 1): it becomes a limit of the rate itself.
        scales: float32 [] or [T], multiplied onto the gradients: clipping, or the end of loss scaling.
        found_inf: One float32 number on the device; unless it is 0, nothing changes.
        impl: `auto`, `cuda` (the compiled extension, on CPU tensors its C++ twin) or `reference`.

    Raises:
        ValueError: Lists, shapes or devices do not correspond, or an unknown `denominator`.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(
        params,
        grads,
        momentum_buffers,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        adapt=adapt,
        lr_in_momentum=lr_in_momentum,
        denominator=denominator,
        clip_ratio=clip_ratio,
        scales=scales,
        found_inf=found_inf,
    )
    if arguments[0]:
        _forward(*arguments, impl)
