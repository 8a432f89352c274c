"""Token restoring in Triton: one launch forward; backward, one pass over the gradient and fixed-order sums."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from ..launch import Passes, launch, needs_int64
from ..reduction import sum_partials
from ..tuning import MAE_SIZES, Config, Tunable, combinations

PROGRAMS = 2048  # that the backward aims at: a fixed number, so that every GPU adds the same partial sums

# ROWS tokens (forward) or samples (backward) and at most MAX_BLOCK columns of a tile: by default a whole row of MAE's
# decoder, and 16 values for each lane.
DEFAULT = {"ROWS": 4, "MAX_BLOCK": 512, "num_warps": 4}
CANDIDATES = tuple(
    config
    for config in combinations(ROWS=(2, 4, 8), MAX_BLOCK=(256, 512, 1024), num_warps=(2, 4, 8))
    if 8 <= config["ROWS"] * config["MAX_BLOCK"] // (32 * config["num_warps"]) <= 32
)
SIZES = ("batch", "tokens", "width")
RESTORE = Tunable(
    op="restore_tokens",
    kernel="restore_kernel",
    default=DEFAULT,
    candidates=CANDIDATES,
    exact=("visible", "mask_token", "pos_embed", "out", "int64"),
    sizes=SIZES,
)
RESTORE_BACKWARD = Tunable(
    op="restore_tokens",
    kernel="restore_backward_kernel",
    default=DEFAULT,
    candidates=CANDIDATES,
    exact=("grad", "visible", "mask_token", "pos_embed", "int64"),  # None for a gradient that is not wanted
    sizes=SIZES,
)
TUNABLES = (RESTORE, RESTORE_BACKWARD)


@triton.jit
def restore_kernel(
    visible,
    ids_restore,
    mask_token,
    pos_embed,
    out,
    tokens,
    width,
    num_prefix,
    num_visible,
    visible_strides,
    stride_ids,
    stride_mask,
    stride_pos,
    HAS_POS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes a block of columns of ROWS tokens of one sample; `stride_mask` is 0 for a single mask token."""
    blocks = tl.cdiv(tokens, ROWS)
    sample = tl.program_id(0) // blocks
    token = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = token < tokens
    if INT64:
        sample = sample.to(tl.int64)
        token = token.to(tl.int64)

    is_prefix = token < num_prefix
    rank = tl.load(ids_restore + sample * stride_ids + token - num_prefix, mask=inside & (is_prefix == 0), other=0)
    is_visible = is_prefix | ((rank >= 0) & (rank < num_visible))
    source = tl.where(is_prefix, token, num_prefix + tl.where(is_visible, rank, 0).to(token.dtype))[:, None]
    in_tile = inside[:, None] & (column < width)
    from_visible = in_tile & is_visible[:, None]
    from_mask = in_tile & (is_visible[:, None] == 0)

    row = visible + sample * visible_strides[0] + source * visible_strides[1]
    value = tl.load(row + column, mask=from_visible, other=0.0).to(tl.float32)
    place = (token - num_prefix)[:, None] * stride_mask
    filler = tl.load(mask_token + place + column, mask=from_mask, other=0.0).to(tl.float32)
    value = tl.where(from_visible, value, filler)
    if HAS_POS:
        value += tl.load(pos_embed + token[:, None] * stride_pos + column, mask=in_tile, other=0.0).to(tl.float32)
    target = out + (sample * tokens + token)[:, None] * width + column
    tl.store(target, value.to(out.dtype.element_ty), mask=in_tile)


@triton.jit
def restore_backward_kernel(
    grad,
    ids_restore,
    grad_visible,
    mask_partials,
    pos_partials,
    batch,
    tokens,
    width,
    num_prefix,
    num_visible,
    samples_per_program,
    grad_strides,
    stride_ids,
    WANT_VISIBLE: tl.constexpr,
    WANT_MASK: tl.constexpr,
    WANT_POS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INT64: tl.constexpr,
):
    """Reads one token's gradient over a share of the samples: moves visible rows, sums masked rows and all rows."""
    token = tl.program_id(0)
    share = tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if INT64:
        token = token.to(tl.int64)
    length = tokens - num_prefix
    position = token - num_prefix  # negative for a prefix token
    mask_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    pos_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    end = min((share + 1) * samples_per_program, batch)
    for start in range(share * samples_per_program, end, ROWS):
        sample = start + tl.arange(0, ROWS)
        inside = sample < end
        if INT64:
            sample = sample.to(tl.int64)
        in_tile = inside[:, None] & (column < width)[None, :]
        place = grad + sample[:, None] * grad_strides[0] + token * grad_strides[1] + column[None, :] * grad_strides[2]
        value = tl.load(place, mask=in_tile, other=0.0).to(tl.float32)
        # A prefix token keeps its row: as ranks count from the first patch token, its rank is its position.
        rank = position + tl.zeros([ROWS], tl.int64)
        if position >= 0:
            rank = tl.load(ids_restore + sample * stride_ids + position, mask=inside, other=0)
            rank = tl.where(rank < 0, num_visible, rank)  # out of range counts as masked
        is_visible = rank < num_visible
        if WANT_VISIBLE:
            row = sample * (num_prefix + num_visible) + num_prefix + tl.where(is_visible, rank, 0).to(sample.dtype)
            target = grad_visible + row[:, None] * width + column[None, :]
            tl.store(target, value.to(grad_visible.dtype.element_ty), mask=in_tile & is_visible[:, None])
        if WANT_MASK:
            mask_sum += tl.where(is_visible[:, None], 0.0, value)
        if WANT_POS:
            pos_sum += value
    if WANT_MASK and position >= 0:
        target = mask_partials + (share * length + position) * width + column
        tl.store(target, tl.sum(mask_sum, 0), mask=column < width)
    if WANT_POS:
        target = pos_partials + (share * tokens + token) * width + column
        tl.store(target, tl.sum(pos_sum, 0), mask=column < width)


def _block(width: int, config: Config) -> int:
    """Returns the number of columns of a tile over rows of `width` values."""
    return min(triton.next_power_of_2(max(width, 1)), config["MAX_BLOCK"])


def forward(
    visible: torch.Tensor,
    ids_restore: torch.Tensor,
    mask_token: torch.Tensor,
    pos_embed: torch.Tensor | None,
    num_prefix: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launches the restoring. Arguments and result as in the reference."""
    batch, length = ids_restore.shape
    tokens, width = num_prefix + length, visible.shape[2]
    out = torch.empty((batch, tokens, width), dtype=dtype, device=visible.device)
    pos_dtype = None if pos_embed is None else pos_embed.dtype
    int64 = needs_int64(visible, ids_restore, mask_token, pos_embed, out)
    config = RESTORE.config(
        visible.device, (visible.dtype, mask_token.dtype, pos_dtype, dtype, int64), (batch, tokens, width)
    )
    block = _block(width, config)
    launch(
        restore_kernel,
        (batch * triton.cdiv(tokens, config["ROWS"]), triton.cdiv(width, block)),
        visible,
        ids_restore,
        mask_token,
        pos_embed,
        out,
        tokens,
        width,
        num_prefix,
        visible.shape[1] - num_prefix,
        visible.stride(),
        ids_restore.stride(0),
        mask_token.stride(0) if mask_token.ndim == 2 else 0,
        0 if pos_embed is None else pos_embed.stride(0),
        HAS_POS=pos_embed is not None,
        ROWS=config["ROWS"],
        BLOCK=block,
        INT64=int64,
        num_warps=config["num_warps"],
    )
    return out


def backward(
    grad: torch.Tensor,
    ids_restore: torch.Tensor,
    num_visible: int,
    num_prefix: int,
    visible_dtype: torch.dtype | None,
    mask_dtype: torch.dtype | None,
    per_position: bool,
    pos_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the pass over the gradient and the sums. Arguments and results as in the reference."""
    batch, tokens, width = grad.shape
    length = tokens - num_prefix
    # By the default tile, whatever the launched one: the partial sums must not depend on the configuration.
    programs = tokens * triton.cdiv(width, _block(width, DEFAULT))
    shares = min(triton.cdiv(PROGRAMS, max(programs, 1)), max(triton.cdiv(batch, DEFAULT["ROWS"]), 1))
    samples_per_program = max(triton.cdiv(batch, shares), 1)

    def buffer(shape: tuple[int, ...], wanted: bool, dtype: torch.dtype | None) -> torch.Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype or grad.dtype, device=grad.device)

    want_visible, want_mask, want_pos = (dtype is not None for dtype in (visible_dtype, mask_dtype, pos_dtype))
    grad_visible = buffer((batch, num_prefix + num_visible, width), want_visible, visible_dtype)
    mask_partials = buffer((shares, length, width), want_mask, torch.float32)
    pos_partials = buffer((shares, tokens, width), want_pos, torch.float32)
    grad_mask = buffer((length, width) if per_position else (width,), want_mask, mask_dtype)
    grad_pos = buffer((tokens, width), want_pos, pos_dtype)
    int64 = needs_int64(grad, ids_restore, grad_visible, mask_partials, pos_partials)
    config = RESTORE_BACKWARD.config(
        grad.device, (grad.dtype, visible_dtype, mask_dtype, pos_dtype, int64), (batch, tokens, width)
    )
    block = _block(width, config)
    launch(
        restore_backward_kernel,
        (tokens, shares, triton.cdiv(width, block)),
        grad,
        ids_restore,
        grad_visible,
        mask_partials,
        pos_partials,
        batch,
        tokens,
        width,
        num_prefix,
        num_visible,
        samples_per_program,
        grad.stride(),
        ids_restore.stride(0),
        WANT_VISIBLE=want_visible,
        WANT_MASK=want_mask,
        WANT_POS=want_pos,
        ROWS=config["ROWS"],
        BLOCK=block,
        INT64=int64,
        num_warps=config["num_warps"],
    )
    if want_mask:
        sum_partials(
            mask_partials.view(shares, -1) if per_position else mask_partials.view(-1, width), grad_mask.view(-1)
        )
    if want_pos:
        sum_partials(pos_partials.view(shares, -1), grad_pos.view(-1))
    return grad_visible, grad_mask, grad_pos


def _example(
    visible: torch.dtype,
    *,
    mask: torch.dtype = torch.float32,
    width: int = 512,
    length: int = 256,
    table: bool = False,
    pos: bool = True,
    learned_pos: bool = True,
    batch: int = 256,
    device: torch.device | str,
) -> Passes:
    """Returns arguments of each pass with a class token and a quarter of the tokens visible."""
    ids_restore = torch.rand(batch, length, device=device).argsort(1)
    keep = length // 4
    randn = partial(torch.randn, device=device)
    dtype = torch.float32 if pos else visible
    return {
        "forward": (
            randn(batch, 1 + keep, width, dtype=visible),
            ids_restore,
            randn(*((length, width) if table else (width,)), dtype=mask),
            randn(1 + length, width) if pos else None,
            1,
            dtype,
        ),
        "backward": (
            randn(batch, 1 + length, width, dtype=dtype),
            ids_restore,
            keep,
            1,
            visible,
            mask,
            table,
            torch.float32 if pos and learned_pos else None,
        ),
    }


def representative_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of arguments whose launches cover the compiled variants, for the resource table."""
    return {
        "bf16 with fp32 positions D512": partial(_example, torch.bfloat16),
        "fp32 D512": partial(_example, torch.float32),
        "bf16 mask table without positions D512": partial(_example, torch.bfloat16, table=True, pos=False),
        "bf16 with fp32 positions D1280": partial(_example, torch.bfloat16, width=1280),
        "bf16 with fp32 positions D512 int64 offsets": partial(_example, torch.bfloat16, batch=2**14),
    }


def tuning_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of the arguments that the tuner measures: the tokens and the first qkv of MAE's decoder."""
    calls: dict[str, Callable[..., Passes]] = {}
    for patch, batch in MAE_SIZES:
        example = partial(_example, torch.bfloat16, length=(224 // patch) ** 2, batch=batch)
        calls[f"tokens D512 P{patch} B{batch}"] = partial(example, learned_pos=False)
        calls[f"qkv D1536 P{patch} B{batch}"] = partial(example, mask=torch.bfloat16, width=1536, table=True, pos=False)
    return calls
