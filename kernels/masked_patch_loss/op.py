"""The masked-patch loss: the op, its registration, its gradient and the public function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import checks, patches
from ..library import define
from ..masked_patch_gather.op import FLOAT_DTYPES, IMAGE_DTYPES, patch_size_reasons
from ..registry import Implementation, Op, check_impl, register
from .reference import compute_dtype

MAX_COLUMNS = 8192


def _bind(
    pred: torch.Tensor,
    images: torch.Tensor,
    masked_indices: torch.Tensor,
    patch_size: int,
    *,
    norm_pix: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pad_to: int | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    patches.check_images(images, patch_size)
    patches.check_patch_indices("masked_indices", masked_indices, images)
    checks.check_floating("pred", pred)
    checks.check_same_device(pred=pred, images=images, masked_indices=masked_indices)
    if images.requires_grad:
        raise ValueError("images require a gradient, but the loss has none to targets; pass images.detach()")
    batch, count = masked_indices.shape
    if batch == 0 or count == 0:
        raise ValueError(
            f"masked_indices has shape {[batch, count]}: a mean over no patch is undefined; mask at least one patch"
        )
    columns = patches.check_columns(pad_to, patch_size)
    if tuple(pred.shape) != (batch, count, columns):
        raise ValueError(
            f"pred must have shape {[batch, count, columns]}, got {list(pred.shape)}; "
            "its last size is 3 patch_size², or pad_to where that is given"
        )
    means, stds = patches.check_normalisation(mean, std)
    return pred, images, masked_indices, patch_size, norm_pix, means, stds


def _width_reasons(columns: int) -> list[str]:
    if columns <= MAX_COLUMNS:
        return []
    return [f"pred has {columns} columns; the kernel holds a row in registers and takes {MAX_COLUMNS} at most"]


def _triton_reasons(
    pred: torch.Tensor,
    images: torch.Tensor,
    masked_indices: torch.Tensor,
    patch_size: int,
    norm_pix: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[str]:
    return (
        checks.triton_reasons(pred.device)
        + patch_size_reasons(patch_size)
        + _width_reasons(pred.shape[-1])
        + checks.dtype_reasons(IMAGE_DTYPES, images=images.dtype)
        + checks.dtype_reasons(FLOAT_DTYPES, pred=pred.dtype)
        + checks.last_dim_reasons(pred=pred, masked_indices=masked_indices)
    )


def _triton_backward_reasons(grad: torch.Tensor, *forward_arguments: Any) -> list[str]:
    return _triton_reasons(*forward_arguments)


OP = register(
    Op(
        name="masked_patch_loss",
        bind=_bind,
        implementations=(
            Implementation(
                name="triton",
                module="vitrail.kernels.masked_patch_loss.kernel",
                reasons={"forward": _triton_reasons, "backward": _triton_backward_reasons},
                supports="uint8, fp16, bf16, fp32 images of any stride; fp16, bf16, fp32 pred; patches 8, 14, 16, 32",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.masked_patch_loss.reference",
                reasons={"forward": lambda *_: [], "backward": lambda *_: []},
                supports="also fp64, any patch size and any stride",
            ),
        ),
    )
)
_ARGUMENTS = (
    "Tensor pred, Tensor images, Tensor masked_indices, int patch_size, bool norm_pix, float[] mean, float[] std"
)
_forward = define(OP, "forward", _ARGUMENTS, "Tensor", lambda pred, *_: pred.new_empty((), dtype=compute_dtype(pred)))
_backward = define(
    OP,
    "backward",
    f"Tensor grad, {_ARGUMENTS}",
    "Tensor",
    lambda grad, pred, *_: torch.empty_like(pred, memory_format=torch.contiguous_format),
)


class _Loss(torch.autograd.Function):
    """The loss with its gradient to the predictions."""

    @staticmethod
    def forward(
        ctx: Any, impl: str, pred: torch.Tensor, images: torch.Tensor, masked_indices: torch.Tensor, *rest: Any
    ) -> Any:
        """Computes the loss; keeps its inputs and nothing else."""
        ctx.save_for_backward(pred, images, masked_indices)
        ctx.impl, ctx.rest = impl, rest
        return _forward(pred, images, masked_indices, *rest, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradient of the predictions."""
        return None, _backward(grad, *ctx.saved_tensors, *ctx.rest, ctx.impl), *(None,) * 6


def masked_patch_loss(
    pred: torch.Tensor,
    images: torch.Tensor,
    masked_indices: torch.Tensor,
    patch_size: int,
    *,
    norm_pix: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pad_to: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Mean squared error between predictions and the pixels of the masked patches: MAE's loss.

    The target of a patch is its K = 3 P² channel-normalised pixels t in the order (row, column, channel), with
    `norm_pix` further normalised to `(t - t.mean()) / sqrt(t.var(unbiased) + 1e-6)` (He et al. 2022,
    arXiv 2111.06377, section 3). Targets are computed from the image where they are compared, and never stored.

    Args:
        pred: [B, M, K], or [B, M, pad_to], whose surplus columns are ignored and get a zero gradient.
        images: [B, H, W, 3] or [B, 3, H, W]. uint8 values count as value / 255; floating values count as they are.
            There is no gradient to them.
        masked_indices: [B, M] int64, row-major patch numbers below H W / P². The values are not checked on a GPU,
            which would cost a wait; one that is out of range counts as a patch of zeros there and raises IndexError
            on the CPU.
        patch_size: Side P of a patch in pixels; H and W are multiples of it.
        norm_pix: Whether each target patch is normalised by its own statistics.
        mean: Three channel means, in 0-1 units for uint8. Applied before the statistics; with `std` or not at all.
        std: Three channel standard deviations.
        pad_to: Width of `pred` where it is padded.
        impl: `auto`, `triton` or `reference`.

    Returns:
        The mean over all B M K values, a scalar: float32 whatever the autocast state, float64 for float64 `pred`.
        Targets and statistics are computed in the same dtype.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape, a device or a statistic does not fit, no patch is masked, or images require a gradient.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(pred, images, masked_indices, patch_size, norm_pix=norm_pix, mean=mean, std=std, pad_to=pad_to)
    result: torch.Tensor = _Loss.apply(impl, *arguments)
    return result
