"""The gradients of large windows in Triton, in two passes over tiles: of queries and biases, of keys and values."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from ..tiles import LOG2E
from .tokens import load_bias, load_head, load_tokens, locate, slope, split_window, store_tokens


@triton.jit
def query_backward_kernel(
    grad,
    qkv,
    table,
    qkv_bias,
    out,
    lse,
    grad_qkv,
    delta,
    pairs,
    windows,
    programs,
    scale,
    heads,
    sizes,
    grad_strides,
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
    """Writes one head's gradient of BLOCK queries of every `programs`-th window, and that of their pairs' biases.

    The gradients of the biases stay in registers, for each of up to 16 tiles of keys in a variable of its own.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (TOKENS + HELD - 1) // HELD
    PARTS: tl.constexpr = (TOKENS + STREAMED - 1) // STREAMED
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % TILES
    program = tl.program_id(0) // (heads * TILES)
    channels = heads * HEAD
    qkv += head * HEAD
    table += head * table_strides[1]
    factor = scale * LOG2E

    asked = tile * HELD + tl.arange(0, HELD)
    counted = asked < TOKENS
    position = tl.minimum(asked, TOKENS - 1)
    query_slope = slope(position, WINDOW)
    if FILL:
        pad_key = load_head(qkv_bias + channels + head * HEAD, HEAD, BLOCK_HEAD).to(qkv.dtype.element_ty)
        pad_value = load_head(qkv_bias + 2 * channels + head * HEAD, HEAD, BLOCK_HEAD).to(qkv.dtype.element_ty)
    sums0 = tl.zeros([HELD, STREAMED], tl.float32)
    sums1 = tl.zeros([HELD, STREAMED], tl.float32)
    sums2 = tl.zeros([HELD, STREAMED], tl.float32)
    sums3 = tl.zeros([HELD, STREAMED], tl.float32)
    sums4 = tl.zeros([HELD, STREAMED], tl.float32)
    sums5 = tl.zeros([HELD, STREAMED], tl.float32)
    sums6 = tl.zeros([HELD, STREAMED], tl.float32)
    sums7 = tl.zeros([HELD, STREAMED], tl.float32)
    sums8 = tl.zeros([HELD, STREAMED], tl.float32)
    sums9 = tl.zeros([HELD, STREAMED], tl.float32)
    sums10 = tl.zeros([HELD, STREAMED], tl.float32)
    sums11 = tl.zeros([HELD, STREAMED], tl.float32)
    sums12 = tl.zeros([HELD, STREAMED], tl.float32)
    sums13 = tl.zeros([HELD, STREAMED], tl.float32)
    sums14 = tl.zeros([HELD, STREAMED], tl.float32)
    sums15 = tl.zeros([HELD, STREAMED], tl.float32)
    for window in tl.range(program, windows, programs, disable_licm=True):
        image, down, across = split_window(window, sizes)
        row, column, real, region = locate(position, down, across, sizes, WINDOW, SHIFT, PADDED, INT64)
        real = real & counted
        source = qkv + image * strides[0]
        query = load_tokens(source, row * strides[1] + column * strides[2], real, HEAD, BLOCK_HEAD, UPCAST)
        upstream = load_tokens(
            grad + image * grad_strides[0] + head * HEAD,
            row * grad_strides[1] + column * grad_strides[2],
            real,
            HEAD,
            BLOCK_HEAD,
            UPCAST,
        )
        place = row * sizes[1] + column
        first = image * sizes[0] * sizes[1] * channels + head * HEAD
        result = load_tokens(out + first, place * channels, real, HEAD, BLOCK_HEAD, UPCAST)
        mean = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
        first = (image * heads + head) * sizes[0] * sizes[1]
        tl.store(delta + first + place, mean, mask=real)
        level = tl.load(lse + first + place, mask=real, other=float("inf")) * LOG2E
        to_query = tl.zeros([HELD, BLOCK_HEAD], tl.float32)
        for part in tl.range(0, PARTS, disable_licm=True):
            slot = part * STREAMED + tl.arange(0, STREAMED)
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
            difference = query_slope[:, None] - slope(key_position, WINDOW)[None, :]
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor
            logits += load_bias(table, difference, table_strides[0], WINDOW)
            logits = tl.where(region[:, None] == key_region[None, :], logits, float("-inf"))
            change = tl.dot(upstream, tl.trans(value), input_precision=PRECISION) - mean[:, None]
            change *= tl.exp2(logits - level[:, None])
            if part == 0:
                sums0 += change
            elif part == 1:
                sums1 += change
            elif part == 2:
                sums2 += change
            elif part == 3:
                sums3 += change
            elif part == 4:
                sums4 += change
            elif part == 5:
                sums5 += change
            elif part == 6:
                sums6 += change
            elif part == 7:
                sums7 += change
            elif part == 8:
                sums8 += change
            elif part == 9:
                sums9 += change
            elif part == 10:
                sums10 += change
            elif part == 11:
                sums11 += change
            elif part == 12:
                sums12 += change
            elif part == 13:
                sums13 += change
            elif part == 14:
                sums14 += change
            else:
                sums15 += change
            to_query = tl.dot(change.to(key.dtype), key, to_query, input_precision=PRECISION)
        target = grad_qkv + image * sizes[0] * sizes[1] * 3 * channels + head * HEAD
        store_tokens(target, place * 3 * channels, real, to_query * scale, HEAD, BLOCK_HEAD)
    pairs += (program * heads + head).to(tl.int64) * (TOKENS * PARTS * STREAMED)
    pairs += (tile * HELD + tl.arange(0, HELD))[:, None] * (PARTS * STREAMED) + tl.arange(0, STREAMED)[None, :]
    inside = counted[:, None]
    tl.store(pairs, sums0, mask=inside)
    if PARTS > 1:
        tl.store(pairs + 1 * STREAMED, sums1, mask=inside)
    if PARTS > 2:
        tl.store(pairs + 2 * STREAMED, sums2, mask=inside)
    if PARTS > 3:
        tl.store(pairs + 3 * STREAMED, sums3, mask=inside)
    if PARTS > 4:
        tl.store(pairs + 4 * STREAMED, sums4, mask=inside)
    if PARTS > 5:
        tl.store(pairs + 5 * STREAMED, sums5, mask=inside)
    if PARTS > 6:
        tl.store(pairs + 6 * STREAMED, sums6, mask=inside)
    if PARTS > 7:
        tl.store(pairs + 7 * STREAMED, sums7, mask=inside)
    if PARTS > 8:
        tl.store(pairs + 8 * STREAMED, sums8, mask=inside)
    if PARTS > 9:
        tl.store(pairs + 9 * STREAMED, sums9, mask=inside)
    if PARTS > 10:
        tl.store(pairs + 10 * STREAMED, sums10, mask=inside)
    if PARTS > 11:
        tl.store(pairs + 11 * STREAMED, sums11, mask=inside)
    if PARTS > 12:
        tl.store(pairs + 12 * STREAMED, sums12, mask=inside)
    if PARTS > 13:
        tl.store(pairs + 13 * STREAMED, sums13, mask=inside)
    if PARTS > 14:
        tl.store(pairs + 14 * STREAMED, sums14, mask=inside)
    if PARTS > 15:
        tl.store(pairs + 15 * STREAMED, sums15, mask=inside)


@triton.jit
def key_backward_kernel(
    grad,
    qkv,
    table,
    qkv_bias,
    lse,
    delta,
    grad_qkv,
    padding,
    windows,
    programs,
    scale,
    heads,
    sizes,
    grad_strides,
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
    """Writes one head's gradients of BLOCK keys and values of every `programs`-th window, and the padding's share."""
    TOKENS: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (TOKENS + HELD - 1) // HELD
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % TILES
    program = tl.program_id(0) // (heads * TILES)
    channels = heads * HEAD
    qkv += head * HEAD
    grad += head * HEAD
    grad_qkv += head * HEAD
    table += head * table_strides[1]
    factor = scale * LOG2E

    asked = tile * HELD + tl.arange(0, HELD)
    counted = asked < TOKENS
    key_position = tl.minimum(asked, TOKENS - 1)
    key_slope = slope(key_position, WINDOW)
    if FILL:
        pad_key = load_head(qkv_bias + channels + head * HEAD, HEAD, BLOCK_HEAD).to(qkv.dtype.element_ty)
        pad_value = load_head(qkv_bias + 2 * channels + head * HEAD, HEAD, BLOCK_HEAD).to(qkv.dtype.element_ty)
        key_sum = tl.zeros([BLOCK_HEAD], tl.float32)
        value_sum = tl.zeros([BLOCK_HEAD], tl.float32)
    for window in tl.range(program, windows, programs, disable_licm=True):
        image, down, across = split_window(window, sizes)
        key_row, key_column, there, key_region = locate(key_position, down, across, sizes, WINDOW, SHIFT, PADDED, INT64)
        key_region = tl.where(counted, key_region, -1)
        source = qkv + image * strides[0]
        key_offset = key_row * strides[1] + key_column * strides[2]
        key = load_tokens(source + channels, key_offset, there, HEAD, BLOCK_HEAD, UPCAST)
        value = load_tokens(source + 2 * channels, key_offset, there, HEAD, BLOCK_HEAD, UPCAST)
        if FILL:
            key = tl.where(there[:, None], key, pad_key[None, :].to(key.dtype))
            value = tl.where(there[:, None], value, pad_value[None, :].to(value.dtype))
        to_key = tl.zeros([HELD, BLOCK_HEAD], tl.float32)
        to_value = tl.zeros([HELD, BLOCK_HEAD], tl.float32)
        first = (image * heads + head) * sizes[0] * sizes[1]
        for start in range(0, TOKENS, STREAMED):
            slot = start + tl.arange(0, STREAMED)
            position = tl.minimum(slot, TOKENS - 1)
            row, column, real, region = locate(position, down, across, sizes, WINDOW, SHIFT, PADDED, INT64)
            real = real & (slot < TOKENS)
            place = row * sizes[1] + column
            query = load_tokens(source, row * strides[1] + column * strides[2], real, HEAD, BLOCK_HEAD, UPCAST)
            offset = row * grad_strides[1] + column * grad_strides[2]
            upstream = load_tokens(grad + image * grad_strides[0], offset, real, HEAD, BLOCK_HEAD, UPCAST)
            level = tl.load(lse + first + place, mask=real, other=float("inf")) * LOG2E
            mean = tl.load(delta + first + place, mask=real, other=0.0)
            difference = slope(position, WINDOW)[None, :] - key_slope[:, None]
            logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * factor
            logits += load_bias(table, difference, table_strides[0], WINDOW)
            logits = tl.where(key_region[:, None] == region[None, :], logits, float("-inf"))
            weight = tl.exp2(logits - level[None, :])
            to_value = tl.dot(weight.to(query.dtype), upstream, to_value, input_precision=PRECISION)
            change = tl.dot(value, tl.trans(upstream), input_precision=PRECISION) - mean[None, :]
            to_key = tl.dot((weight * change).to(query.dtype), query, to_key, input_precision=PRECISION)
        target = grad_qkv + image * sizes[0] * sizes[1] * 3 * channels
        key_offset = (key_row * sizes[1] + key_column) * 3 * channels
        to_key *= scale
        stored = there & counted
        store_tokens(target + channels, key_offset, stored, to_key, HEAD, BLOCK_HEAD)
        store_tokens(target + 2 * channels, key_offset, stored, to_value, HEAD, BLOCK_HEAD)
        if FILL:
            padded = (counted & ~there)[:, None]
            key_sum += tl.sum(tl.where(padded, to_key, 0.0), 0)
            value_sum += tl.sum(tl.where(padded, to_value, 0.0), 0)
    if FILL:
        channel = tl.arange(0, BLOCK_HEAD)
        padding += ((program * TILES + tile) * heads + head) * (2 * HEAD)
        tl.store(padding + channel, key_sum, mask=channel < HEAD)
        tl.store(padding + HEAD + channel, value_sum, mask=channel < HEAD)
