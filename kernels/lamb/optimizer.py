"""LAMB with clipping by the global norm inside."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..multi_tensor import Scalar
from ..optimizers import FusedOptimizer, ParamGroup
from .op import lamb_

STATE_DTYPES = (None, torch.float32, torch.bfloat16)


class FusedLAMB(FusedOptimizer):
    """Adam with decoupled decay, each tensor's update scaled to the norm of its weights.

    As NVIDIA's apex computes it in its AdamW mode, with its defaults: gradients are limited to a global norm of 1 (over
    all groups), groups without decay take plain Adam steps unless `use_nvlamb`. bfloat16 parameters, gradients and
    moments are taken as they are. States have the names and the meaning of torch.optim.AdamW's.

    Every option of a group may be changed between steps; `lr` may be a tensor of one element, whose value a captured
    CUDA graph reads anew.

    Args:
        params: Parameters, or dictionaries of parameters and their own options.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decay, part of the update whose norm is taken.
        grad_averaging: Multiply the gradient by 1 - beta1 in the first moment.
        use_nvlamb: Scale groups without decay as well.
        adapt: Scale updates at all.
        state_dtype: bfloat16 for moments in it; None is float32, float64 for float64 parameters. A bfloat16 second
            moment hardly falls: with a second beta above 0.998, never.
        max_grad_norm: Limit of the gradient norm; None for none.
        clip_per_tensor: Limit the norm of each gradient, not of all together.
        skip_nonfinite: Change nothing at a step whose gradient norm is not finite.
        impl: `auto`, `cuda` (the compiled extension, on CPU tensors its C++ twin) or `reference`.

    Raises:
        TypeError: A parameter is not real and floating, or the wrong `state_dtype`.
        ValueError: An option is out of range.
    """

    _kept = (*FusedOptimizer._kept, "state_dtype")

    def __init__(
        self,
        params: Iterable[Any],
        lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        grad_averaging: bool = True,
        use_nvlamb: bool = False,
        adapt: bool = True,
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = 1.0,
        clip_per_tensor: bool = False,
        skip_nonfinite: bool = False,
        impl: str = "auto",
    ) -> None:
        if not isinstance(lr, Tensor) and lr < 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if eps < 0 or weight_decay < 0:
            raise ValueError(f"eps and weight_decay must not be negative, got {eps} and {weight_decay}")
        if state_dtype not in STATE_DTYPES:
            raise TypeError(f"state_dtype must be torch.float32, torch.bfloat16 or None, got {state_dtype}")
        self.state_dtype = state_dtype
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "use_nvlamb": use_nvlamb,
            "adapt": adapt,
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            clip_per_tensor=clip_per_tensor,
            skip_nonfinite=skip_nonfinite,
            impl=impl,
        )

    def _update(self, group: ParamGroup, params: list[Tensor], scales: Tensor | None, found_inf: Tensor | None) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param] = {
                    "step": self.new_step(param),
                    "exp_avg": self.zeros(param, self.state_dtype),
                    "exp_avg_sq": self.zeros(param, self.state_dtype),
                }
        states = [self.state[param] for param in params]
        lamb_(
            params,
            [param.grad for param in params],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_averaging=group["grad_averaging"],
            adapt=group["adapt"],
            use_nvlamb=group["use_nvlamb"],
            scales=scales,
            found_inf=found_inf,
            impl=self.impl,
        )
