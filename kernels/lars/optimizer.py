"""LARS in the forms that self-supervised learning uses."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..multi_tensor import Scalar
from ..optimizers import FusedOptimizer, ParamGroup
from .op import check_denominator, lars_

_MOCO_V3 = {
    "denominator": "sum",
    "lr_in_momentum": False,
    "clip_ratio": False,
    "exclude_1d": True,
    "adapt_undecayed": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "moco_v3": _MOCO_V3,
    "simclr": {**_MOCO_V3, "lr_in_momentum": True},
    "lightly": {**_MOCO_V3, "denominator": "parts", "exclude_1d": False, "adapt_undecayed": False},
    "solo": {**_MOCO_V3, "denominator": "parts", "clip_ratio": True},
}


class FusedLARS(FusedOptimizer):
    """SGD with momentum whose rate is scaled, tensor by tensor, to the norm of the weights; one or two launches.

    `variant` names whose LARS it is, and each of its options may be set on its own, in groups too:

    * `moco_v3`: the ratio is trust |p| / |g + decay p|, the learning rate multiplies the momentum; tensors of fewer
      than two dimensions have neither decay nor ratio. MAE's linear probe takes it, too.
    * `simclr`: the same with the learning rate inside the momentum, as in SimCLR's TensorFlow code.
    * `lightly`: the ratio is trust |p| / (|g| + decay |p| + eps); groups without decay have none, whatever the
      dimensions; where a norm is 0, there is no decay either.
    * `solo`: solo-learn's with `clip_lr` and excluded biases and norms: lightly's ratio, for every tensor of two or
      more dimensions, over the learning rate and at most 1. Its recipes take a `trust_coefficient` of 0.02.

    All states are `momentum_buffer`, as lightly's and those of torch.optim.SGD. Every option of a group may be changed
    between steps; `lr` may be a tensor of one element, whose value a captured CUDA graph reads anew.

    Args:
        params: Parameters, or dictionaries of parameters and their own options.
        lr: Learning rate.
        momentum: Share of the momentum that stays.
        weight_decay: Decay, added to the gradient.
        trust_coefficient: Factor of the ratio.
        eps: Added to the denominator `parts`.
        variant: `moco_v3`, `simclr`, `lightly` or `solo`: the options that follow, where they are None.
        denominator: `sum` or `parts`; see :func:`lars_`.
        lr_in_momentum: Put the learning rate into the momentum.
        clip_ratio: Replace the ratio by min(ratio / lr, 1).
        exclude_1d: Spare tensors of fewer than two dimensions decay and ratio.
        adapt_undecayed: Scale groups without decay as well.
        max_grad_norm: Limit of the gradient norm; None for none.
        clip_per_tensor: Limit the norm of each gradient, not of all together.
        skip_nonfinite: Change nothing at a step whose gradient norm is not finite.
        impl: `auto`, `cuda` (the compiled extension, on CPU tensors its C++ twin) or `reference`.

    Raises:
        TypeError: A parameter is not real and floating.
        ValueError: An option is out of range or unknown.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Scalar,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        *,
        variant: str = "moco_v3",
        denominator: str | None = None,
        lr_in_momentum: bool | None = None,
        clip_ratio: bool | None = None,
        exclude_1d: bool | None = None,
        adapt_undecayed: bool | None = None,
        max_grad_norm: float | None = None,
        clip_per_tensor: bool = False,
        skip_nonfinite: bool = False,
        impl: str = "auto",
    ) -> None:
        if not isinstance(lr, Tensor) and lr < 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if momentum < 0 or weight_decay < 0:
            raise ValueError(f"momentum and weight_decay must not be negative, got {momentum} and {weight_decay}")
        if trust_coefficient <= 0 or eps < 0:
            raise ValueError(f"trust_coefficient must be positive and eps not negative, got {trust_coefficient}, {eps}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
        chosen = {
            "denominator": denominator,
            "lr_in_momentum": lr_in_momentum,
            "clip_ratio": clip_ratio,
            "exclude_1d": exclude_1d,
            "adapt_undecayed": adapt_undecayed,
        }
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            **VARIANTS[variant],
            **{name: value for name, value in chosen.items() if value is not None},
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            clip_per_tensor=clip_per_tensor,
            skip_nonfinite=skip_nonfinite,
            impl=impl,
        )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Adds parameters with options of their own.

        Raises:
            TypeError: A parameter is not real and floating.
            ValueError: An unknown `denominator`.
        """
        check_denominator(param_group.get("denominator", self.defaults["denominator"]))
        super().add_param_group(param_group)

    def _update(self, group: ParamGroup, params: list[Tensor], scales: Tensor | None, found_inf: Tensor | None) -> None:
        for param in params:
            # SGD and lightly know states without a momentum
            if self.state[param].get("momentum_buffer") is None:
                self.state[param]["momentum_buffer"] = self.zeros(param)
        spared = [group["exclude_1d"] and param.ndim < 2 for param in params]
        for excluded in (False, True):
            indices = [index for index, value in enumerate(spared) if value == excluded]
            if not indices:
                continue
            decay = 0.0 if excluded else group["weight_decay"]
            lars_(
                [params[index] for index in indices],
                [params[index].grad for index in indices],  # type: ignore[misc]
                [self.state[params[index]]["momentum_buffer"] for index in indices],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=decay,
                trust_coefficient=group["trust_coefficient"],
                eps=group["eps"],
                adapt=not excluded and (decay != 0 or group["adapt_undecayed"]),
                lr_in_momentum=group["lr_in_momentum"],
                denominator=group["denominator"],
                clip_ratio=group["clip_ratio"],
                scales=self.scales_of(scales, indices) if len(indices) < len(params) else scales,
                found_inf=found_inf,
                impl=self.impl,
            )
