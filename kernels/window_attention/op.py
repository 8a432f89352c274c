"""Window attention: the op, its registration, its gradients and the public function."""

import platform
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import checks, extension
from ..library import define
from ..registry import Implementation, Op, check_impl, register
from .reference import compute_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_WINDOW = 16


def _check_window(qkv: torch.Tensor, bias_table: torch.Tensor, window_size: int, shift: int, num_heads: int) -> None:
    """Raises ValueError unless the window, its shift, the heads and the table go together."""
    if not 1 <= window_size <= LARGEST_WINDOW:
        raise ValueError(f"window_size must be between 1 and {LARGEST_WINDOW}, got {window_size}")
    if not 0 <= shift < window_size:
        raise ValueError(f"shift must be between 0 and window_size - 1 = {window_size - 1}, got {shift}")
    if num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv has {qkv.shape[-1]} channels, expected a multiple of 3 * num_heads = {3 * num_heads}: "
            "queries, keys and values of every head"
        )
    if bias_table.shape[0] != (2 * window_size - 1) ** 2 or bias_table.shape[1] != num_heads:
        raise ValueError(
            f"bias_table must have shape [{(2 * window_size - 1) ** 2}, {num_heads}], one row for each of the "
            f"(2 * window_size - 1)² offsets, got {list(bias_table.shape)}; is window_size={window_size} right?"
        )


def _bind(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    *,
    window_size: int,
    shift: int = 0,
    num_heads: int,
    scale: float | None = None,
    qkv_bias: torch.Tensor | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    for name, tensor in (("qkv", qkv), ("bias_table", bias_table), ("qkv_bias", qkv_bias)):
        if tensor is not None:
            checks.check_floating(name, tensor)
    checks.check_shape("qkv", qkv, ("B", "H", "W", "3C"))
    checks.check_shape("bias_table", bias_table, ("(2w-1)²", "heads"))
    checks.check_same_device(qkv=qkv, bias_table=bias_table, qkv_bias=qkv_bias)
    _check_window(qkv, bias_table, window_size, shift, num_heads)
    if qkv_bias is not None:
        checks.check_shape("qkv_bias", qkv_bias, (qkv.shape[-1],))
    device = qkv.device.type
    if qkv.dtype != torch.float64 and torch.is_autocast_enabled(device):
        qkv = qkv.to(torch.get_autocast_dtype(device))
    if scale is None:
        scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    empty = bias_table.new_empty(0) if qkv_bias is None else qkv_bias
    return qkv, bias_table, empty, window_size, shift, num_heads, float(scale)


def _extension_reasons(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> list[str]:
    """Returns why the compiled extension cannot run this call."""
    if qkv.device.type != "cpu":
        return [f"qkv is on {qkv.device}; of this op the extension has the CPU's side alone; use triton"]
    reasons = extension.reasons(qkv.device)
    if platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        reasons.append("the CPU has no AVX2, for which the extension is written; use the reference")
    reasons += checks.dtype_reasons((torch.bfloat16, torch.float32), qkv=qkv.dtype)
    width = qkv.shape[-1] // (3 * num_heads)
    if width % 16:
        reasons.append(f"heads are {width} wide; the kernel takes multiples of 16; use the reference")
    return reasons + checks.last_dim_reasons(qkv=qkv)


def _extension_backward_reasons(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> list[str]:
    """Returns why the compiled extension cannot run this call."""
    reasons = _extension_reasons(qkv, bias_table, qkv_bias, window_size, shift, num_heads, scale)
    if grad.dtype != qkv.dtype:
        reasons.append(f"grad is {grad.dtype}, but qkv {qkv.dtype}; convert grad")
    return reasons + checks.last_dim_reasons(grad=grad)


def _tensor_reasons(qkv: torch.Tensor, num_heads: int, **parameters: torch.Tensor) -> list[str]:
    reasons = checks.triton_reasons(qkv.device)
    dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
    reasons += checks.dtype_reasons(DTYPES, qkv=qkv.dtype, **dtypes)
    width = qkv.shape[-1] // (3 * num_heads)
    if width % 16 or not 16 <= width <= 128:
        reasons.append(f"heads are {width} wide; the kernel takes 16 to 128 in steps of 16; use the reference")
    return reasons + checks.last_dim_reasons(qkv=qkv, **parameters)


def _triton_reasons(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> list[str]:
    """Returns why the Triton kernel cannot run this call."""
    return _tensor_reasons(qkv, num_heads, bias_table=bias_table, qkv_bias=qkv_bias)


def _triton_backward_reasons(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> list[str]:
    """Returns why the Triton kernel cannot run this call."""
    return _tensor_reasons(qkv, num_heads, bias_table=bias_table, qkv_bias=qkv_bias, grad=grad)


def _fake(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty((batch, height, width, channels // 3))
    return out, qkv.new_empty((batch, num_heads, height, width), dtype=compute_dtype(qkv.dtype))


def _fake_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (qkv, bias_table, qkv_bias))  # type: ignore[return-value]


OP = register(
    Op(
        name="window_attention",
        bind=_bind,
        implementations=(
            Implementation(
                name="triton",
                module="vitrail.kernels.window_attention.kernel",
                reasons={"forward": _triton_reasons, "backward": _triton_backward_reasons},
                supports="fp16, bf16, fp32; windows to 16; heads 16 to 128 wide in steps of 16; rows contiguous",
            ),
            Implementation(
                name="cuda",
                module="vitrail.kernels.window_attention.extension",
                reasons={"forward": _extension_reasons, "backward": _extension_backward_reasons},
                supports="CPU with AVX2: bf16, fp32; heads wide a multiple of 16; rows contiguous",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.window_attention.reference",
                reasons={"forward": lambda *_: [], "backward": lambda *_: []},
                supports="also fp64, heads of any width and any stride",
            ),
        ),
    )
)
_SIZES = "int window_size, int shift, int num_heads, float scale"
_forward = define(
    OP, "forward", f"Tensor qkv, Tensor bias_table, Tensor qkv_bias, {_SIZES}", "(Tensor out, Tensor lse)", _fake
)
_backward = define(
    OP,
    "backward",
    f"Tensor grad, Tensor qkv, Tensor bias_table, Tensor qkv_bias, Tensor out, Tensor lse, {_SIZES}",
    "(Tensor grad_qkv, Tensor grad_bias_table, Tensor grad_qkv_bias)",
    _fake_backward,
)


class _WindowAttention(torch.autograd.Function):
    """The op with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: str,
        qkv: torch.Tensor,
        bias_table: torch.Tensor,
        qkv_bias: torch.Tensor,
        window_size: int,
        shift: int,
        num_heads: int,
        scale: float,
    ) -> torch.Tensor:
        """Attends; keeps the inputs, the result and its log-sum-exp, but no probabilities."""
        out, lse = _forward(qkv, bias_table, qkv_bias, window_size, shift, num_heads, scale, impl)
        ctx.save_for_backward(qkv, bias_table, qkv_bias, out, lse)
        ctx.impl, ctx.sizes = impl, (window_size, shift, num_heads, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradients of qkv, bias_table and qkv_bias."""
        grads = _backward(grad, *ctx.saved_tensors, *ctx.sizes, ctx.impl)
        wanted = ctx.needs_input_grad[1:4]
        grads = (value if want else None for value, want in zip(grads, wanted, strict=True))
        return None, *grads, None, None, None, None


def window_attention(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    *,
    window_size: int,
    shift: int = 0,
    num_heads: int,
    scale: float | None = None,
    qkv_bias: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attends within (shifted) windows with a learned bias for each relative position, straight from the qkv product.

    The attention of Swin (Liu et al. 2021, arXiv 2103.14030, section 3.2) without its roll, partition, mask and
    their reverses. Maps that are no multiple of the window are padded at the bottom and on the right, as if the
    padding were zeros before the qkv product: a padded token holds `qkv_bias` and is an ordinary key.

    Args:
        qkv: [B, H, W, 3 C], channels in the order (3, heads, d) as the qkv product leaves them.
        bias_table: [(2 w - 1)², heads]: row (Δrow + w - 1)(2 w - 1) + Δcolumn + w - 1, query minus key, is added to
            the scaled score. May be float32 whatever `qkv` is.
        window_size: Side w of a window, 1 to 16.
        shift: How far the windows are shifted down and to the right, 0 to w - 1; they wrap around, and tokens from
            opposite edges do not see each other. Swin takes 0 and w // 2 in turns.
        num_heads: Number of heads.
        scale: Factor of the products of queries and keys; d^-0.5 by default.
        qkv_bias: [3 C]: what a padded token holds, the bias of the qkv product; None for zeros. Gets the gradient of
            the padded keys and values alone.
        impl: `auto`, `triton`, `cuda` (the compiled extension, which has this op for CPU tensors alone) or
            `reference`.

    Returns:
        [B, H, W, C] in the dtype of `qkv`, or in autocast's where it is on. Differentiable with respect to qkv,
        bias_table and qkv_bias. The softmax is float32 in any case, float64 for float64.

    Raises:
        TypeError: An input is not floating.
        ValueError: A shape, a size or a device does not fit.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(
        qkv,
        bias_table,
        window_size=window_size,
        shift=shift,
        num_heads=num_heads,
        scale=scale,
        qkv_bias=qkv_bias,
    )
    result: torch.Tensor = _WindowAttention.apply(impl, *arguments)
    return result
