"""The gradients of windowed attention in Triton: probabilities are computed again, and nothing is added atomically."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from ..tiles import LOG2E
from .tokens import load_bias, load_head, load_tokens, locate, slope, split_window, store_tokens


@triton.jit
def window_backward_kernel(
    grad,
    qkv,
    table,
    qkv_bias,
    lse,
    grad_qkv,
    pairs,
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
    """Writes one head's gradients of every `programs`-th window, and the sums over these windows.

    All keys of a window are held, and its queries come in one tile or two: more at a time would spill. Matrices of
    pairs have keys in rows and queries in columns, so that only one of the five products needs one transposed.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    PARTS: tl.constexpr = HELD // STREAMED
    head = tl.program_id(0) % heads
    program = tl.program_id(0) // heads
    channels = heads * HEAD
    qkv += head * HEAD
    grad += head * HEAD
    grad_qkv += head * HEAD
    table += head * table_strides[1]
    factor = scale * LOG2E

    asked = tl.arange(0, HELD)
    counted = asked < TOKENS
    key_position = tl.minimum(asked, TOKENS - 1)
    key_slope = slope(key_position, WINDOW)
    sums0 = tl.zeros([HELD, STREAMED], tl.float32)
    sums1 = tl.zeros([HELD, STREAMED], tl.float32)
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
        target = grad_qkv + image * sizes[0] * sizes[1] * 3 * channels
        first = (image * heads + head) * sizes[0] * sizes[1]
        key_offset = key_row * strides[1] + key_column * strides[2]
        key = load_tokens(source + channels, key_offset, there, HEAD, BLOCK_HEAD, UPCAST)
        value = load_tokens(source + 2 * channels, key_offset, there, HEAD, BLOCK_HEAD, UPCAST)
        if FILL:
            key = tl.where(there[:, None], key, pad_key[None, :].to(key.dtype))
            value = tl.where(there[:, None], value, pad_value[None, :].to(value.dtype))
        to_key = tl.zeros([HELD, BLOCK_HEAD], tl.float32)
        to_value = tl.zeros([HELD, BLOCK_HEAD], tl.float32)
        for part in tl.range(0, PARTS, disable_licm=True):
            slot = part * STREAMED + tl.arange(0, STREAMED)
            position = tl.minimum(slot, TOKENS - 1)
            row, column, real, region = locate(position, down, across, sizes, WINDOW, SHIFT, PADDED, INT64)
            real = real & (slot < TOKENS)
            place = row * sizes[1] + column
            query = load_tokens(source, row * strides[1] + column * strides[2], real, HEAD, BLOCK_HEAD, UPCAST)
            offset = row * grad_strides[1] + column * grad_strides[2]
            upstream = load_tokens(grad + image * grad_strides[0], offset, real, HEAD, BLOCK_HEAD, UPCAST)
            # Of what is no query, infinity: its probabilities are zero.
            level = tl.load(lse + first + place, mask=real, other=float("inf")) * LOG2E
            difference = slope(position, WINDOW)[None, :] - key_slope[:, None]
            logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * factor
            logits += load_bias(table, difference, table_strides[0], WINDOW)
            logits = tl.where(key_region[:, None] == region[None, :], logits, float("-inf"))
            weight = tl.exp2(logits - level[None, :])
            to_value = tl.dot(weight.to(query.dtype), upstream, to_value, input_precision=PRECISION)
            change = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
            change = weight * (change - tl.sum(weight * change, 0)[None, :])
            if part == 0:
                sums0 += change
            else:
                sums1 += change
            change = change.to(query.dtype)
            to_key = tl.dot(change, query, to_key, input_precision=PRECISION)
            to_query = tl.dot(tl.trans(change), key, input_precision=PRECISION) * scale
            store_tokens(target, place * 3 * channels, real, to_query, HEAD, BLOCK_HEAD)
        to_key *= scale
        stored = there & counted
        key_offset = (key_row * sizes[1] + key_column) * 3 * channels
        store_tokens(target + channels, key_offset, stored, to_key, HEAD, BLOCK_HEAD)
        store_tokens(target + 2 * channels, key_offset, stored, to_value, HEAD, BLOCK_HEAD)
        if FILL:
            padded = (counted & ~there)[:, None]
            key_sum += tl.sum(tl.where(padded, to_key, 0.0), 0)
            value_sum += tl.sum(tl.where(padded, to_value, 0.0), 0)
    pairs += tl.program_id(0).to(tl.int64) * (TOKENS * HELD)
    part_query = tl.arange(0, STREAMED)[None, :]
    tl.store(pairs + part_query * HELD + asked[:, None], sums0, mask=part_query < TOKENS)
    if PARTS > 1:
        part_query += STREAMED
        tl.store(pairs + part_query * HELD + asked[:, None], sums1, mask=part_query < TOKENS)
    if FILL:
        channel = tl.arange(0, BLOCK_HEAD)
        padding += tl.program_id(0) * (2 * HEAD)
        tl.store(padding + channel, key_sum, mask=channel < HEAD)
        tl.store(padding + HEAD + channel, value_sum, mask=channel < HEAD)


@triton.jit
def table_backward_kernel(
    sums,
    grad_table,
    heads,
    head_stride,
    query_stride,
    WINDOW: tl.constexpr,
    ENTRIES: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Sums the gradients of one head's pairs by their entry of the table, always in the same order."""
    SIDE: tl.constexpr = 2 * WINDOW - 1
    head = tl.program_id(1)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    total = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, WINDOW * WINDOW, QUERIES):
        query = start + tl.arange(0, QUERIES)
        row = (query // WINDOW)[None, :] - (entry // SIDE - (WINDOW - 1))[:, None]
        column = (query % WINDOW)[None, :] - (entry % SIDE - (WINDOW - 1))[:, None]
        inside = (row >= 0) & (row < WINDOW) & (column >= 0) & (column < WINDOW)
        inside = inside & (query < WINDOW * WINDOW)[None, :] & (entry < SIDE * SIDE)[:, None]
        offset = query[None, :] * query_stride + row * WINDOW + column
        total += tl.sum(tl.load(sums + head * head_stride + offset, mask=inside, other=0.0), 1)
    place = grad_table + entry * heads + head
    tl.store(place, total.to(grad_table.dtype.element_ty), mask=entry < SIDE * SIDE)
