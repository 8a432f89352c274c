"""What the fused optimisers share: which gradients there are, their clipping, and states that keep their dtype."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .multi_tensor_norm import multi_tensor_norm
from .multi_tensor_norm.clip import clip_scales
from .multi_tensor_norm.op import Norms
from .registry import check_impl

ParamGroup = dict[str, Any]


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the optimisers whose step is one or two launches for each parameter group.

    As with torch's fused optimisers, the attributes `found_inf` and `grad_scale` (0-d float32 tensors that a gradient
    scaler sets) make a step do nothing, or divide the gradients. Parameters without a gradient are passed over. NaN
    gradients make NaN weights, as in torch.optim, unless `skip_nonfinite` is set.

    Attributes:
        norms: Gradient norms of the last step before clipping, on the device; None if nothing asked for them.

    Args:
        params: Parameters, or dictionaries of parameters and their own options.
        defaults: Options of groups that do not have their own.
        max_grad_norm: Limit of the gradient norm; None for none. The gradients themselves are not written.
        clip_per_tensor: Limit the norm of each gradient, not of all together.
        skip_nonfinite: Change nothing at a step whose gradient norm is not finite; `norms.found_inf` tells.
        impl: `auto`, `cuda` or `reference`.

    Raises:
        TypeError: A parameter is not real and floating.
        ValueError: An option is out of range.
    """

    _step_supports_amp_scaling = True
    # Attributes that copies and pickles keep; torch's own keep the states and the groups alone.
    _kept: tuple[str, ...] = ("max_grad_norm", "clip_per_tensor", "skip_nonfinite", "impl", "norms")

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None = None,
        clip_per_tensor: bool = False,
        skip_nonfinite: bool = False,
        impl: str = "auto",
    ) -> None:
        check_impl(impl)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no limit, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.clip_per_tensor = clip_per_tensor
        self.skip_nonfinite = skip_nonfinite
        self.impl = impl
        self.norms: Norms | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Adds parameters with options of their own.

        Raises:
            TypeError: A parameter is not real and floating.
        """
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                raise TypeError(f"parameters must be of a real floating dtype, got {param.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: Computes the loss and its gradients anew; called first, if given.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, list(self._with_gradient(group))) for group in self.param_groups]
        gradients: list[Tensor] = [param.grad for _, params in groups for param in params]  # type: ignore[misc]
        scales, found_inf = self._scales_and_flag(gradients)
        first = 0
        for group, params in groups:
            own = scales if scales is None or scales.ndim == 0 else scales[first : first + len(params)]
            first += len(params)
            self._update(group, params, own, found_inf)
        return loss

    @abstractmethod
    def _update(self, group: ParamGroup, params: list[Tensor], scales: Tensor | None, found_inf: Tensor | None) -> None:
        """Updates the parameters of a group that have a gradient; `scales` are theirs."""

    def _with_gradient(self, group: ParamGroup) -> Iterator[Tensor]:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} takes dense gradients, got layout {param.grad.layout} for a parameter of "
                    f"shape {list(param.shape)}; use torch.optim.SparseAdam, or sparse=False in the embedding"
                )
            yield param

    def _scales_and_flag(self, gradients: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Returns what gradients are to be multiplied by ([], [T] or None), and the flag that forbids the step."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        self.norms = None
        scales = None if grad_scale is None else grad_scale.float().reciprocal().reshape(())
        if gradients and (self.max_grad_norm is not None or self.skip_nonfinite):
            norms = multi_tensor_norm(gradients, impl=self.impl)
            if scales is not None:
                norms = Norms(norms.total * scales, norms.norms * scales, norms.found_inf)
            self.norms = norms
            if self.skip_nonfinite:
                found_inf = norms.found_inf if found_inf is None else torch.maximum(found_inf, norms.found_inf)
            if self.max_grad_norm is not None:
                clip = clip_scales(norms, self.max_grad_norm, per_tensor=self.clip_per_tensor)
                scales = clip if scales is None else clip * scales
        return scales, None if found_inf is None else found_inf.float()

    @staticmethod
    def scales_of(scales: Tensor | None, indices: list[int]) -> Tensor | None:
        """Returns the multipliers of some of the parameters, without an index that would travel to the device."""
        if scales is None or scales.ndim == 0:
            return scales
        each = scales.unbind()
        return torch.stack([each[index] for index in indices])

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy or a pickle keeps."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over a state; options that its groups do not know get their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of the torch.optim class with the same keys.

        torch would cast moments to the parameters' dtype; here they keep their own.
        """
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key == "step":
                    value = torch.as_tensor(value, dtype=torch.float32)
                if isinstance(value, Tensor):
                    self.state[param][key] = value.detach().clone(memory_format=torch.preserve_format).to(param.device)

    @staticmethod
    def zeros(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a state like a parameter: its layout, float32 or wider unless `dtype` is given."""
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        return torch.zeros_like(param, dtype=dtype or wide, memory_format=torch.preserve_format)

    @staticmethod
    def new_step(param: Tensor) -> Tensor:
        """Returns the step counter of a parameter: 0, on its device, where a captured graph counts."""
        return torch.zeros((), dtype=torch.float32, device=param.device)
