"""Patch gather in Triton: pixels to normalised patch rows in one pass, and the gradient without atomics."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from ..launch import launch, needs_int64
from ..patches import channel_affine, image_size, patch_width
from ..pixels import adjacent, by_channel, load_pixels, patch_offset, pixel_strides, value_offset

ROWS = 4  # patches of a gather program: a warp for each
BLOCK = 256  # columns of a program: 8 for each lane, 16 bytes of bf16
INDEX_BLOCK = 64  # indices that the backward searches at a time


@triton.jit
def gather_kernel(
    images,
    indices,
    out,
    rows,
    count,
    num_patches,
    grid_width,
    stride_index,
    strides,
    scale,
    shift,
    COLUMNS: tl.constexpr,
    PATCH: tl.constexpr,
    ADJACENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes a block of columns of ROWS patches; `rows` is B V, `count` is V."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if INT64:
        row = row.to(tl.int64)
    sample = row // count
    patch = tl.load(indices + sample * stride_index + row % count, mask=inside, other=0)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    pixels = load_pixels(
        images,
        sample[:, None],
        patch[:, None],
        column,
        inside[:, None] & (column < 3 * PATCH * PATCH),
        num_patches,
        grid_width,
        strides,
        scale,
        shift,
        PATCH,
        ADJACENT,
        INT64,
    )
    target = out + row[:, None] * COLUMNS + column
    tl.store(target, pixels.to(out.dtype.element_ty), mask=inside[:, None] & (column < COLUMNS))


@triton.jit
def scatter_kernel(
    grad,
    indices,
    out,
    count,
    num_patches,
    grid_width,
    stride_index,
    grad_strides,
    strides,
    scale,
    PATCH: tl.constexpr,
    ADJACENT: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX_BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes the gradient of one image patch: searches the indices for it and adds the rows found, in their order."""
    program = tl.program_id(0)
    if INT64:
        program = program.to(tl.int64)
    sample = program // num_patches
    patch = program % num_patches
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wanted = column < 3 * PATCH * PATCH
    indices += sample * stride_index
    grad += sample * grad_strides[0]
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, INDEX_BLOCK):
        slots = start + tl.arange(0, INDEX_BLOCK)
        found = tl.load(indices + slots, mask=slots < count, other=-1) == patch
        if tl.sum(found.to(tl.int32), 0) > 0:  # most blocks hold no match
            for slot in range(start, min(start + INDEX_BLOCK, count)):
                if tl.load(indices + slot) == patch:
                    row = grad + slot * grad_strides[1]
                    total += tl.load(row + column * grad_strides[2], mask=wanted, other=0.0).to(tl.float32)
    total *= by_channel(column, scale)
    offset = sample * strides[0] + patch_offset(patch, grid_width, strides, PATCH, ADJACENT)
    offset += value_offset(column, strides, PATCH, ADJACENT)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=wanted)


def forward(
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launches the gather. Arguments and result as in the reference."""
    batch, count = indices.shape
    height, width = image_size(images)
    out = torch.empty((batch, count, columns), dtype=dtype, device=images.device)
    scale, shift = channel_affine(images, mean, std)
    launch(
        gather_kernel,
        (triton.cdiv(batch * count, ROWS), triton.cdiv(columns, BLOCK)),
        images,
        indices,
        out,
        batch * count,
        count,
        (height // patch_size) * (width // patch_size),
        width // patch_size,
        indices.stride(0),
        pixel_strides(images),
        scale,
        shift,
        COLUMNS=columns,
        PATCH=patch_size,
        ADJACENT=adjacent(images),
        ROWS=ROWS,
        BLOCK=BLOCK,
        INT64=needs_int64(images, indices, out),
        num_warps=ROWS,
    )
    return out


def backward(
    grad: torch.Tensor,
    images: torch.Tensor,
    indices: torch.Tensor,
    patch_size: int,
    std: Sequence[float],
) -> torch.Tensor:
    """Launches the scatter. Arguments and result as in the reference; `grad` may have any strides."""
    batch, count = indices.shape
    height, width = image_size(images)
    num_patches = (height // patch_size) * (width // patch_size)
    out = torch.empty_like(images)
    scale, _ = channel_affine(images, std, std)
    launch(
        scatter_kernel,
        (batch * num_patches, triton.cdiv(patch_width(patch_size), BLOCK)),
        grad,
        indices,
        out,
        count,
        num_patches,
        width // patch_size,
        indices.stride(0),
        grad.stride(),
        pixel_strides(out),
        scale,
        PATCH=patch_size,
        ADJACENT=adjacent(out),
        BLOCK=BLOCK,
        INDEX_BLOCK=INDEX_BLOCK,
        INT64=needs_int64(grad, indices, out),
        num_warps=1,
    )
    return out


def representative_calls() -> dict[str, Callable[[], object]]:
    """Returns calls on meta tensors whose launches cover the compiled variants, for the resource table."""

    def gather(patch: int, dtype: torch.dtype, *, hwc: bool = True, size: int = 224, batch: int = 256) -> object:
        images = torch.empty((batch, size, size, 3) if hwc else (batch, 3, size, size), dtype=dtype, device="meta")
        indices = torch.empty((batch, (size // patch) ** 2 // 4), dtype=torch.int64, device="meta")
        columns = -(-patch_width(patch) // 8) * 8
        if dtype == torch.uint8:
            return forward(images, indices, patch, (), (), columns, torch.bfloat16)
        grad = torch.empty((*indices.shape, columns), dtype=torch.bfloat16, device="meta")
        return forward(images, indices, patch, (), (), columns, dtype), backward(grad, images, indices, patch, ())

    calls: dict[str, Callable[[], object]] = {
        f"uint8 HWC P{patch}": partial(gather, patch, torch.uint8) for patch in (8, 14, 16, 32)
    }
    calls |= {f"uint8 CHW P{patch}": partial(gather, patch, torch.uint8, hwc=False) for patch in (14, 16)}
    calls["uint8 HWC P16 int64 offsets"] = partial(gather, 16, torch.uint8, batch=2**15)
    calls |= {f"fp32 HWC P{patch}": partial(gather, patch, torch.float32) for patch in (14, 16)}
    calls["bf16 CHW P16"] = partial(gather, 16, torch.bfloat16, hwc=False)
    calls["fp32 HWC P16 int64 offsets"] = partial(gather, 16, torch.float32, batch=2**15)
    return calls
