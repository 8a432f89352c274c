"""The masked-patch loss in Triton: targets are made in registers, forward and again backward, and never stored."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import Passes, launch, needs_int64
from ..patches import channel_affine, image_size, patch_width
from ..pixels import adjacent, load_pixels, pixel_strides
from ..reduction import sum_partials
from ..tuning import MAE_SIZES, Config, Tunable, combinations
from .reference import EPS

PROGRAMS = 2048  # of the forward, each with one partial sum: a fixed number, so that every GPU adds the same ones
MAX_WARPS = 32  # that CUDA runs as one CTA

# A program holds a patch in registers; by default 8 values in each lane, 16 bytes of bf16.
DEFAULT = {"VALUES_PER_WARP": 256}
CANDIDATES = combinations(VALUES_PER_WARP=(128, 256, 512, 1024))
LOSS = Tunable(
    op="masked_patch_loss",
    kernel="loss_kernel",
    default=DEFAULT,
    candidates=CANDIDATES,
    exact=("pred", "images", "patch", "adjacent", "norm_pix", "int64"),
    sizes=("rows",),
)
LOSS_BACKWARD = Tunable(
    op="masked_patch_loss",
    kernel="loss_backward_kernel",
    default=DEFAULT,
    candidates=CANDIDATES,
    exact=LOSS.exact,
    sizes=("rows", "columns"),
)
TUNABLES = (LOSS, LOSS_BACKWARD)


@triton.jit
def load_target(
    images,
    masked_indices,
    sample,
    slot,
    value,
    num_patches,
    grid_width,
    stride_index,
    strides,
    scale,
    shift,
    eps,
    PATCH: tl.constexpr,
    ADJACENT: tl.constexpr,
    NORM_PIX: tl.constexpr,
    INT64: tl.constexpr,
):
    """Returns the target of one masked patch in fp32, zero beyond its 3 P² values."""
    WIDTH: tl.constexpr = 3 * PATCH * PATCH
    wanted = value < WIDTH
    target = load_pixels(
        images,
        sample,
        tl.load(masked_indices + sample * stride_index + slot + tl.arange(0, 1)),
        value,
        wanted,
        num_patches,
        grid_width,
        strides,
        scale,
        shift,
        PATCH,
        ADJACENT,
        INT64,
    )
    if NORM_PIX:
        target = tl.where(wanted, target - tl.sum(target, 0) / WIDTH, 0.0)
        variance = tl.sum(target * target, 0) / (WIDTH - 1)
        target *= tl.div_rn(1.0, tl.sqrt_rn(variance + eps))  # exact rounding, once for each patch
    return target


@triton.jit
def loss_kernel(
    pred,
    images,
    masked_indices,
    partials,
    rows,
    rows_per_program,
    count,
    pred_strides,
    num_patches,
    grid_width,
    stride_index,
    strides,
    scale,
    shift,
    eps,
    PATCH: tl.constexpr,
    ADJACENT: tl.constexpr,
    NORM_PIX: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes the sum of squared errors of `rows_per_program` successive masked patches."""
    program = tl.program_id(0)
    first = program * rows_per_program
    value = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(first, min(first + rows_per_program, rows)):
        sample = (row // count).to(tl.int64) if INT64 else row // count
        slot = row % count
        target = load_target(
            images,
            masked_indices,
            sample,
            slot,
            value,
            num_patches,
            grid_width,
            stride_index,
            strides,
            scale,
            shift,
            eps,
            PATCH,
            ADJACENT,
            NORM_PIX,
            INT64,
        )
        predicted = pred + sample * pred_strides[0] + slot * pred_strides[1] + value
        error = tl.load(predicted, mask=value < 3 * PATCH * PATCH, other=0.0).to(tl.float32) - target
        total += error * error
    tl.store(partials + program, tl.sum(total, 0))


@triton.jit
def loss_backward_kernel(
    grad,
    pred,
    images,
    masked_indices,
    out,
    factor,
    count,
    pred_strides,
    num_patches,
    grid_width,
    stride_index,
    strides,
    scale,
    shift,
    eps,
    COLUMNS: tl.constexpr,
    PATCH: tl.constexpr,
    ADJACENT: tl.constexpr,
    NORM_PIX: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes the gradient of one row of predictions, zero in surplus columns."""
    row = tl.program_id(0)
    if INT64:
        row = row.to(tl.int64)
    sample = row // count
    slot = row % count
    value = tl.arange(0, BLOCK)
    target = load_target(
        images,
        masked_indices,
        sample,
        slot,
        value,
        num_patches,
        grid_width,
        stride_index,
        strides,
        scale,
        shift,
        eps,
        PATCH,
        ADJACENT,
        NORM_PIX,
        INT64,
    )
    predicted = pred + sample * pred_strides[0] + slot * pred_strides[1] + value
    error = tl.load(predicted, mask=value < 3 * PATCH * PATCH, other=0.0).to(tl.float32) - target
    result = error * (tl.load(grad).to(tl.float32) * factor)
    tl.store(out + row * COLUMNS + value, result.to(out.dtype.element_ty), mask=value < COLUMNS)


def _warps(block: int, config: Config) -> int:
    """Returns the number of warps of a program over `block` values."""
    return min(max(block // config["VALUES_PER_WARP"], 1), MAX_WARPS)


def _image_arguments(
    images: torch.Tensor, masked_indices: torch.Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[Any, ...]:
    """Returns the kernels' common arguments from `num_patches` to `eps`."""
    height, width = image_size(images)
    grid_height, grid_width = height // patch_size, width // patch_size
    scale, shift = channel_affine(images, mean, std)
    return grid_height * grid_width, grid_width, masked_indices.stride(0), pixel_strides(images), scale, shift, EPS


def forward(
    pred: torch.Tensor,
    images: torch.Tensor,
    masked_indices: torch.Tensor,
    patch_size: int,
    norm_pix: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Launches the loss and the sum of its partials. Arguments and result as in the reference."""
    batch, count = masked_indices.shape
    rows, width = batch * count, patch_width(patch_size)
    rows_per_program = triton.cdiv(rows, PROGRAMS)
    programs = triton.cdiv(rows, rows_per_program)
    partials = torch.empty((programs, 1), dtype=torch.float32, device=pred.device)
    block = triton.next_power_of_2(width)
    side_by_side, int64 = adjacent(images), needs_int64(pred, images, masked_indices)
    exact = (pred.dtype, images.dtype, patch_size, side_by_side, norm_pix, int64)
    config = LOSS.config(pred.device, exact, (rows,))
    launch(
        loss_kernel,
        (programs,),
        pred,
        images,
        masked_indices,
        partials,
        rows,
        rows_per_program,
        count,
        pred.stride(),
        *_image_arguments(images, masked_indices, patch_size, mean, std),
        PATCH=patch_size,
        ADJACENT=side_by_side,
        NORM_PIX=norm_pix,
        BLOCK=block,
        INT64=int64,
        num_warps=_warps(block, config),
    )
    loss = torch.empty((), dtype=torch.float32, device=pred.device)
    sum_partials(partials, loss.view(1), scale=1 / (rows * width))
    return loss


def backward(
    grad: torch.Tensor,
    pred: torch.Tensor,
    images: torch.Tensor,
    masked_indices: torch.Tensor,
    patch_size: int,
    norm_pix: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """Launches the gradient. Arguments and result as in the reference."""
    batch, count = masked_indices.shape
    columns = pred.shape[-1]
    out = torch.empty((batch, count, columns), dtype=pred.dtype, device=pred.device)
    block = triton.next_power_of_2(columns)
    side_by_side, int64 = adjacent(images), needs_int64(pred, images, masked_indices, out)
    exact = (pred.dtype, images.dtype, patch_size, side_by_side, norm_pix, int64)
    config = LOSS_BACKWARD.config(pred.device, exact, (batch * count, columns))
    launch(
        loss_backward_kernel,
        (batch * count,),
        grad,
        pred,
        images,
        masked_indices,
        out,
        2 / (batch * count * patch_width(patch_size)),
        count,
        pred.stride(),
        *_image_arguments(images, masked_indices, patch_size, mean, std),
        COLUMNS=columns,
        PATCH=patch_size,
        ADJACENT=side_by_side,
        NORM_PIX=norm_pix,
        BLOCK=block,
        INT64=int64,
        num_warps=_warps(block, config),
    )
    return out


def _example(
    patch: int,
    images: torch.dtype = torch.uint8,
    pred: torch.dtype = torch.bfloat16,
    *,
    hwc: bool = True,
    norm_pix: bool = True,
    batch: int = 256,
    device: torch.device | str,
) -> Passes:
    """Returns arguments of each pass for three quarters of the patches of 224-pixel images."""
    size = (batch, 224, 224, 3) if hwc else (batch, 3, 224, 224)
    pixels = torch.randint(0, 256, size, device=device, dtype=torch.uint8)
    indices = torch.rand(batch, (224 // patch) ** 2, device=device).argsort(1)
    indices = indices[:, indices.shape[1] // 4 :].contiguous()
    arguments = (
        torch.randn((*indices.shape, -(-patch_width(patch) // 8) * 8), dtype=pred, device=device),
        pixels if images == torch.uint8 else (pixels / 255).to(images),
        indices,
        patch,
        norm_pix,
        (),
        (),
    )
    return {"forward": arguments, "backward": (torch.ones((), device=device), *arguments)}


def representative_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of arguments whose launches cover the compiled variants, for the resource table."""
    calls: dict[str, Callable[..., Passes]] = {
        f"uint8 HWC P{patch}": partial(_example, patch) for patch in (8, 14, 16, 32)
    }
    calls |= {f"uint8 CHW P{patch}": partial(_example, patch, hwc=False) for patch in (14, 16)}
    calls["uint8 HWC P16 raw pixels"] = partial(_example, 16, norm_pix=False)
    calls["uint8 HWC P16 fp32 pred"] = partial(_example, 16, pred=torch.float32)
    calls["fp32 CHW P16"] = partial(_example, 16, torch.float32, hwc=False)
    calls["uint8 HWC P16 int64 offsets"] = partial(_example, 16, batch=2**15)
    return calls


def tuning_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of the arguments that the tuner measures: MAE's, from our loader and from torchvision's."""
    calls: dict[str, Callable[..., Passes]] = {}
    for patch, batch in MAE_SIZES:
        calls[f"uint8 HWC P{patch} B{batch}"] = partial(_example, patch, batch=batch)
        calls[f"fp32 CHW P{patch} B{batch}"] = partial(_example, patch, torch.float32, hwc=False, batch=batch)
    return calls
