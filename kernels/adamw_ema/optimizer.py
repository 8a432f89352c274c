"""AdamW that also moves the teacher and writes bf16 copies."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..multi_tensor import Scalar
from ..multi_tensor_ema import multi_tensor_ema_
from ..optimizers import FusedOptimizer, ParamGroup
from .op import adamw_ema_


class FusedAdamWEMA(FusedOptimizer):
    """AdamW, the moving average of its weights and bf16 copies of both, in one pass over memory.

    States have the names and the meaning of torch.optim.AdamW's, so that either loads the other's. The teacher and the
    copies belong to the caller and are no part of the state. Every option of a group may be changed between steps;
    `lr` and `ema_momentum` may be tensors of one element, whose values a captured CUDA graph reads anew.

    A parameter without a gradient keeps its value, and its teacher moves all the same.

    Args:
        params: Parameters, or dictionaries of parameters and their own options.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled decay.
        teacher: Maps parameters to their float32 averages; those left out have none.
        ema_momentum: m of t <- m t + (1 - m) p with the weights p after the step.
        param_copies: Maps parameters to bfloat16 tensors that receive them after each step.
        teacher_copies: Maps parameters to bfloat16 tensors that receive their averages.
        max_grad_norm: Limit of the gradient norm; None for none.
        clip_per_tensor: Limit the norm of each gradient, not of all together.
        skip_nonfinite: Change nothing at a step whose gradient norm is not finite.
        impl: `auto`, `cuda` (the compiled extension, on CPU tensors its C++ twin) or `reference`.

    Raises:
        TypeError: A parameter is not real and floating, or a teacher or copy has the wrong dtype.
        ValueError: An option is out of range, or a teacher or copy has another shape than its parameter.
    """

    _kept = (*FusedOptimizer._kept, "_teacher", "_param_copies", "_teacher_copies")

    def __init__(
        self,
        params: Iterable[Any],
        lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        teacher: Mapping[Tensor, Tensor] | None = None,
        ema_momentum: Scalar = 0.996,
        param_copies: Mapping[Tensor, Tensor] | None = None,
        teacher_copies: Mapping[Tensor, Tensor] | None = None,
        max_grad_norm: float | None = None,
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
        if not isinstance(ema_momentum, Tensor) and not 0 <= ema_momentum <= 1:
            raise ValueError(f"ema_momentum must be in [0, 1], got {ema_momentum}")
        self._teacher, self._param_copies = dict(teacher or {}), dict(param_copies or {})
        self._teacher_copies = dict(teacher_copies or {})
        _check_partners("teacher", self._teacher, (torch.float32, torch.float64))
        _check_partners("param_copies", self._param_copies, (torch.bfloat16,))
        _check_partners("teacher_copies", self._teacher_copies, (torch.bfloat16,))
        if not self._teacher_copies.keys() <= self._teacher.keys():
            raise ValueError("teacher_copies hold parameters that have no teacher")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "ema_momentum": ema_momentum,
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
                    "exp_avg": self.zeros(param),
                    "exp_avg_sq": self.zeros(param),
                }
        partners = (self._teacher, self._param_copies, self._teacher_copies)
        kinds: dict[tuple[bool, ...], list[int]] = {}  # a call's lists are whole or absent
        for index, param in enumerate(params):
            kinds.setdefault(tuple(param in mapping for mapping in partners), []).append(index)
        for kind, indices in kinds.items():
            chosen = [params[index] for index in indices]
            teachers, param_copies, teacher_copies = (
                [mapping[param] for param in chosen] if present else None
                for present, mapping in zip(kind, partners, strict=True)
            )
            states = [self.state[param] for param in chosen]
            adamw_ema_(
                chosen,
                [param.grad for param in chosen],  # type: ignore[misc]
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                teachers=teachers,
                ema_momentum=group["ema_momentum"],
                param_copies=param_copies,
                teacher_copies=teacher_copies,
                scales=self.scales_of(scales, indices) if len(kinds) > 1 else scales,
                found_inf=found_inf,
                impl=self.impl,
            )
        self._move_teachers_of_the_rest(group, params, found_inf)

    def _move_teachers_of_the_rest(self, group: ParamGroup, done: list[Tensor], found_inf: Tensor | None) -> None:
        """Moves the averages of parameters without a gradient."""
        if not self._teacher or len(done) == len(group["params"]):
            return
        rest = [param for param in group["params"] if param.grad is None and param in self._teacher]
        for copied in (True, False):
            chosen = [param for param in rest if (param in self._teacher_copies) == copied]
            multi_tensor_ema_(
                [self._teacher[param] for param in chosen],
                chosen,
                group["ema_momentum"],
                shadow=[self._teacher_copies[param] for param in chosen] if copied else None,
                found_inf=found_inf,
                impl=self.impl,
            )


def _check_partners(name: str, partners: Mapping[Tensor, Tensor], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises unless every partner has its parameter's shape and one of `dtypes`."""
    for param, partner in partners.items():
        if partner.shape != param.shape:
            raise ValueError(
                f"{name} holds a tensor of shape {list(partner.shape)} for a parameter of {list(param.shape)}"
            )
        if partner.dtype not in dtypes:
            raise TypeError(
                f"{name} must be {' or '.join(map(str, dtypes))}, got {partner.dtype}; convert it with .to()"
            )
        if partner.requires_grad:
            raise ValueError(f"{name} holds a tensor that requires a gradient; call requires_grad_(False) on it")
