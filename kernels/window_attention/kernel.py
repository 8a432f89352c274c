"""Windowed attention in Triton: windows are read from the map and written back to it, shifted or not, uncopied."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import Passes, launch, record_launches
from ..reduction import sum_partials
from ..tiles import LN2, LOG2E, MULTIPROCESSORS, Tile
from .gradient import table_backward_kernel, window_backward_kernel
from .layout import Layout, layout
from .tiled_gradient import key_backward_kernel, query_backward_kernel
from .tokens import load_bias, load_head, load_tokens, locate, slope, split_window, store_tokens

PROGRAMS = 4096  # that a launch aims at: several for each multiprocessor
RESIDENT = 2 * MULTIPROCESSORS  # programs that run side by side where each sums over many windows
MAX_WINDOWS = 16  # of a program, which loads the biases of a small window once for all of them
ENTRIES = 16  # of the table of biases that a program of the last kernel sums up
QUERIES = 64  # that it looks at together


@triton.jit
def forward_kernel(
    qkv,
    table,
    qkv_bias,
    out,
    lse,
    windows,
    windows_per_program,
    scale,
    heads,
    sizes,
    strides,
    table_strides,
    HELD: tl.constexpr,
    STREAMED: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    FILL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    INT64: tl.constexpr,
):
    """Writes the attention of HELD queries of one head to the keys of their window, window by window."""
    TOKENS: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (TOKENS + HELD - 1) // HELD
    ONCE: tl.constexpr = TOKENS <= STREAMED  # all keys at a time: the biases are the same for every window
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % TILES
    first = tl.program_id(0) // (heads * TILES) * windows_per_program
    channels = heads * HEAD
    qkv += head * HEAD
    table += head * table_strides[1]
    factor = scale * LOG2E

    asked = tile * HELD + tl.arange(0, HELD)
    position = tl.minimum(asked, TOKENS - 1)  # the others are as the last one, and are not stored
    query_slope = slope(position, WINDOW)
    if ONCE:
        key_slope = slope(tl.minimum(tl.arange(0, STREAMED), TOKENS - 1), WINDOW)
        bias = load_bias(table, query_slope[:, None] - key_slope[None, :], table_strides[0], WINDOW)
    if FILL:
        pad_key = load_head(qkv_bias + channels + head * HEAD, HEAD, BLOCK_HEAD).to(qkv.dtype.element_ty)
        pad_value = load_head(qkv_bias + 2 * channels + head * HEAD, HEAD, BLOCK_HEAD).to(qkv.dtype.element_ty)
    for window in range(first, min(first + windows_per_program, windows)):
        image, down, across = split_window(window, sizes)
        source = qkv + image * strides[0]
        row, column, real, region = locate(position, down, across, sizes, WINDOW, SHIFT, PADDED, INT64)
        real = real & (asked < TOKENS)
        query = load_tokens(source, row * strides[1] + column * strides[2], real, HEAD, BLOCK_HEAD, UPCAST)
        place = row * sizes[1] + column
        peak = tl.full([HELD], float("-inf"), tl.float32)
        total = tl.zeros([HELD], tl.float32)
        mean = tl.zeros([HELD, BLOCK_HEAD], tl.float32)
        for start in range(0, TOKENS, STREAMED):
            slot = start + tl.arange(0, STREAMED)
            key_position = tl.minimum(slot, TOKENS - 1)
            key_row, key_column, there, key_region = locate(
                key_position, down, across, sizes, WINDOW, SHIFT, PADDED, INT64
            )
            key_region = tl.where(slot < TOKENS, key_region, -1)
            offset = key_row * strides[1] + key_column * strides[2]
            key = load_tokens(source + channels, offset, there, HEAD, BLOCK_HEAD, UPCAST)
            value = load_tokens(source + 2 * channels, offset, there, HEAD, BLOCK_HEAD, UPCAST)
            if FILL:
                key = tl.where(there[:, None], key, pad_key[None, :].to(key.dtype))
                value = tl.where(there[:, None], value, pad_value[None, :].to(value.dtype))
            if not ONCE:
                difference = query_slope[:, None] - slope(key_position, WINDOW)[None, :]
                bias = load_bias(table, difference, table_strides[0], WINDOW)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor + bias
            logits = tl.where(region[:, None] == key_region[None, :], logits, float("-inf"))
            higher = tl.maximum(peak, tl.max(logits, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # of a query that has met no key yet
            weight = tl.exp2(logits - base[:, None])
            rescale = tl.exp2(peak - base)
            total = total * rescale + tl.sum(weight, 1)
            mean = tl.dot(weight.to(value.dtype), value, mean * rescale[:, None], input_precision=PRECISION)
            peak = higher
        mean *= (1.0 / total)[:, None]
        target = out + image * sizes[0] * sizes[1] * channels + head * HEAD
        store_tokens(target, place * channels, real, mean, HEAD, BLOCK_HEAD)
        target = lse + (image * heads + head) * sizes[0] * sizes[1]
        tl.store(target + place, (peak + tl.log2(total)) * LN2, mask=real)


def forward(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the attention. Arguments and results as in the reference; rows of channels must be contiguous."""
    batch, height, width, channels = qkv.shape
    out = torch.empty((batch, height, width, channels // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, num_heads, height, width), dtype=torch.float32, device=qkv.device)
    divided = layout(qkv, qkv_bias, window_size, shift, num_heads, out)
    tile, tiles = divided.forward, divided.tiles(divided.forward)
    once = window_size**2 <= tile.streamed  # then biases are loaded once for several windows
    table, table_strides = (bias_table, bias_table.stride()) if once else _table(bias_table)
    programs = triton.cdiv(PROGRAMS, num_heads * tiles)
    windows_per_program = min(max(divided.windows // programs, 1), MAX_WINDOWS)
    launch(
        forward_kernel,
        (num_heads * tiles * triton.cdiv(divided.windows, windows_per_program),),
        qkv,
        table,
        qkv_bias,
        out,
        lse,
        divided.windows,
        windows_per_program,
        scale,
        num_heads,
        divided.sizes,
        qkv.stride()[:3],
        table_strides,
        **_options(tile, divided),
    )
    return out, lse


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window_size: int,
    shift: int,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the gradients and the sums over windows. Arguments and results as in the reference."""
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    divided = layout(qkv, qkv_bias, window_size, shift, num_heads, grad, out, grad_qkv)
    passes: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    passes = _backward_in_tiles if divided.gradients is None else _backward_of_windows
    pairs, padding = passes(grad, qkv, bias_table, qkv_bias, out, lse, grad_qkv, num_heads, scale, divided)
    grad_table = torch.empty(bias_table.shape, dtype=bias_table.dtype, device=qkv.device)
    launch(
        table_backward_kernel,
        (triton.cdiv(bias_table.shape[0], ENTRIES), num_heads),
        _summed(pairs),
        grad_table,
        num_heads,
        window_size**2 * divided.columns,
        divided.columns,
        WINDOW=window_size,
        ENTRIES=ENTRIES,
        QUERIES=QUERIES,
        num_warps=4,
    )
    grad_bias = torch.zeros(qkv_bias.shape, dtype=qkv_bias.dtype, device=qkv.device)
    if divided.constants["FILL"]:
        _, keys, values = grad_bias.view(3, num_heads, -1).unbind()
        sums = _summed(padding)
        keys.copy_(sums[:, 0])
        values.copy_(sums[:, 1])
    return grad_qkv, grad_table, grad_bias


def _backward_of_windows(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    divided: Layout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills `grad_qkv` for windows of one tile; returns partial sums by program, of pairs and of padding."""
    table, table_strides = _table(bias_table)
    programs = min(max(RESIDENT // num_heads, 1), divided.windows)
    pairs, padding = _partials(qkv, num_heads, divided, programs, programs)
    launch(
        window_backward_kernel,
        (num_heads * programs,),
        grad,
        qkv,
        table,
        qkv_bias,
        lse,
        grad_qkv,
        pairs,
        padding,
        divided.windows,
        programs,
        scale,
        num_heads,
        divided.sizes,
        grad.stride()[:3],
        qkv.stride()[:3],
        table_strides,
        **_options(divided.gradients or divided.keys, divided),
    )
    return pairs, padding


def _backward_in_tiles(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    qkv_bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    divided: Layout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does so for larger windows: one launch for the queries and the pairs, then one for the keys and values."""
    delta = torch.empty_like(lse)
    tiles, key_tiles = divided.tiles(divided.queries), divided.tiles(divided.keys)
    programs = min(max(RESIDENT // (num_heads * tiles), 1), divided.windows)
    key_programs = min(max(PROGRAMS // (num_heads * key_tiles), 1), divided.windows)
    pairs, padding = _partials(qkv, num_heads, divided, programs, key_programs * key_tiles)
    table, table_strides = _table(bias_table)
    common = (num_heads, divided.sizes, grad.stride()[:3], qkv.stride()[:3], table_strides)
    launch(
        query_backward_kernel,
        (num_heads * tiles * programs,),
        grad,
        qkv,
        table,
        qkv_bias,
        out,
        lse,
        grad_qkv,
        delta,
        pairs,
        divided.windows,
        programs,
        scale,
        *common,
        **_options(divided.queries, divided),
    )
    launch(
        key_backward_kernel,
        (num_heads * key_tiles * key_programs,),
        grad,
        qkv,
        table,
        qkv_bias,
        lse,
        delta,
        grad_qkv,
        padding,
        divided.windows,
        key_programs,
        scale,
        *common,
        **_options(divided.keys, divided),
    )
    return pairs, padding


def _options(tile: Tile, divided: Layout) -> dict[str, Any]:
    """Returns a kernel's compile-time arguments and options."""
    constants = {"HELD": tile.held, "STREAMED": tile.streamed, **divided.constants}
    return {**constants, "num_warps": tile.warps, "num_stages": tile.stages}


def _table(bias_table: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Returns a copy of the table in which a head's biases lie side by side, and its strides, for gathers in loops."""
    table = bias_table.t().contiguous()
    return table, (1, bias_table.shape[0])


def _partials(
    qkv: torch.Tensor, num_heads: int, divided: Layout, programs: int, padding_programs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns room for partial sums: [programs, heads, pairs]; [programs, heads, 2, head] where padding has a bias."""
    new = partial(torch.empty, dtype=torch.float32, device=qkv.device)
    pairs = new((programs, num_heads, divided.constants["WINDOW"] ** 2 * divided.columns))
    padded = padding_programs if divided.constants["FILL"] else 0
    return pairs, new((padded, num_heads, 2, divided.constants["HEAD"]))


def _summed(partials: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the first dimension, in a fixed order."""
    out = torch.empty(partials.shape[1:], dtype=torch.float32, device=partials.device)
    sum_partials(partials.flatten(1), out.view(-1))
    return out


def _example(
    batch: int,
    size: int,
    heads: int,
    window: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    shift: int = 0,
    width: int = 32,
    table: torch.dtype = torch.float32,
    device: torch.device | str,
) -> Passes:
    """Returns arguments of each pass for square maps of `size` tokens."""
    channels = heads * width
    qkv = torch.randn(batch, size, size, 3 * channels, dtype=dtype, device=device)
    biases = torch.randn((2 * window - 1) ** 2, heads, dtype=table, device=device)
    call: tuple[Any, ...] = (qkv, biases, torch.randn(3 * channels, dtype=table, device=device))
    sizes: tuple[Any, ...] = (window, shift, heads, width**-0.5)
    grad = torch.randn(batch, size, size, channels, dtype=dtype, device=device)
    with record_launches() if qkv.is_meta else nullcontext():  # where nothing can be launched
        out, lse = forward(*call, *sizes)
    return {"forward": (*call, *sizes), "backward": (grad, *call, out, lse, *sizes)}


def representative_calls() -> dict[str, Callable[..., Passes]]:
    """Returns builders of arguments whose launches cover the compiled variants, for the resource table."""
    swin = partial(_example, 128, 56, 3)
    small = partial(_example, 1024, 24, 3)  # Swin's first stage for crops of 96 pixels, whose windows are padded
    return {
        "bf16 w7 shifted": partial(swin, 7, shift=3),
        "bf16 w7 shifted and padded": partial(small, 7, shift=3),
        "fp16 w7 shifted": partial(swin, 7, torch.float16, shift=3),
        "fp32 w7 shifted": partial(swin, 7, torch.float32, shift=3),
        "bf16 w8 shifted": partial(swin, 8, shift=4),
        "bf16 w7 D64": partial(swin, 7, width=64),
        "bf16 w7 D128": partial(swin, 7, width=128),
        "bf16 w14 shifted": partial(swin, 14, shift=7),
        "bf16 w14 shifted and padded": partial(small, 14, shift=7),
        "fp32 w14 shifted": partial(swin, 14, torch.float32, shift=7),
        "bf16 w16 shifted": partial(swin, 16, shift=8),
    }
