"""A bias and GELU: the op, its registration, its gradients and the public function."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import checks, extension
from ..library import define
from ..registry import Implementation, Op, check_impl, register


def _bind(x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the public arguments."""
    for name, tensor in (("x", x), ("bias", bias)):
        checks.check_floating(name, tensor)
    checks.check_same_device(x=x, bias=bias)
    checks.check_shape("bias", bias, ("C",))
    if x.dim() < 2 or x.shape[-1] != len(bias):
        raise ValueError(f"x must have shape [..., {len(bias)}], the last size that of the bias, got {list(x.shape)}")
    return x, bias


def _extension_reasons(x: torch.Tensor, bias: torch.Tensor) -> list[str]:
    """Returns why the compiled extension cannot run this call."""
    if x.device.type != "cpu":
        return [f"x is on {x.device}; of this op the extension has the CPU's side alone; use the reference"]
    reasons = extension.reasons(x.device)
    if not torch.cpu._is_avx512_bf16_supported():
        reasons.append("the CPU has no AVX-512 with BF16, for which the extension is written; use the reference")
    reasons += checks.dtype_reasons((torch.bfloat16,), x=x.dtype)
    if len(bias) % 16 or not len(bias):
        reasons.append(f"there are {len(bias)} columns; the kernel takes multiples of 16; use the reference")
    return reasons + _contiguous_reasons(x=x)


def _extension_backward_reasons(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> list[str]:
    """Returns why the compiled extension cannot run this call."""
    reasons = _extension_reasons(x, bias)
    if grad.dtype != x.dtype:
        reasons.append(f"grad is {grad.dtype}, but x {x.dtype}; convert grad")
    return reasons + _contiguous_reasons(grad=grad)


def _contiguous_reasons(**tensors: torch.Tensor) -> list[str]:
    return [
        f"{name} has strides {list(tensor.stride())}; the kernel takes adjacent values; pass {name}.contiguous()"
        for name, tensor in tensors.items()
        if not tensor.is_contiguous()
    ]


OP = register(
    Op(
        name="bias_gelu",
        bind=_bind,
        implementations=(
            Implementation(
                name="cuda",
                module="vitrail.kernels.bias_gelu.extension",
                reasons={"forward": _extension_reasons, "backward": _extension_backward_reasons},
                supports="CPU with AVX-512 and BF16: bf16; columns a multiple of 16; contiguous",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.bias_gelu.reference",
                reasons={"forward": lambda *_: [], "backward": lambda *_: []},
                supports="any device, dtype and strides",
            ),
        ),
    )
)
_forward = define(OP, "forward", "Tensor x, Tensor bias", "Tensor", lambda x, bias: torch.empty_like(x))
_backward = define(
    OP,
    "backward",
    "Tensor grad, Tensor x, Tensor bias",
    "(Tensor grad_x, Tensor grad_bias)",
    lambda grad, x, bias: (torch.empty_like(x), torch.empty_like(bias)),
)


class _BiasGELU(torch.autograd.Function):
    """The op with its gradients."""

    @staticmethod
    def forward(ctx: Any, impl: str, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Keeps the inputs."""
        ctx.save_for_backward(x, bias)
        ctx.impl = impl
        result: torch.Tensor = _forward(x, bias, impl)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradients of x and bias."""
        grads = _backward(grad, *ctx.saved_tensors, ctx.impl)
        wanted = (value if want else None for value, want in zip(grads, ctx.needs_input_grad[1:], strict=True))
        return None, *wanted


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Computes GELU(x + bias), the exact one (Hendrycks and Gimpel 2016, arXiv 1606.08415), for CPUs.

    In place of the bias of a linear layer and the GELU behind it. On a CPU a product with a bias writes the bias
    into its result first and reads it again. On a GPU the product adds it on the way, and torch.compile joins a sum
    and a GELU: there this op is the two calls that it stands for.

    Args:
        x: [..., C], the product without its bias.
        bias: [C]; may be float32 whatever `x` is.
        impl: `auto`, `cuda` (the compiled extension, which has this op for CPU tensors alone) or `reference`.

    Returns:
        [..., C] in the dtype of `x`. Differentiable with respect to both; the gradient of the bias is summed in float32
        at least.

    Raises:
        TypeError: An input is not floating.
        ValueError: A shape or a device does not fit.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    result: torch.Tensor = _BiasGELU.apply(impl, *_bind(x, bias))
    return result
