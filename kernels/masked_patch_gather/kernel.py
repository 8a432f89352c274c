"""Patch gather in Triton: pixels to normalised patch rows in one pass, and the gradient without atomics."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from ..launch import Passes, launch, needs_int64
from ..patches import channel_affine, image_size, patch_width
from ..pixels import adjacent, by_channel, load_pixels, patch_offset, pixel_strides, value_offset
from ..tuning import MAE_SIZES, Tunable, combinations

INDEX_BLOCK = 64  # indices that the backward searches at a time

# ROWS patches and BLOCK columns of a program: a warp for each patch by default, and 8 values for each lane, which are
# 16 bytes of bf16.
GATHER = Tunable(
    op="masked_patch_gather",
    kernel="gather_kernel",
    default={"ROWS": 4, "BLOCK": 256, "num_warps": 4},
    candidates=tuple(
        config
        for config in combinations(ROWS=(2, 4, 8), BLOCK=(128, 256, 512), num_warps=(1, 2, 4, 8))
        if 8 <= config["ROWS"] * config["BLOCK"] // (32 * config["num_warps"]) <= 16
    ),
    exact=("images", "out", "patch", "adjacent", "int64"),
    sizes=("rows", "columns"),
)
# BLOCK columns of one patch; a wider block searches the indices less often.
SCATTER = Tunable(
    op="masked_patch_gather",
    kernel="scatter_kernel",
    default={"BLOCK": 256, "num_warps": 1},
    candidates=tuple(
        config
        for config in combinations(BLOCK=(128, 256, 512, 1024), num_warps=(1, 2, 4))
        if 4 <= config["BLOCK"] // (32 * config["num_warps"]) <= 16
    ),
    exact=("images", "grad", "patch", "adjacent", "int64"),
    sizes=("rows", "count"),
)
TUNABLES = (GATHER, SCATTER)


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
    side_by_side, int64 = adjacent(images), needs_int64(images, indices, out)
    config = GATHER.config(
        images.device, (images.dtype, dtype, patch_size, side_by_side, int64), (batch * count, columns)
    )
    launch(
        gather_kernel,
        (triton.cdiv(batch * count, config["ROWS"]), triton.cdiv(columns, config["BLOCK"])),
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
        ADJACENT=side_by_side,
        INT64=int64,
        **config,
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
    side_by_side, int64 = adjacent(out), needs_int64(grad, indices, out)
    config = SCATTER.config(
        images.device, (images.dtype, grad.dtype, patch_size, side_by_side, int64), (batch * num_patches, count)
    )
    launch(
        scatter_kernel,
        (batch * num_patches, triton.cdiv(patch_width(patch_size), config["BLOCK"])),
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
        ADJACENT=side_by_side,
        INDEX_BLOCK=INDEX_BLOCK,
        INT64=int64,
        **config,
    )
    return out


def _example(
    patch: int, dtype: torch.dtype, *, hwc: bool = True, batch: int = 256, device: torch.device | str
) -> Passes:
    """Returns arguments of each pass for a quarter of the patches of 224-pixel images; of uint8, without gradient."""
    images = torch.randint(
        0, 256, (batch, 224, 224, 3) if hwc else (batch, 3, 224, 224), device=device, dtype=torch.uint8
    )
    indices = torch.rand(batch, (224 // patch) ** 2, device=device).argsort(1)
    indices = indices[:, : indices.shape[1] // 4].contiguous()
    columns = -(-patch_width(patch) // 8) * 8
    if dtype == torch.uint8:
        return {"forward": (images, indices, patch, (), (), columns, torch.bfloat16)}
    images = (images / 255).to(dtype)
    grad = torch.randn((*indices.shape, columns), dtype=torch.bfloat16, device=device)
    return {
        "forward": (images, indices, patch, (), (), columns, dtype),
        "backward": (grad, images, indices, patch, ()),
    }


def representative_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of arguments whose launches cover the compiled variants, for the resource table."""
    calls: dict[str, Callable[..., Passes]] = {
        f"uint8 HWC P{patch}": partial(_example, patch, torch.uint8) for patch in (8, 14, 16, 32)
    }
    calls |= {f"uint8 CHW P{patch}": partial(_example, patch, torch.uint8, hwc=False) for patch in (14, 16)}
    calls["uint8 HWC P16 int64 offsets"] = partial(_example, 16, torch.uint8, batch=2**15)
    calls |= {f"fp32 HWC P{patch}": partial(_example, patch, torch.float32) for patch in (14, 16)}
    calls["bf16 CHW P16"] = partial(_example, 16, torch.bfloat16, hwc=False)
    calls["fp32 HWC P16 int64 offsets"] = partial(_example, 16, torch.float32, batch=2**15)
    return calls


def tuning_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of the arguments that the tuner measures: MAE's, from our loader and from torchvision's."""
    calls: dict[str, Callable[..., Passes]] = {}
    for patch, batch in MAE_SIZES:
        calls[f"uint8 HWC P{patch} B{batch}"] = partial(_example, patch, torch.uint8, batch=batch)
        calls[f"fp32 CHW P{patch} B{batch}"] = partial(_example, patch, torch.float32, hwc=False, batch=batch)
    return calls
