"""Triton kernels of `attention_mass`; notation, tiles and helpers are those of `pruned_attention`."""

import triton
import triton.language as tl

from ..pruned_attention.kernels import (
    LOG2E,
    NO_KEY,
    capped,
    edge_block,
    edge_blocks,
    flat_rows,
    key_blocks,
    key_exists,
    load_keys,
    load_queries,
    segment_of,
    visible,
    whole_block,
    whole_blocks,
)


@triton.jit
def denominator_block(
    pivot, total, q, query_position, k, keep, key, key_position, count, k_stride_n, scale, softcap, window,
    HEAD_DIM: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_EDGE: tl.constexpr, LARGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online sum of exponentials."""
    exists = key_exists(keep, key, count, HAS_KEEP, IS_EDGE, BLOCK_N)
    k_tile = load_keys(k, key, exists, k_stride_n, HEAD_DIM, LARGE, BLOCK_N, BLOCK_D)
    z, _ = capped(tl.dot(q, tl.trans(k_tile), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
    if IS_EDGE or HAS_KEEP:
        see = visible(query_position, key_position, exists, window, HAS_WINDOW, IS_EDGE)
        z = tl.where(see, z, float("-inf"))
    new_pivot = tl.maximum(pivot, tl.max(z, 1))
    return new_pivot, total * tl.exp2(pivot - new_pivot) + tl.sum(tl.exp2(z - new_pivot[:, None]), 1)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "window"])
def denominators(
    q, k, keep, sinks, queries, segment_starts, prefix_starts, prefix_lens, tiles, denominator,
    num_tokens, num_segments,
    q_stride_n, q_stride_h, k_stride_n, k_stride_h,
    scale, softcap, window,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """log2 of the softmax's denominator for the chosen queries, [key head, N * G] in flat rows.

    Rows that are not chosen keep the +inf that they hold, and tiles of such rows end at once.
    """
    tile = tl.program_id(0).to(tl.int64) // KEY_HEADS
    kv_head = (tl.program_id(0) % KEY_HEADS).to(tl.int64)
    segment = tl.load(tiles + 2 * tile)
    if segment < 0:
        return
    first_row = tl.load(tiles + 2 * tile + 1)
    bounds = segment_of(segment, segment_starts, prefix_starts, prefix_lens, num_segments, num_tokens)
    start, own_len, _, prefix_len = bounds
    offset, head, exists = flat_rows(first_row, own_len, GROUP, BLOCK_M)
    chosen = exists & (tl.load(queries + start + offset, mask=exists, other=0) != 0)
    if tl.max(chosen.to(tl.int32), 0) == 0:
        return
    first = first_row // GROUP
    last = (first_row + BLOCK_M - 1) // GROUP
    position = prefix_len + offset
    q += kv_head * GROUP * q_stride_h
    q_tile = load_queries(q, start, first, offset, head, exists, q_stride_n, q_stride_h, HEAD_DIM, LARGE, BLOCK_D)
    k += kv_head * k_stride_h

    pivot = tl.full([BLOCK_M], NO_KEY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    blocks = key_blocks(first, last, bounds, segment < num_segments, window, HAS_WINDOW, BLOCK_N)
    in_prefix, count = whole_blocks(blocks)
    for b in range(0, count):
        key = whole_block(b, in_prefix, blocks, bounds, BLOCK_N)
        pivot, total = denominator_block(
            pivot, total, q_tile, position, k, keep, key, 0, BLOCK_N, k_stride_n, scale, softcap, window,
            HEAD_DIM, HAS_KEEP, HAS_WINDOW, HAS_SOFTCAP, False, LARGE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    in_prefix, count = edge_blocks(blocks)
    for b in range(0, count):
        key, key_position, existing = edge_block(b, in_prefix, blocks, bounds, BLOCK_N)
        pivot, total = denominator_block(
            pivot, total, q_tile, position, k, keep, key, key_position, existing, k_stride_n, scale, softcap, window,
            HEAD_DIM, HAS_KEEP, HAS_WINDOW, HAS_SOFTCAP, True, LARGE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    log_sum = pivot + tl.log2(total)
    if HAS_SINKS:
        sink = tl.load(sinks + kv_head * GROUP + head).to(tl.float32) * LOG2E
        new_pivot = tl.maximum(pivot, sink)
        log_sum = new_pivot + tl.log2(total * tl.exp2(pivot - new_pivot) + tl.exp2(sink - new_pivot))
    flat = (kv_head * num_tokens + start) * GROUP + first_row + tl.arange(0, BLOCK_M)
    tl.store(denominator + flat, tl.where(total == 0, float("inf"), log_sum), mask=chosen)


@triton.jit
def column_sums_block(
    mass, k, q, denominator, start, end, first, base, key_position, limit, q_stride_n, scale, softcap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mass [BLOCK_N] += what BLOCK_M queries of one head and one segment give; no products if none was chosen."""
    offset = first + tl.arange(0, BLOCK_M)
    exists = offset < end
    log_sum = tl.load(denominator + (start + offset).to(tl.int64) * GROUP, mask=exists, other=float("inf"))
    if tl.min(log_sum, 0) < float("inf"):
        q_tile = load_queries(q, start, first, offset, 0 * offset, exists, q_stride_n, 0, HEAD_DIM, LARGE, BLOCK_D)
        z, _ = capped(tl.dot(k, tl.trans(q_tile), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        see = key_position[:, None] <= tl.minimum(base + offset, limit)[None, :]
        if HAS_WINDOW:
            see = see & ((base + offset)[None, :] - key_position[:, None] < window)
        mass += tl.sum(tl.where(see, tl.exp2(z - log_sum[None, :]), 0.0), 1)
    return mass


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "window"])
def column_sums(
    q, k, keep, denominator, chosen, segment_starts, prefix_starts, prefix_lens, tiles, dependants, mass,
    num_tokens, num_segments,
    q_stride_n, q_stride_h, k_stride_n, k_stride_h,
    scale, softcap, window,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mass [Hq, N]: one program per tile of keys and query head; its readers are those of `pruned_attention`'s backward.

    `chosen` [2, S + 1]: first and one past the last pack position of a chosen query, per segment.
    """
    heads: tl.constexpr = KEY_HEADS * GROUP
    tile = tl.program_id(0).to(tl.int64) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    kv_head = head // GROUP
    segment = tl.load(tiles + 5 * tile)
    if segment < 0:
        return
    first_key = tl.load(tiles + 5 * tile + 1)
    begin = tl.load(tiles + 5 * tile + 2)
    reaching = tl.load(tiles + 5 * tile + 4)
    start, own_len, _, _ = segment_of(segment, segment_starts, prefix_starts, prefix_lens, num_segments, num_tokens)
    n = tl.arange(0, BLOCK_N)
    key_position = first_key + n
    exists = key_position < own_len
    key = start + first_key
    kept = exists
    if HAS_KEEP:
        kept = exists & (tl.load(keep + key + n, mask=exists, other=0) != 0)
    k_tile = load_keys(k + kv_head * k_stride_h, key, kept, k_stride_n, HEAD_DIM, LARGE, BLOCK_N, BLOCK_D)
    q += head * q_stride_h
    denominator += kv_head * num_tokens * GROUP + head % GROUP

    total = tl.zeros([BLOCK_N], tl.float32)
    for reader in range(begin - 1, reaching):
        own = reader < begin
        other = tl.where(own, segment, tl.load(dependants + reader, mask=reader >= begin, other=0))
        other_start, other_len, _, other_prefix = segment_of(
            other, segment_starts, prefix_starts, prefix_lens, num_segments, num_tokens
        )
        base = tl.where(own, 0, other_prefix)
        limit = tl.where(own, 2147483647, other_prefix - 1)
        first_chosen = tl.load(chosen + other) - other_start
        end = tl.minimum(
            tl.where(segment < num_segments, other_len, 0), tl.load(chosen + num_segments + 1 + other) - other_start
        )
        if HAS_WINDOW:
            end = tl.minimum(end, first_key + BLOCK_N - 1 + window - base)
        for first in range(tl.maximum(tl.where(own, first_key, 0), first_chosen), end, BLOCK_M):
            total = column_sums_block(
                total, k_tile, q, denominator, other_start, end, first, base, key_position, limit, q_stride_n,
                scale, softcap, window,
                GROUP, HEAD_DIM, HAS_WINDOW, HAS_SOFTCAP, LARGE, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    tl.store(mass + head * num_tokens + key + n, tl.where(kept, total, 0.0), mask=exists)
