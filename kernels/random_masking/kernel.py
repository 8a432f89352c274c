"""Random masking in Triton: every position counts how many others sort before it."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from ..launch import Passes, launch, needs_int64
from ..tuning import MAE_SIZES, Tunable, combinations

# BLOCK positions are ranked by a program, and compared with CHUNK at a time: 8 to 32 comparisons for each lane.
RANK = Tunable(
    op="random_masking",
    kernel="rank_kernel",
    default={"BLOCK": 64, "CHUNK": 64, "num_warps": 4},
    candidates=tuple(
        config
        for config in combinations(BLOCK=(32, 64, 128), CHUNK=(32, 64, 128), num_warps=(2, 4, 8))
        if 8 <= config["BLOCK"] * config["CHUNK"] // (32 * config["num_warps"]) <= 32
    ),
    exact=("noise", "int64"),
    sizes=("batch", "length"),
)
TUNABLES = (RANK,)


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
    int64 = needs_int64(noise, ids_restore)
    config = RANK.config(noise.device, (noise.dtype, int64), (batch, length))
    launch(
        rank_kernel,
        (batch, triton.cdiv(length, config["BLOCK"])),
        noise,
        ids_keep,
        ids_mask,
        ids_restore,
        length,
        keep,
        noise.stride(0),
        INT64=int64,
        **config,
    )
    return ids_keep, ids_mask, ids_restore


def _example(batch: int, length: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str) -> Passes:
    """Returns arguments of each pass that keep a quarter of the positions."""
    return {"forward": (torch.rand(batch, length, dtype=dtype, device=device), length // 4)}


def representative_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of arguments whose launches cover the compiled variants, for the resource table."""
    return {
        "L256": partial(_example, 256, 256),
        "L256 fp64": partial(_example, 256, 256, dtype=torch.float64),
        "L1024 int64 offsets": partial(_example, 2**21, 1024),
    }


def tuning_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of the arguments that the tuner measures: MAE's."""
    return {f"P{patch} B{batch}": partial(_example, batch, (224 // patch) ** 2) for patch, batch in MAE_SIZES}
