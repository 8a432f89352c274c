"""Masked patch gather: the op, its registration, its gradient and the public function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import checks, extension, patches
from ..library import define
from ..registry import Implementation, Op, check_impl, register

IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
FLOAT_DTYPES = IMAGE_DTYPES[1:]
PATCH_SIZES = (8, 14, 16, 32)


def _default_dtype(images: torch.Tensor) -> torch.dtype:
    """Returns the autocast dtype where autocast is on, else the images' own floating dtype, else float32."""
    device = images.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return images.dtype if images.is_floating_point() else torch.float32


def _bind(
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pad_to: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Checks the public arguments and fills in the defaults."""
    patches.check_images(images, patch_size)
    patches.check_patch_indices("indices", indices, images)
    checks.check_same_device(images=images, indices=indices)
    means, stds = patches.check_normalisation(mean, std)
    columns = patches.check_columns(pad_to, patch_size)
    if dtype is None:
        dtype = _default_dtype(images)
    checks.check_floating_dtype("dtype", dtype)
    return images, indices, patch_size, means, stds, columns, dtype


def patch_size_reasons(patch_size: int) -> list[str]:
    """Returns why the compiled kernels cannot run patches of this size."""
    if patch_size in PATCH_SIZES:
        return []
    return [f"patch_size is {patch_size}; the kernel is built for {', '.join(map(str, PATCH_SIZES))}"]


def _layout_reasons(images: torch.Tensor) -> list[str]:
    """Returns why the extension cannot read images of these strides."""
    *_, pixel, channel = patches.channels_last(images).stride()
    if pixel == 1 or (pixel, channel) == (patches.CHANNELS, 1):
        return []
    return [
        f"images has strides {list(images.stride())} for shape {list(images.shape)}; the pixels of a row, or those of "
        "each of its planes, must be adjacent; pass images.contiguous()"
    ]


def _extension_reasons(
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    columns: int,
    dtype: torch.dtype,
) -> list[str]:
    return (
        extension.reasons(images.device)
        + patch_size_reasons(patch_size)
        + checks.dtype_reasons((torch.uint8,), images=images.dtype)
        + checks.dtype_reasons(FLOAT_DTYPES, dtype=dtype)
        + _layout_reasons(images)
        + checks.last_dim_reasons(indices=indices)
    )


def _triton_reasons(
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    columns: int,
    dtype: torch.dtype,
) -> list[str]:
    return (
        checks.triton_reasons(images.device)
        + patch_size_reasons(patch_size)
        + checks.dtype_reasons(IMAGE_DTYPES, images=images.dtype)
        + checks.dtype_reasons(FLOAT_DTYPES, dtype=dtype)
        + checks.last_dim_reasons(indices=indices)
    )


def _triton_backward_reasons(
    grad: torch.Tensor, images: torch.Tensor, indices: torch.Tensor, patch_size: int, std: Sequence[float]
) -> list[str]:
    return (
        checks.triton_reasons(images.device)
        + patch_size_reasons(patch_size)
        + checks.dtype_reasons(FLOAT_DTYPES, images=images.dtype, grad=grad.dtype)
        + checks.last_dim_reasons(indices=indices)
    )


def _fake(
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return images.new_empty((*indices.shape, columns), dtype=dtype)


OP = register(
    Op(
        name="masked_patch_gather",
        bind=_bind,
        implementations=(
            Implementation(
                name="cuda",
                module="vitrail.kernels.masked_patch_gather.extension",
                reasons={"forward": _extension_reasons},  # uint8 has no gradient
                supports="uint8 images with adjacent pixels, interleaved or in planes; patches 8, 14, 16, 32",
            ),
            Implementation(
                name="triton",
                module="vitrail.kernels.masked_patch_gather.kernel",
                reasons={"forward": _triton_reasons, "backward": _triton_backward_reasons},
                supports="uint8, fp16, bf16, fp32 images of any stride; patches 8, 14, 16, 32",
            ),
            Implementation(
                name="reference",
                module="vitrail.kernels.masked_patch_gather.reference",
                reasons={"forward": lambda *_: [], "backward": lambda *_: []},
                supports="also fp64 and any patch size",
            ),
        ),
    )
)
_forward = define(
    OP,
    "forward",
    "Tensor images, Tensor indices, int patch_size, float[] mean, float[] std, int columns, ScalarType dtype",
    "Tensor",
    _fake,
)
_backward = define(
    OP,
    "backward",
    "Tensor grad, Tensor images, Tensor indices, int patch_size, float[] std",
    "Tensor",
    lambda grad, images, indices, patch_size, std: torch.empty_like(images),
)


class _Gather(torch.autograd.Function):
    """The gather with its gradient to floating images."""

    @staticmethod
    def forward(ctx: Any, impl: str, images: torch.Tensor, indices: torch.Tensor, *rest: Any) -> Any:
        """Gathers; keeps the indices, and the images for their layout alone."""
        ctx.save_for_backward(images, indices)
        ctx.impl, ctx.patch_size, ctx.std = impl, rest[0], rest[2]
        return _forward(images, indices, *rest, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Returns the gradient of the images."""
        images, indices = ctx.saved_tensors
        return None, _backward(grad, images, indices, ctx.patch_size, ctx.std, ctx.impl), *(None,) * 6


def masked_patch_gather(
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pad_to: int | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Gathers the visible patches of images and normalises them, without touching the other pixels.

    Embedding only visible patches is MAE's asymmetric encoder (He et al. 2022, arXiv 2111.06377) taken down to the
    pixels: the result goes straight into the patch-embedding GEMM.

    Args:
        images: [B, H, W, 3] or [B, 3, H, W], any strides. uint8 values count as value / 255; floating values count
            as they are.
        indices: [B, V] int64, row-major patch numbers below H W / P², in any order, repetitions allowed. The values
            are not checked on a GPU, which would cost a wait; one that is out of range yields a row of zeros there
            and raises IndexError on the CPU.
        patch_size: Side P of a patch in pixels; H and W are multiples of it.
        mean: Three channel means, in 0-1 units for uint8. Subtracted; given with `std` or not at all.
        std: Three channel standard deviations. Divided by.
        pad_to: Number of columns of the result; those beyond 3 P² are zero. 588 pads to 592, whose rows are aligned.
        dtype: Of the result. Default: under autocast its dtype, else the images' if floating, else float32.
            The arithmetic is float32 in any case, float64 if the images or `dtype` are.
        impl: `auto`, `cuda` (the compiled extension, on CPU tensors its C++ twin), `triton` or `reference`.

    Returns:
        [B, V, 3 P²] or [B, V, pad_to]: patches as vectors in the order (row, column, channel). Differentiable with
        respect to floating images.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape, a device or a statistic does not fit.
        UnsupportedError: `impl` names an implementation that cannot run this call.
    """
    check_impl(impl)
    arguments = _bind(images, indices, patch_size, mean=mean, std=std, pad_to=pad_to, dtype=dtype)
    result: torch.Tensor = _Gather.apply(impl, *arguments)
    return result
