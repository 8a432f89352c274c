"""Token restoring: the op, its registration, its gradients and the public function."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import checks
from ..library import define
from ..registry import Implementation, Op, check_impl, register

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _bind(
    visible: torch.Tensor,
    ids_restore: torch.Tensor,
    mask_token: torch.Tensor,
    pos_embed: torch.Tensor | None,
    *,
    num_prefix: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    for name, tensor in (("visible", visible), ("mask_token", mask_token), ("pos_embed", pos_embed)):
        if tensor is not None:
            checks.check_floating(name, tensor)
    checks.check_indices("ids_restore", ids_restore)
    checks.check_shape("visible", visible, ("B", "P+V", "D"))
    checks.check_same_device(visible=visible, ids_restore=ids_restore, mask_token=mask_token, pos_embed=pos_embed)
    batch, tokens, width = visible.shape
    length = ids_restore.shape[1]
    if ids_restore.shape[0] != batch:
        raise ValueError(f"ids_restore is for {ids_restore.shape[0]} samples, but visible holds {batch}")
    if not 0 <= num_prefix <= tokens:
        raise ValueError(f"num_prefix must be between 0 and the {tokens} tokens of visible, got {num_prefix}")
    if tokens - num_prefix > length:
        raise ValueError(
            f"visible holds {tokens - num_prefix} tokens behind {num_prefix} prefix tokens, "
            f"but ids_restore has only {length} positions; is num_prefix right?"
        )
    if tuple(mask_token.shape) not in ((width,), (length, width)):
        raise ValueError(
            f"mask_token must have shape [{width}] or [{length}, {width}], got {list(mask_token.shape)}; "
            "pass mask_token.view(-1) for a [1, 1, D] parameter"
        )
    if pos_embed is not None:
        checks.check_shape("pos_embed", pos_embed, (num_prefix + length, width))
    if dtype is None:
        dtype = torch.promote_types(visible.dtype, mask_token.dtype)
        dtype = dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)
    checks.check_floating_dtype("dtype", dtype)
    return visible, ids_restore, mask_token, pos_embed, num_prefix, dtype


def _triton_reasons(
    visible: torch.Tensor,
    ids_restore: torch.Tensor,
    mask_token: torch.Tensor,
    pos_embed: torch.Tensor | None,
    num_prefix: int,
    dtype: torch.dtype,
) -> list[str]:
    pos_dtype = None if pos_embed is None else pos_embed.dtype
    return (
        checks.triton_reasons(visible.device)
        + checks.dtype_reasons(
            DTYPES, visible=visible.dtype, mask_token=mask_token.dtype, pos_embed=pos_dtype, dtype=dtype
        )
        + checks.last_dim_reasons(visible=visible, ids_restore=ids_restore, mask_token=mask_token, pos_embed=pos_embed)
    )


def _triton_backward_reasons(
    grad: torch.Tensor,
    ids_restore: torch.Tensor,
    num_visible: int,
    num_prefix: int,
    visible_dtype: torch.dtype | None,
    mask_dtype: torch.dtype | None,
    per_position: bool,
    pos_dtype: torch.dtype | None,
) -> list[str]:
    return (
        checks.triton_reasons(grad.device)
        + checks.dtype_reasons(
            DTYPES, grad=grad.dtype, visible=visible_dtype, mask_token=mask_dtype, pos_embed=pos_dtype
        )
        + checks.last_dim_reasons(ids_restore=ids_restore)
    )


def _fake(
    visible: torch.Tensor,
    ids_restore: torch.Tensor,
    mask_token: torch.Tensor,
    pos_embed: torch.Tensor | None,
    num_prefix: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    batch, length = ids_restore.shape
    return visible.new_empty((batch, num_prefix + length, visible.shape[2]), dtype=dtype)


def _fake_backward(
    grad: torch.Tensor,
    ids_restore: torch.Tensor,
    num_visible: int,
    num_prefix: int,
    visible_dtype: torch.dtype | None,
    mask_dtype: torch.dtype | None,
    per_position: bool,
    pos_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, width = grad.shape
    mask_shape = (ids_restore.shape[1], width) if per_position else (width,)

    def gradient(shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        return grad.new_empty(0) if dtype is None else grad.new_empty(shape, dtype=dtype)

    return (
        gradient((batch, num_prefix + num_visible, width), visible_dtype),
        gradient(mask_shape, mask_dtype),
        gradient((tokens, width), pos_dtype),
    )


OP = register(
    Op(
        name="restore_tokens",
        bind=_bind,
        implementations=(
            Implementation(
                name="triton",
                module="vitrail.kernels.restore_tokens.kernel",
                reasons={"forward": _triton_reasons, "backward": _triton_backward_reasons},
                supports="fp16, bf16, fp32, mixed; any width; rows contiguous",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.restore_tokens.reference",
                reasons={"forward": lambda *_: [], "backward": lambda *_: []},
                supports="also fp64 and any stride",
            ),
        ),
    )
)
_forward = define(
    OP,
    "forward",
    "Tensor visible, Tensor ids_restore, Tensor mask_token, Tensor? pos_embed, int num_prefix, ScalarType dtype",
    "Tensor",
    _fake,
)
_backward = define(
    OP,
    "backward",
    "Tensor grad, Tensor ids_restore, SymInt num_visible, int num_prefix, ScalarType? visible_dtype, "
    "ScalarType? mask_dtype, bool per_position, ScalarType? pos_dtype",
    "(Tensor, Tensor, Tensor)",
    _fake_backward,
)


class _Restore(torch.autograd.Function):
    """The op with its gradients, each computed only if it is required."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: str,
        visible: torch.Tensor,
        ids_restore: torch.Tensor,
        mask_token: torch.Tensor,
        pos_embed: torch.Tensor | None,
        num_prefix: int,
        dtype: torch.dtype,
    ) -> Any:
        """Restores the tokens; keeps ids_restore and nothing else."""
        ctx.save_for_backward(ids_restore)
        ctx.impl, ctx.num_prefix, ctx.num_visible = impl, num_prefix, visible.shape[1] - num_prefix
        ctx.per_position = mask_token.ndim == 2
        ctx.dtypes = (visible.dtype, mask_token.dtype, None if pos_embed is None else pos_embed.dtype)
        return _forward(visible, ids_restore, mask_token, pos_embed, num_prefix, dtype, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradients of visible, mask_token and pos_embed."""
        (ids_restore,) = ctx.saved_tensors
        _, want_visible, _, want_mask, want_pos, _, _ = ctx.needs_input_grad
        visible_dtype, mask_dtype, pos_dtype = ctx.dtypes
        grads = _backward(
            grad,
            ids_restore,
            ctx.num_visible,
            ctx.num_prefix,
            visible_dtype if want_visible else None,
            mask_dtype if want_mask else None,
            ctx.per_position,
            pos_dtype if want_pos else None,
            ctx.impl,
        )
        grad_visible, grad_mask, grad_pos = (
            value if wanted else None for value, wanted in zip(grads, (want_visible, want_mask, want_pos), strict=True)
        )
        return None, grad_visible, None, grad_mask, grad_pos, None, None


def restore_tokens(
    visible: torch.Tensor,
    ids_restore: torch.Tensor,
    mask_token: torch.Tensor,
    pos_embed: torch.Tensor | None,
    *,
    num_prefix: int = 1,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Puts visible tokens back in their places, mask tokens in the others, and adds the position table.

    This is the input of MAE's decoder (He et al. 2022, arXiv 2111.06377) in one pass::

        out[b, :P]    = visible[b, :P] + pos_embed[:P]
        out[b, P + l] = (visible[b, P + r] if r < V else mask_token) + pos_embed[P + l],   r = ids_restore[b, l]

    Args:
        visible: [B, P + V, D], prefix tokens (class, registers) first. V may be 0 and may be L.
        ids_restore: [B, L] int64 from `random_masking`; each row must be a permutation. That is not checked on
            a GPU, which would cost a wait.
        mask_token: [D], or [L, D] for one token per position.
        pos_embed: [P + L, D], or None to add nothing.
        num_prefix: Number of prefix tokens P.
        dtype: Of the result. Default: the promotion of the inputs', also under autocast, as torch.cat and addition
            would do there. The arithmetic is float32, float64 if the result is.
        impl: `auto`, `triton` or `reference`.

    Returns:
        [B, P + L, D]. Differentiable with respect to visible, mask_token and pos_embed.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape or a device does not fit.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(visible, ids_restore, mask_token, pos_embed, num_prefix=num_prefix, dtype=dtype)
    result: torch.Tensor = _Restore.apply(impl, *arguments)
    return result
