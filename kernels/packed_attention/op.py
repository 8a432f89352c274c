"""Attention from the packed projection: the op, its registration, its gradients and the public function."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import checks, extension
from ..library import define
from ..registry import Implementation, Op, check_impl, register


def _bind(
    qkv: torch.Tensor,
    kv: torch.Tensor | None = None,
    *,
    num_heads: int,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    given = {"qkv": qkv, "kv": kv, "bias": bias}
    for name, tensor in given.items():
        if tensor is not None:
            checks.check_floating(name, tensor)
    checks.check_same_device(**given)
    checks.check_shape("qkv", qkv, ("B", "N", "3D") if kv is None else ("B", "N", "D"))
    parts = 3 if kv is None else 1
    if num_heads < 1 or qkv.shape[-1] % (parts * num_heads):
        held = "queries, keys and values of every head" if kv is None else "queries of every head"
        raise ValueError(
            f"qkv has {qkv.shape[-1]} channels, expected a multiple of {parts} * num_heads = "
            f"{parts * num_heads}: {held}"
        )
    if kv is not None:
        checks.check_shape("kv", kv, (qkv.shape[0], "M", 2 * qkv.shape[-1]))
        if kv.dtype != qkv.dtype:
            raise TypeError(f"kv is {kv.dtype}, but qkv {qkv.dtype}; convert one with .to(...)")
        if not kv.shape[1]:
            raise ValueError("kv holds no keys: there is nothing to attend to")
    if bias is not None:
        keys = qkv.shape[1] if kv is None else kv.shape[1]
        checks.check_shape("bias", bias, (num_heads, qkv.shape[1], keys))
    device = qkv.device.type
    if qkv.dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        qkv, kv = qkv.to(dtype), None if kv is None else kv.to(dtype)
    if scale is None:
        scale = (qkv.shape[-1] // (parts * num_heads)) ** -0.5
    return qkv, kv, bias, num_heads, float(scale)


def _extension_reasons(
    qkv: torch.Tensor, kv: torch.Tensor | None, bias: torch.Tensor | None, num_heads: int, scale: float
) -> list[str]:
    """Returns why the compiled extension cannot run this call."""
    if qkv.device.type != "cpu":
        return [f"qkv is on {qkv.device}; of this op the extension has the CPU's side alone; use the reference"]
    reasons = extension.reasons(qkv.device)
    if not torch.cpu._is_avx512_bf16_supported():
        reasons.append("the CPU has no AVX-512 with BF16, for which the extension is written; use chunked")
    reasons += checks.dtype_reasons((torch.bfloat16,), qkv=qkv.dtype)
    width = qkv.shape[-1] // ((3 if kv is None else 1) * num_heads)
    if width % 16:
        reasons.append(f"heads are {width} wide; the kernel takes multiples of 16; use chunked")
    if bias is not None:
        reasons.append("the kernel adds no bias; use chunked")
    return reasons + _layout_reasons(qkv=qkv, kv=kv)


def _extension_backward_reasons(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    kv: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_heads: int,
    scale: float,
) -> list[str]:
    """Returns why the compiled extension cannot run this call."""
    reasons = _extension_reasons(qkv, kv, bias, num_heads, scale)
    if grad.dtype != qkv.dtype:
        reasons.append(f"grad is {grad.dtype}, but qkv {qkv.dtype}; convert grad")
    return reasons + _layout_reasons(grad=grad)


def _layout_reasons(**tensors: torch.Tensor | None) -> list[str]:
    """Returns why the kernel, which reads two channels at a time, cannot read some tensors."""
    return checks.last_dim_reasons(**tensors) + [
        f"{name} has strides {list(tensor.stride())} from element {tensor.storage_offset()} on; the kernel takes even "
        f"ones; pass {name}.clone()"
        for name, tensor in tensors.items()
        if tensor is not None and any(n % 2 for n in (*tensor.stride()[:2], tensor.storage_offset()))
    ]


def _fake(
    qkv: torch.Tensor, kv: torch.Tensor | None, bias: torch.Tensor | None, num_heads: int, scale: float
) -> torch.Tensor:
    batch, tokens, channels = qkv.shape
    return qkv.new_empty((batch, tokens, channels // 3 if kv is None else channels))


def _fake_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    kv: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_heads: int,
    scale: float,
) -> list[torch.Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (qkv, kv, bias) if tensor is not None]


OP = register(
    Op(
        name="packed_attention",
        bind=_bind,
        implementations=(
            Implementation(
                name="cuda",
                module="vitrail.kernels.packed_attention.extension",
                reasons={"forward": _extension_reasons, "backward": _extension_backward_reasons},
                supports="CPU with AVX-512 and BF16: bf16; heads wide a multiple of 16; no bias; rows contiguous",
            ),
            Implementation(
                name="chunked",
                module="vitrail.kernels.packed_attention.chunked",
                reasons={"forward": lambda *_: [], "backward": lambda *_: []},
                supports="any device, dtype and width of a head",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.packed_attention.reference",
                reasons={"forward": lambda *_: [], "backward": lambda *_: []},
                supports="the same, in float32 at least",
            ),
        ),
    )
)
_ARGUMENTS = "Tensor qkv, Tensor? kv, Tensor? bias, int num_heads, float scale"
_forward = define(OP, "forward", _ARGUMENTS, "Tensor", _fake)
_backward = define(OP, "backward", f"Tensor grad, {_ARGUMENTS}", "Tensor[]", _fake_backward)


class _PackedAttention(torch.autograd.Function):
    """The op with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: str,
        qkv: torch.Tensor,
        kv: torch.Tensor | None,
        bias: torch.Tensor | None,
        num_heads: int,
        scale: float,
    ) -> torch.Tensor:
        """Attends; keeps the inputs, and nothing of size N x M."""
        ctx.save_for_backward(qkv, kv, bias)
        ctx.impl, ctx.sizes = impl, (num_heads, scale)
        result: torch.Tensor = _forward(qkv, kv, bias, num_heads, scale, impl)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradients of qkv, kv and bias."""
        given = ctx.saved_tensors
        found = iter(_backward(grad, *given, *ctx.sizes, ctx.impl))
        grads = (None if tensor is None else next(found) for tensor in given)
        wanted = (value if want else None for value, want in zip(grads, ctx.needs_input_grad[1:4], strict=True))
        return None, *wanted, None, None


def packed_attention(
    qkv: torch.Tensor,
    kv: torch.Tensor | None = None,
    *,
    num_heads: int,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Computes softmax(scale q kᵀ + bias) v, straight from the output of the projection, and keeps no probabilities.

    Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762) for CPUs. On a GPU this op writes scores out,
    some images at a time; `torch.nn.functional.scaled_dot_product_attention` and xformers, which read the same layout,
    do not.

    Args:
        qkv: [B, N, 3 D], channels in the order (3, heads, d) as the qkv product leaves them; or with `kv` the queries
            alone, [B, N, D].
        kv: [B, M, 2 D], keys and values of M tokens, M ≥ 1.
        num_heads: Number of heads.
        bias: [heads, N, M], added to the scaled scores of every image. May be float32 whatever `qkv` is; its gradient
            is summed in its own dtype.
        scale: Factor of the products of queries and keys; d^-0.5 by default.
        impl: `auto`, `cuda` (the compiled extension, which has this op for CPU tensors alone), `chunked` or
            `reference`.

    Returns:
        [B, N, D] in the dtype of `qkv`, or in autocast's where it is on. Differentiable with respect to qkv, kv and
        bias. The softmax is float32 inside, float64 for float64.

    Raises:
        TypeError: An input is not floating, or `kv` has another dtype than `qkv`.
        ValueError: A shape, a size or a device does not fit.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(qkv, kv, num_heads=num_heads, bias=bias, scale=scale)
    with torch.autocast(qkv.device.type, enabled=False):
        result: torch.Tensor = _PackedAttention.apply(impl, *arguments)
    return result
