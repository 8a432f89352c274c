"""Device functions that read the pixels of a patch, shared by the Triton kernels over images."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl

from .patches import channels_last


@triton.jit
def patch_offset(patch, grid_width, strides, PATCH: tl.constexpr, ADJACENT: tl.constexpr):
    """Returns the offset of a patch's first pixel from its image's."""
    # A stride known to be 3 lets the compiler see that P=16 patches begin at multiples of 16 bytes.
    step = 3 if ADJACENT else strides[2]
    return (patch // grid_width) * PATCH * strides[1] + (patch % grid_width) * PATCH * step


@triton.jit
def value_offset(value, strides, PATCH: tl.constexpr, ADJACENT: tl.constexpr):
    """Returns the offset of value (row, column, channel) number `value` of a patch from the patch's first pixel."""
    row = value // (3 * PATCH)
    within = value % (3 * PATCH)
    if ADJACENT:  # the 3 P values of a patch row lie side by side
        return row * strides[1] + within
    return row * strides[1] + (within // 3) * strides[2] + (within % 3) * strides[3]


@triton.jit
def by_channel(value, numbers):
    """Returns, for each patch value, the number that belongs to its channel."""
    channel = value % 3
    return tl.where(channel == 0, numbers[0], tl.where(channel == 1, numbers[1], numbers[2]))


@triton.jit
def load_pixels(
    images,
    sample,
    patch,
    value,
    wanted,
    num_patches,
    grid_width,
    strides,
    scale,
    shift,
    PATCH: tl.constexpr,
    ADJACENT: tl.constexpr,
    INT64: tl.constexpr,
):
    """Returns normalised patch values in fp32, zero where not `wanted` or where `patch` is out of range.

    `strides` are those of sample, row, column and channel; `scale` and `shift` hold a number for each channel.

    `value` numbers the values inside the patch. `sample` and `patch` broadcast against it; `patch` must be a
    block, if of one element, since the interpreter cannot broadcast a scalar condition.
    """
    wanted = wanted & (patch >= 0) & (patch < num_patches)
    if not INT64:
        patch = patch.to(tl.int32)  # a value that this cuts is out of range, hence not wanted
    offset = sample * strides[0] + patch_offset(patch, grid_width, strides, PATCH, ADJACENT)
    offset += value_offset(value, strides, PATCH, ADJACENT)
    # fp32 before any arithmetic: free on a GPU, and the interpreter computes garbage in bf16.
    raw = tl.load(images + offset, mask=wanted, other=0).to(tl.float32)
    return tl.where(wanted, raw * by_channel(value, scale) + by_channel(value, shift), 0.0)


def pixel_strides(images: torch.Tensor) -> tuple[int, int, int, int]:
    """Returns the strides of sample, row, column and channel, in elements, whatever the layout."""
    sample, row, column, channel = channels_last(images).stride()
    return sample, row, column, channel


def adjacent(images: torch.Tensor) -> bool:
    """Whether the values of one row of an image lie side by side: [B, H, W, 3], or NCHW in channels_last memory."""
    return pixel_strides(images)[2:] == (3, 1)
