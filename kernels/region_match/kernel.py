"""Region matching in Triton: every pair of student crop and teacher view in one launch, no normalised copies."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from ..checks import interpreting
from ..launch import Passes, launch, needs_int64
from . import reference

PROGRAMS = 256  # that a launch aims at where there are few rows: a fixed number, so that every GPU does the same
BLOCK = 64  # tokens of a tile's side: the least that the matrix units of compute capability 9.0 take
MERGE_BLOCK = 128
ODD_CHUNK = 16  # columns at a time where rows begin at odd addresses: each value is then a load of its own
CHUNK_BYTES = 128  # of a row at a time; with more, products of full float32 precision spill
EPS = tl.constexpr(reference.EPS)
LOWEST = tl.constexpr(reference.LOWEST)


@triton.jit
def match_kernel(
    student,
    teacher,
    index,
    similarity,
    batch,
    rows,
    crops,
    tokens,
    views,
    view_tokens,
    width,
    student_stride,
    teacher_stride,
    tokens_per_share,
    GROUPS: tl.constexpr,
    VIEW_GROUPS: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Matches BLOCK tokens of one image with a share of the tokens of one view of it.

    Neighbouring crops of equally many tokens are a group: `crops` of `tokens` each. The tokens that a program takes
    are from all crops of a group, so that small crops fill its tile together.
    """
    program = tl.program_id(0)
    view = tl.program_id(1)
    group = program
    first_crop = 0
    first_row = 0
    each = 1
    count = 1
    programs_before = 0
    crops_before = 0
    rows_before = 0
    for g in tl.static_range(GROUPS):
        here = program >= programs_before
        group = tl.where(here, program - programs_before, group)
        first_crop = tl.where(here, crops_before, first_crop)
        first_row = tl.where(here, rows_before, first_row)
        each = tl.where(here, tokens[g], each)
        count = tl.where(here, crops[g] * tokens[g], count)
        programs_before += batch * ((crops[g] * tokens[g] + BLOCK - 1) // BLOCK)
        crops_before += crops[g]
        rows_before += batch * crops[g] * tokens[g]
    view_row = 0
    view_each = 1
    views_before = 0
    rows_before = 0
    for g in tl.static_range(VIEW_GROUPS):
        here = view >= views_before
        view_row = tl.where(here, rows_before + (view - views_before) * batch * view_tokens[g], view_row)
        view_each = tl.where(here, view_tokens[g], view_each)
        views_before += views[g]
        rows_before += batch * views[g] * view_tokens[g]

    blocks = tl.cdiv(count, BLOCK)
    sample = group // blocks
    item = (group % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = item < count
    crop = item // each
    row = first_row + (crop * batch + sample) * each + item % each
    view_row += sample * view_each
    wanted = inside
    if SKIP == "view":
        wanted = inside & (first_crop + crop != view)
    if INT64:
        row = row.to(tl.int64)
        view_row = view_row.to(tl.int64)
    ours = student + row[:, None] * student_stride

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    nearest = tl.zeros([BLOCK], tl.int32)
    end = tl.where(tl.max(wanted.to(tl.int32), 0) > 0, view_each, 0)  # nothing, where every row is skipped
    share = tl.program_id(2)
    for start in range(share * tokens_per_share, min((share + 1) * tokens_per_share, end), BLOCK):
        token = start + tl.arange(0, BLOCK)
        candidate = token < view_each
        theirs = teacher + (view_row + token)[:, None] * teacher_stride
        score = tl.zeros([BLOCK, BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, CHUNK):
            column = (first + tl.arange(0, CHUNK))[None, :]
            left = tl.load(ours + column, mask=wanted[:, None] & (column < width), other=0.0)
            right = tl.load(theirs + column, mask=candidate[:, None] & (column < width), other=0.0)
            wide = right.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            if UPCAST_DOT:
                left = left.to(tl.float32)
                right = wide
            score = tl.dot(left, tl.trans(right), score, input_precision=PRECISION)
        # A row's own norm does not change which is nearest: it divides the result, below.
        score = score / tl.maximum(tl.sqrt_rn(squares), EPS)[None, :]
        score = tl.where(score > LOWEST, score, LOWEST)  # and so for NaN
        allowed = candidate[None, :]
        if SKIP == "self":
            allowed = allowed & ((view_row + token)[None, :] != row[:, None])
        score = tl.where(allowed, score, float("-inf"))
        top, position = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        better = top > best  # not equal: the lowest index wins
        best = tl.where(better, top, best)
        nearest = tl.where(better, start + position, nearest)

    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, CHUNK):
        column = (first + tl.arange(0, CHUNK))[None, :]
        left = tl.load(ours + column, mask=wanted[:, None] & (column < width), other=0.0).to(tl.float32)
        squares += tl.sum(left * left, 1)
    value = best / tl.maximum(tl.sqrt_rn(squares), EPS)
    value = tl.where(best > LOWEST, value, float("nan"))
    output = share * tl.num_programs(1) + view
    place = (output.to(tl.int64) if INT64 else output) * rows + row
    tl.store(index + place, tl.where(wanted, (view_row + nearest).to(tl.int64), -1), mask=inside)
    tl.store(similarity + place, tl.where(wanted, value, 0.0), mask=inside)


@triton.jit
def merge_kernel(
    indices,
    similarities,
    index,
    similarity,
    count,
    shares,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Takes the best of all shares, the first of equal ones; NaN gives way to everything."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    if INT64:
        place = place.to(tl.int64)
    best = tl.load(similarities + place, mask=inside, other=0.0)
    nearest = tl.load(indices + place, mask=inside, other=0)
    offset = place
    for _ in range(1, shares):
        offset += count
        value = tl.load(similarities + offset, mask=inside, other=0.0)
        better = (value > best) | ((best != best) & (value == value))
        best = tl.where(better, value, best)
        nearest = tl.where(better, tl.load(indices + offset, mask=inside, other=0), nearest)
    tl.store(index + place, nearest, mask=inside)
    tl.store(similarity + place, best, mask=inside)


def _groups(tokens: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns how many neighbours have equally many tokens, and how many tokens that is, run by run."""
    runs = [(len(list(run)), size) for size, run in itertools.groupby(tokens)]
    return tuple(length for length, _ in runs), tuple(size for _, size in runs)


def forward(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_tokens: Sequence[int],
    teacher_tokens: Sequence[int],
    skip: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the matching. Arguments and results as in the reference."""
    rows, width = student.shape
    batch = len(teacher) // sum(teacher_tokens)
    crops, tokens = _groups(student_tokens)
    views, view_tokens = _groups(teacher_tokens)
    programs = batch * sum(triton.cdiv(many * size, BLOCK) for many, size in zip(crops, tokens, strict=True))
    # Few rows against many: shares of a view, of whole tiles, are searched side by side, and the best of each merged.
    blocks = triton.cdiv(max(teacher_tokens), BLOCK)
    shares = min(triton.cdiv(PROGRAMS, max(programs * len(teacher_tokens), 1)), blocks)
    blocks_per_share = triton.cdiv(blocks, shares)
    shares = triton.cdiv(blocks, blocks_per_share)
    index = torch.empty((shares, len(teacher_tokens), rows), dtype=torch.int64, device=student.device)
    similarity = torch.empty(index.shape, dtype=torch.float32, device=student.device)
    int64 = needs_int64(student, teacher, index)
    odd = any(size % 16 for size in (width, student.stride(0), teacher.stride(0)))
    launch(
        match_kernel,
        (programs, len(teacher_tokens), shares),
        student,
        teacher,
        index,
        similarity,
        batch,
        rows,
        crops,
        tokens,
        views,
        view_tokens,
        width,
        student.stride(0),
        teacher.stride(0),
        blocks_per_share * BLOCK,
        GROUPS=len(crops),
        VIEW_GROUPS=len(views),
        SKIP=skip,
        # The user's own choice for products of float32; it changes nothing in half precision.
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        UPCAST_DOT=interpreting(),  # whose products in bf16 are wrong
        BLOCK=BLOCK,
        CHUNK=ODD_CHUNK if odd else CHUNK_BYTES // student.element_size(),
        INT64=int64,
        num_warps=8 if odd else 4,  # half the accumulators in each lane, whose registers hold addresses
        num_stages=3,
    )
    if shares == 1:
        return index[0], similarity[0]
    return _merged(index, similarity, int64)


def _merged(indices: torch.Tensor, similarities: torch.Tensor, int64: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the best over the first dimension."""
    index, similarity = torch.empty_like(indices[0]), torch.empty_like(similarities[0])
    launch(
        merge_kernel,
        (triton.cdiv(index.numel(), MERGE_BLOCK),),
        indices,
        similarities,
        index,
        similarity,
        index.numel(),
        len(indices),
        BLOCK=MERGE_BLOCK,
        INT64=int64,
        num_warps=4,
    )
    return index, similarity


def _example(
    dtype: torch.dtype,
    *,
    batch: int = 128,
    student: tuple[int, ...] = (49,) * 2 + (9,) * 8,
    teacher: tuple[int, ...] = (49,) * 2,
    width: int = 768,
    skip: str = "view",
    device: torch.device | str,
) -> Passes:
    """Returns arguments of the pass for EsViT's crops."""
    rows, others = (
        torch.randn(batch * sum(tokens), width, dtype=dtype, device=device) for tokens in (student, teacher)
    )
    return {"forward": (rows, others, list(student), list(teacher), skip)}


def representative_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of arguments whose launches cover the compiled variants, for the resource table."""
    neighbours = partial(_example, batch=1, student=(4096,), teacher=(4096,), width=384, skip="self")
    return {
        "bf16 2x49+8x9 C768": partial(_example, torch.bfloat16),
        "fp16 2x49+8x9 C768": partial(_example, torch.float16),
        "fp32 2x49+8x9 C768": partial(_example, torch.float32),
        "bf16 one pair 49 C768": partial(_example, torch.bfloat16, student=(49,), teacher=(49,), skip="nothing"),
        "bf16 neighbours N4096 C384": partial(neighbours, torch.bfloat16),
        "fp32 neighbours N4096 C384": partial(neighbours, torch.float32),
        "bf16 2x49+8x9 C385": partial(_example, torch.bfloat16, width=385),
        "fp32 2x49+8x9 C385": partial(_example, torch.float32, width=385),
        "bf16 2x49+8x9 C768 int64 offsets": partial(_example, torch.bfloat16, batch=2**14),
    }
