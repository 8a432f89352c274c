"""Random masking in Triton: every position counts how many others sort before it."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..launch import launch, needs_int64

BLOCK = 64  # positions ranked by a program
CHUNK = 64  # positions they are compared with at a time


@triton.jit
def sorts_before(left, right):
    """Whether `left` sorts strictly before `right`; NaN sorts last, as in torch.sort."""
    return (left < right) | ((left == left) & (right != right))


@triton.jit
def rank_kernel(
    noise,
    ids_keep,
    ids_mask,
    ids_restore,
    length,
    keep,
    stride_sample,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Ranks a block of positions of one sample and writes them where their ranks say.

    Ranks are a permutation of 0..length-1, so every output element is written once, by one program.
    """
    sample = tl.program_id(0)
    if INT64:
        sample = sample.to(tl.int64)
    noise += sample * stride_sample
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(noise + position, mask=position < length, other=0.0)[:, None]
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = tl.load(noise + other, mask=other < length, other=0.0)[None, :]
        tied = (sorts_before(theirs, mine) | sorts_before(mine, theirs)) == 0
        before = sorts_before(theirs, mine) | (tied & (other[None, :] < position[:, None]))
        rank += tl.sum((before & (other < length)[None, :]).to(tl.int32), 1)

    inside = position < length
    tl.store(ids_restore + sample * length + position, rank.to(tl.int64), mask=inside)
    value = position.to(tl.int64)
    tl.store(ids_keep + sample * keep + rank, value, mask=inside & (rank < keep))
    tl.store(ids_mask + sample * (length - keep) + rank - keep, value, mask=inside & (rank >= keep))


def forward(noise: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the ranking. Arguments and results as in the reference."""
    batch, length = noise.shape
    ids_keep = torch.empty((batch, keep), dtype=torch.int64, device=noise.device)
    ids_mask = torch.empty((batch, length - keep), dtype=torch.int64, device=noise.device)
    ids_restore = torch.empty((batch, length), dtype=torch.int64, device=noise.device)
    launch(
        rank_kernel,
        (batch, triton.cdiv(length, BLOCK)),
        noise,
        ids_keep,
        ids_mask,
        ids_restore,
        length,
        keep,
        noise.stride(0),
        BLOCK=BLOCK,
        CHUNK=CHUNK,
        INT64=needs_int64(noise, ids_restore),
        num_warps=4,
    )
    return ids_keep, ids_mask, ids_restore


def representative_calls() -> dict[str, Callable[[], object]]:
    """Returns calls on meta tensors whose launches cover the compiled variants, for the resource table."""
    small = torch.empty(256, 256, device="meta")
    large = torch.empty(2**21, 1024, device="meta")
    return {
        "L256": lambda: forward(small, 64),
        "L256 fp64": lambda: forward(small.double(), 64),
        "L1024 int64 offsets": lambda: forward(large, 256),
    }
