"""Triton kernels of `pruned_attention`.

Notation: N tokens, G query heads per key head, D head size. The query rows of one key head are *flat rows*
f = position * G + head of the group, so that a tile of BLOCK_M rows is full for any G. An *offset* counts from the start of
a segment; a *position* counts in the unpacked sequence: an offset in the prefix, or the prefix's length plus an offset.
Logits are in units of log2, z = log2(e) * scale * q·k, so that exp2 needs no factor.

A block of keys is *whole* when every row of the tile sees all of it: no masks. Where that is not so (the diagonal, the end
of a prefix, a window) it is an *edge*. The softmax does not mind the order, so each kernel runs over the whole blocks of
both key ranges, then over the edges.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Pivot of a row that has seen no key: finite, so that no difference of two pivots is NaN.
NO_KEY = tl.constexpr(-1e30)


@triton.jit
def tanh(x):
    """tanh with an absolute error of 2^-23, beneath the rounding of the logits that it caps; saturates without NaN."""
    return 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)


@triton.jit
def capped(dot, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in log2 units from products q·k, and dz/d(log2(e) * scale * q·k).

    `scale` holds log2(e), or with a cap 1/softcap: z = log2(e) * softcap * tanh(scale * q·k), whose derivative is 1 - tanh².
    """
    if HAS_SOFTCAP:
        t = tanh(dot * scale)
        return t * (softcap * LOG2E), 1 - t * t
    else:
        return dot * scale, 1.0


@triton.jit
def segment_of(segment, segment_starts, prefix_starts, prefix_lens, num_segments, num_tokens):
    """(start, length, prefix start, prefix length) of a segment; number S holds the positions that belong to none."""
    real = segment < num_segments
    start = tl.load(segment_starts + segment)
    end = tl.load(segment_starts + segment + 1, mask=real, other=num_tokens)
    prefix_start = tl.load(prefix_starts + segment, mask=real, other=0)
    prefix_len = tl.load(prefix_lens + segment, mask=real, other=0)
    return start, end - start, prefix_start, prefix_len


@triton.jit
def flat_rows(first, length, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """(offset, head of the group, exists) of the flat rows first .. first + BLOCK of a segment."""
    row = tl.arange(0, BLOCK)
    if BLOCK % GROUP != 0:  # otherwise every tile begins with a first head, and nothing here changes from tile to tile
        row += first % GROUP
    offset = first // GROUP + row // GROUP
    return offset, row % GROUP, offset < length


@triton.jit
def load_rows(pointer, rows, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] at element offsets `rows`; 0 where the row does not exist and beyond HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d[None, :] < HEAD_DIM)
    return tl.load(pointer + rows[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_queries(
    x, start, first, offset, head, exists, stride_n, stride_h,
    HEAD_DIM: tl.constexpr, LARGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Flat rows of x [N, Hq, D], the group's first head at `x`: [BLOCK_M, BLOCK_D].

    64 bits for the scalar part of the address; for the rest only where the strides need them, since they cost registers.
    """
    base = x + (start + first).to(tl.int64) * stride_n
    rows = (offset - first) * stride_n + head * stride_h
    if LARGE:
        rows = (offset - first).to(tl.int64) * stride_n + head.to(tl.int64) * stride_h
    return load_rows(base, rows, exists, HEAD_DIM, BLOCK_D)


@triton.jit
def load_keys(
    x, key, exists, stride_n, HEAD_DIM: tl.constexpr, LARGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Consecutive rows of x [N, Hk, D] from `key` on, the head at `x`: [BLOCK_N, BLOCK_D]."""
    n = tl.arange(0, BLOCK_N)
    rows = n * stride_n
    if LARGE:
        rows = n.to(tl.int64) * stride_n
    return load_rows(x + key.to(tl.int64) * stride_n, rows, exists, HEAD_DIM, BLOCK_D)


@triton.jit
def store_rows(pointer, rows, value, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d[None, :] < HEAD_DIM)
    tl.store(pointer + rows[:, None] + d[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def block_range(seen, whole, first_seen, first_whole, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of a key range that a tile runs over: whole ones in [whole_begin, whole_end), edges around them.

    The tile's last query sees keys up to `seen`, its first one up to `whole`; a window lets the first one see keys from
    `first_seen` on, the last one from `first_whole` on. Returns (begin, whole_begin, whole_end, end).
    """
    end = tl.cdiv(seen, BLOCK_N)
    whole_end = whole // BLOCK_N
    begin = 0 * end
    whole_begin = 0 * end
    if HAS_WINDOW:
        begin = tl.minimum(tl.maximum(first_seen, 0) // BLOCK_N, end)
        whole_begin = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(first_whole, 0), BLOCK_N), begin), end)
        whole_end = tl.maximum(whole_begin, whole_end)
    return begin, whole_begin, whole_end, end


@triton.jit
def key_blocks(first, last, segment, real, window, HAS_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(`block_range` of the prefix, that of the segment itself) for the queries at offsets first .. last.

    `segment` is what `segment_of` returns. Positions that belong to no segment (not `real`) see nothing.
    """
    _, own_len, _, prefix_len = segment
    low = first - window + 1  # the first offset that the first query sees, and that which the last one sees
    high = last - window + 1
    seen = tl.where(real, tl.minimum(last + 1, own_len), 0)
    whole = tl.where(real, first + 1, 0)
    prefix = block_range(prefix_len, prefix_len, prefix_len + low, prefix_len + high, HAS_WINDOW, BLOCK_N)
    return prefix, block_range(seen, whole, low, high, HAS_WINDOW, BLOCK_N)


@triton.jit
def whole_blocks(blocks):
    """(number of whole blocks in the prefix, in both ranges)."""
    prefix, own = blocks
    return prefix[2] - prefix[1], prefix[2] - prefix[1] + own[2] - own[1]


@triton.jit
def whole_block(b, count, blocks, segment, BLOCK_N: tl.constexpr):
    """Pack index of the first key of whole block number b, of which the first `count` lie in the prefix."""
    start, _, prefix_start, _ = segment
    prefix, own = blocks
    in_prefix = b < count
    block = tl.where(in_prefix, prefix[1] + b, own[1] + b - count)
    return tl.where(in_prefix, prefix_start, start) + block * BLOCK_N


@triton.jit
def edge_blocks(blocks):
    """(number of edges in the prefix, in both ranges)."""
    prefix, own = blocks
    in_prefix = prefix[1] - prefix[0] + prefix[3] - prefix[2]
    return in_prefix, in_prefix + own[1] - own[0] + own[3] - own[2]


@triton.jit
def edge_block(b, count, blocks, segment, BLOCK_N: tl.constexpr):
    """Edge number b, of which the first `count` lie in the prefix.

    Returns (pack index of its first key, that key's position, number of keys that exist from there on).
    """
    start, own_len, prefix_start, prefix_len = segment
    prefix, own = blocks
    in_prefix = b < count
    i = tl.where(in_prefix, b, b - count)
    begin = tl.where(in_prefix, prefix[0], own[0])
    before = tl.where(in_prefix, prefix[1], own[1]) - begin  # edges before the whole blocks
    after = tl.where(in_prefix, prefix[2], own[2]) - before
    offset = (i + tl.where(i < before, begin, after)) * BLOCK_N
    key = tl.where(in_prefix, prefix_start, start) + offset
    position = tl.where(in_prefix, 0, prefix_len) + offset
    return key, position, tl.where(in_prefix, prefix_len, own_len) - offset


@triton.jit
def key_exists(keep, key, count, HAS_KEEP: tl.constexpr, IS_EDGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N] bool: inside its range, and kept. What is not is loaded as 0, so that no NaN in it is multiplied by 0."""
    n = tl.arange(0, BLOCK_N)
    exists = n < BLOCK_N
    if IS_EDGE:
        exists = n < count
    if HAS_KEEP:
        exists = exists & (tl.load(keep + key + n, mask=exists, other=0) != 0)
    return exists


@triton.jit
def visible(query_position, key_position, exists, window, HAS_WINDOW: tl.constexpr, IS_EDGE: tl.constexpr):
    """[BLOCK_M, BLOCK_N] (or [1, BLOCK_N]) bool: which keys the queries see."""
    see = exists[None, :]
    if IS_EDGE:
        distance = query_position[:, None] - (key_position + tl.arange(0, exists.shape[0]))[None, :]
        see = see & (distance >= 0)
        if HAS_WINDOW:
            see = see & (distance < window)
    return see


@triton.jit
def forward_block(
    acc, pivot, total, q, query_position, k, v, keep, key, key_position, count, k_stride_n, v_stride_n,
    scale, softcap, window,
    HEAD_DIM: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_EDGE: tl.constexpr, LARGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax: acc [BLOCK_M, BLOCK_D], pivot and total [BLOCK_M]."""
    exists = key_exists(keep, key, count, HAS_KEEP, IS_EDGE, BLOCK_N)
    k_tile = load_keys(k, key, exists, k_stride_n, HEAD_DIM, LARGE, BLOCK_N, BLOCK_D)
    z, _ = capped(tl.dot(q, tl.trans(k_tile), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
    if IS_EDGE or HAS_KEEP:  # z [BLOCK_M, BLOCK_N]
        see = visible(query_position, key_position, exists, window, HAS_WINDOW, IS_EDGE)
        z = tl.where(see, z, float("-inf"))
    new_pivot = tl.maximum(pivot, tl.max(z, 1))
    p = tl.exp2(z - new_pivot[:, None])
    shrink = tl.exp2(pivot - new_pivot)
    v_tile = load_keys(v, key, exists, v_stride_n, HEAD_DIM, LARGE, BLOCK_N, BLOCK_D)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, new_pivot, total * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "window"])
def forward(
    q, k, v, keep, sinks, segment_starts, prefix_starts, prefix_lens, tiles, out, lse,
    num_tokens, num_segments,
    q_stride_n, q_stride_h, k_stride_n, k_stride_h, v_stride_n, v_stride_h,
    scale, softcap, window,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [N, Hq, D] (contiguous) and lse [Hq, N] fp32: one program per tile of query rows and key head."""
    tile = tl.program_id(0).to(tl.int64) // KEY_HEADS
    kv_head = (tl.program_id(0) % KEY_HEADS).to(tl.int64)
    segment = tl.load(tiles + 2 * tile)
    if segment < 0:
        return
    first_row = tl.load(tiles + 2 * tile + 1)
    bounds = segment_of(segment, segment_starts, prefix_starts, prefix_lens, num_segments, num_tokens)
    start, own_len, _, prefix_len = bounds
    offset, head, exists = flat_rows(first_row, own_len, GROUP, BLOCK_M)
    first = first_row // GROUP  # offsets of the tile's first and last queries
    last = (first_row + BLOCK_M - 1) // GROUP
    position = prefix_len + offset

    q += kv_head * GROUP * q_stride_h
    q_tile = load_queries(q, start, first, offset, head, exists, q_stride_n, q_stride_h, HEAD_DIM, LARGE, BLOCK_D)
    k += kv_head * k_stride_h
    v += kv_head * v_stride_h

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    pivot = tl.full([BLOCK_M], NO_KEY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    blocks = key_blocks(first, last, bounds, segment < num_segments, window, HAS_WINDOW, BLOCK_N)
    in_prefix, count = whole_blocks(blocks)
    for b in range(0, count):
        key = whole_block(b, in_prefix, blocks, bounds, BLOCK_N)
        acc, pivot, total = forward_block(
            acc, pivot, total, q_tile, position, k, v, keep, key, 0, BLOCK_N, k_stride_n, v_stride_n,
            scale, softcap, window,
            HEAD_DIM, HAS_KEEP, HAS_WINDOW, HAS_SOFTCAP, False, LARGE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    in_prefix, count = edge_blocks(blocks)
    for b in range(0, count):
        key, key_position, existing = edge_block(b, in_prefix, blocks, bounds, BLOCK_N)
        acc, pivot, total = forward_block(
            acc, pivot, total, q_tile, position, k, v, keep, key, key_position, existing, k_stride_n, v_stride_n,
            scale, softcap, window,
            HEAD_DIM, HAS_KEEP, HAS_WINDOW, HAS_SOFTCAP, True, LARGE, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    log_sum = tl.where(total == 0, float("-inf"), pivot + tl.log2(total))  # NaN stays NaN
    if HAS_SINKS:  # in the denominator only
        sink = tl.load(sinks + kv_head * GROUP + head).to(tl.float32) * LOG2E
        new_pivot = tl.maximum(pivot, sink)
        shrink = tl.exp2(pivot - new_pivot)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink - new_pivot)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    query_head = kv_head * GROUP + head
    row = (start + offset).to(tl.int64)
    store_rows(out, (row * KEY_HEADS * GROUP + query_head) * HEAD_DIM, acc, exists, HEAD_DIM, BLOCK_D)
    tl.store(lse + query_head * num_tokens + row, log_sum / LOG2E, mask=exists)


@triton.jit(do_not_specialize=["num_tokens", "dlse_stride_h", "dlse_stride_n"])  # a stride of dlse [Hq, N] is N
def row_terms(
    out, dout, lse, dlse, sinks, denominator, delta, dsink_rows,
    num_tokens, dout_stride_n, dout_stride_h, dlse_stride_h, dlse_stride_n,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HAS_DLSE: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the backward needs of every row: [key head, N * G] fp32 in flat rows. One program per BLOCK_M rows of [N * Hq].

    With L = log(sum exp(z) + exp(sink)), p = exp(z - L) and out = sum p v, the gradient of a logit is
    dz = p * (dout·v - delta) with delta = dout·out - dlse * exp(L - lse), since lse leaves the sink out. The sink's own is
    -exp(sink - L) * dout·out. `denominator` is L in log2 units, +inf for a row without keys, so that its p is 0.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = index // HEADS
    head = index % HEADS
    exists = row < num_tokens
    o_tile = load_rows(out, index * HEAD_DIM, exists, HEAD_DIM, BLOCK_D).to(tl.float32)
    do_tile = load_rows(dout, row * dout_stride_n + head * dout_stride_h, exists, HEAD_DIM, BLOCK_D).to(tl.float32)
    product = tl.sum(o_tile * do_tile, 1)
    log_sum = tl.load(lse + head * num_tokens + row, mask=exists, other=float("-inf")) * LOG2E
    has_key = log_sum != float("-inf")
    total = log_sum
    flat = (head // GROUP * num_tokens + row) * GROUP + head % GROUP
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32) * LOG2E
        pivot = tl.maximum(log_sum, sink)
        total = pivot + tl.log2(tl.exp2(log_sum - pivot) + tl.exp2(sink - pivot))
        tl.store(dsink_rows + flat, tl.where(has_key, -tl.exp2(sink - total) * product, 0.0), mask=exists)
    if HAS_DLSE:
        upstream = tl.load(dlse + head * dlse_stride_h + row * dlse_stride_n, mask=exists & has_key, other=0.0)
        # Beyond 2^100 p is all but 0: a finite factor lets the gradient fade where an infinite one would give 0 * inf.
        product -= upstream * tl.exp2(tl.where(has_key, tl.minimum(total - log_sum, 100.0), 0.0))
    tl.store(delta + flat, tl.where(has_key, product, 0.0), mask=exists)
    tl.store(denominator + flat, tl.where(has_key, total, float("inf")), mask=exists)


@triton.jit
def backward_q_block(
    dq, q, dout, denominator, delta, query_position, k, v, keep, key, key_position, count, k_stride_n, v_stride_n,
    scale, softcap, window,
    HEAD_DIM: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_EDGE: tl.constexpr, LARGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq [BLOCK_M, BLOCK_D] += dz k over one block of keys."""
    exists = key_exists(keep, key, count, HAS_KEEP, IS_EDGE, BLOCK_N)
    k_tile = load_keys(k, key, exists, k_stride_n, HEAD_DIM, LARGE, BLOCK_N, BLOCK_D)
    v_tile = load_keys(v, key, exists, v_stride_n, HEAD_DIM, LARGE, BLOCK_N, BLOCK_D)
    z, slope = capped(tl.dot(q, tl.trans(k_tile), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
    p = tl.exp2(z - denominator[:, None])  # [BLOCK_M, BLOCK_N]
    if IS_EDGE or HAS_KEEP:
        see = visible(query_position, key_position, exists, window, HAS_WINDOW, IS_EDGE)
        p = tl.where(see, p, 0.0)
    dp = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
    dz = p * (dp - delta[:, None]) * slope
    return tl.dot(dz.to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "window"])
def backward_q(
    q, k, v, keep, dout, denominator, delta, segment_starts, prefix_starts, prefix_lens, tiles, dq,
    num_tokens, num_segments,
    q_stride_n, q_stride_h, k_stride_n, k_stride_h, v_stride_n, v_stride_h, dout_stride_n, dout_stride_h,
    scale, softcap, window, factor,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq [N, Hq, D] (contiguous): one program per tile of query rows and key head. `factor` is the plain scale."""
    tile = tl.program_id(0).to(tl.int64) // KEY_HEADS
    kv_head = (tl.program_id(0) % KEY_HEADS).to(tl.int64)
    segment = tl.load(tiles + 2 * tile)
    if segment < 0:
        return
    first_row = tl.load(tiles + 2 * tile + 1)
    bounds = segment_of(segment, segment_starts, prefix_starts, prefix_lens, num_segments, num_tokens)
    start, own_len, _, prefix_len = bounds
    offset, head, exists = flat_rows(first_row, own_len, GROUP, BLOCK_M)
    first = first_row // GROUP  # offsets of the tile's first and last queries
    last = (first_row + BLOCK_M - 1) // GROUP
    position = prefix_len + offset

    q += kv_head * GROUP * q_stride_h
    q_tile = load_queries(q, start, first, offset, head, exists, q_stride_n, q_stride_h, HEAD_DIM, LARGE, BLOCK_D)
    dout += kv_head * GROUP * dout_stride_h
    do_tile = load_queries(
        dout, start, first, offset, head, exists, dout_stride_n, dout_stride_h, HEAD_DIM, LARGE, BLOCK_D
    )
    flat = (kv_head * num_tokens + start) * GROUP + first_row + tl.arange(0, BLOCK_M)
    denominator_row = tl.load(denominator + flat, mask=exists, other=float("inf"))
    delta_row = tl.load(delta + flat, mask=exists, other=0.0)
    k += kv_head * k_stride_h
    v += kv_head * v_stride_h

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    blocks = key_blocks(first, last, bounds, segment < num_segments, window, HAS_WINDOW, BLOCK_N)
    in_prefix, count = whole_blocks(blocks)
    for b in range(0, count):
        key = whole_block(b, in_prefix, blocks, bounds, BLOCK_N)
        acc = backward_q_block(
            acc, q_tile, do_tile, denominator_row, delta_row, position, k, v, keep, key, 0, BLOCK_N,
            k_stride_n, v_stride_n, scale, softcap, window,
            HEAD_DIM, HAS_KEEP, HAS_WINDOW, HAS_SOFTCAP, False, LARGE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    in_prefix, count = edge_blocks(blocks)
    for b in range(0, count):
        key, key_position, existing = edge_block(b, in_prefix, blocks, bounds, BLOCK_N)
        acc = backward_q_block(
            acc, q_tile, do_tile, denominator_row, delta_row, position, k, v, keep, key, key_position, existing,
            k_stride_n, v_stride_n, scale, softcap, window,
            HEAD_DIM, HAS_KEEP, HAS_WINDOW, HAS_SOFTCAP, True, LARGE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    row = (start + offset).to(tl.int64)
    target = (row * KEY_HEADS * GROUP + kv_head * GROUP + head) * HEAD_DIM
    store_rows(dq, target, acc * factor, exists, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_kv_block(
    dk, dv, k, v, kept, q, dout, denominator, delta, dq, flat_start, start, end, first_row, base, key_position, limit,
    q_stride_n, q_stride_h, dout_stride_n, dout_stride_h, scale, softcap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_EDGE: tl.constexpr, LARGE: tl.constexpr, DQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk, dv [BLOCK_N, BLOCK_D] += the part of BLOCK_M query rows of the segment at `start`, up to offset `end`.

    Everything is transposed, [BLOCK_N, BLOCK_M], so that the probabilities are left operands. The segment's own tokens begin
    at position `base`; its queries see keys up to position `limit`, causality aside.
    """
    offset, head, exists = flat_rows(first_row, end, GROUP, BLOCK_M)
    first = first_row // GROUP
    flat = flat_start + first_row + tl.arange(0, BLOCK_M)
    q_tile = load_queries(q, start, first, offset, head, exists, q_stride_n, q_stride_h, HEAD_DIM, LARGE, BLOCK_D)
    denominator_row = tl.load(denominator + flat, mask=exists, other=float("inf"))
    z, slope = capped(tl.dot(k, tl.trans(q_tile), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
    p = tl.exp2(z - denominator_row[None, :])
    if IS_EDGE:
        query_position = base + offset
        see = key_position[:, None] <= tl.minimum(query_position, limit)[None, :]
        if HAS_WINDOW:
            see = see & (query_position[None, :] - key_position[:, None] < window)
        p = tl.where(see, p, 0.0)
    if DQ != "none":  # a key that is not there has k = 0 and p of any size: that 0 must not meet an infinite dz
        p = tl.where(kept[:, None], p, 0.0)
    do_tile = load_queries(
        dout, start, first, offset, head, exists, dout_stride_n, dout_stride_h, HEAD_DIM, LARGE, BLOCK_D
    )
    dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do_tile), input_precision="ieee")
    delta_row = tl.load(delta + flat, mask=exists, other=0.0)
    dz = (p * (dp - delta_row[None, :]) * slope).to(q_tile.dtype)
    dk = tl.dot(dz, q_tile, dk, input_precision="ieee")
    if DQ != "none":
        if IS_EDGE:  # nor may a NaN in a key behind the reader's prefix, or in its value
            k = tl.where((key_position <= limit)[:, None], k, 0.0)
            dz = tl.where(see, dz, 0.0)
        part = tl.dot(tl.trans(dz), k, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
        part = tl.where(exists[:, None], part, 0.0)  # rows of the next segment get an exact 0
        if DQ == "tma":
            dq.atomic_add([(flat_start + first_row).to(tl.int32), 0], part)
        else:
            d = tl.arange(0, BLOCK_D)
            tl.atomic_add(dq + flat[:, None] * BLOCK_D + d[None, :], part, mask=exists[:, None], sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "window"])
def backward_kv(
    q, k, v, keep, dout, denominator, delta, segment_starts, prefix_starts, prefix_lens, tiles, dependants, dk, dv, dq,
    num_tokens, num_segments,
    q_stride_n, q_stride_h, k_stride_n, k_stride_h, v_stride_n, v_stride_h, dout_stride_n, dout_stride_h,
    scale, softcap, window, factor,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LARGE: tl.constexpr, DQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk, dv [N, Hk, D] (contiguous): one program per tile of keys and key head.

    The readers of a key are the later queries of its own segment and all queries of the segments whose prefix holds it.
    With DQ "tma" or "atomic" each tile's part of dq is also added to fp32 [key head, N * G, BLOCK_D] in flat rows, without
    `factor` and in no fixed order.
    """
    tile = tl.program_id(0).to(tl.int64) // KEY_HEADS
    kv_head = (tl.program_id(0) % KEY_HEADS).to(tl.int64)
    segment = tl.load(tiles + 5 * tile)
    if segment < 0:
        return
    first_key = tl.load(tiles + 5 * tile + 1)
    begin = tl.load(tiles + 5 * tile + 2)
    covering = tl.load(tiles + 5 * tile + 3)
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
    v_tile = load_keys(v + kv_head * v_stride_h, key, kept, v_stride_n, HEAD_DIM, LARGE, BLOCK_N, BLOCK_D)
    q += kv_head * GROUP * q_stride_h
    dout += kv_head * GROUP * dout_stride_h
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # A query at position x sees the whole tile if x >= first_key + BLOCK_N - 1 and, with a window, x < first_key + window;
    # it sees nothing of it from first_key + BLOCK_N - 1 + window on. Reader number begin - 1 is the segment itself.
    real = segment < num_segments
    for reader in range(begin - 1, covering):
        own = reader < begin
        other = tl.where(own, segment, tl.load(dependants + reader, mask=reader >= begin, other=0))
        other_start, other_len, _, base = segment_of(
            other, segment_starts, prefix_starts, prefix_lens, num_segments, num_tokens
        )
        end = tl.where(real, other_len, 0)
        if HAS_WINDOW:
            end = tl.minimum(end, first_key + window - tl.where(own, 0, base))
        flat_start = (kv_head * num_tokens + other_start) * GROUP
        for row in range(tl.where(own, first_key + BLOCK_N, 0) * GROUP, end * GROUP, BLOCK_M):
            dk_acc, dv_acc = backward_kv_block(
                dk_acc, dv_acc, k_tile, v_tile, kept, q, dout, denominator, delta, dq,
                flat_start, other_start, end, row, 0, key_position, 0,
                q_stride_n, q_stride_h, dout_stride_n, dout_stride_h, scale, softcap, window,
                GROUP, HEAD_DIM, HAS_WINDOW, HAS_SOFTCAP, False, LARGE, DQ, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    # Edges. The readers before the dependants are again the segment itself: first what lies at the end of its window, then
    # the diagonal. Dependants whose prefix ends in the tile are all edge; with a window the others have one at its end.
    edge_begin = begin if HAS_WINDOW else covering
    diagonal = edge_begin - 1
    for reader in range(diagonal - 1 if HAS_WINDOW else diagonal, reaching):
        own = reader < edge_begin
        other = tl.where(own, segment, tl.load(dependants + reader, mask=reader >= edge_begin, other=0))
        other_start, other_len, _, other_prefix = segment_of(
            other, segment_starts, prefix_starts, prefix_lens, num_segments, num_tokens
        )
        base = tl.where(own, 0, other_prefix)
        limit = tl.where(own, 2147483647, other_prefix - 1)
        first = tl.where(own, first_key, 0)
        end = tl.where(real, other_len, 0)
        if HAS_WINDOW:
            after_whole = tl.maximum(first_key + window - base, tl.where(own, first_key + BLOCK_N, 0))
            first = tl.where((reader < covering) & (reader != diagonal), after_whole, first)
            end = tl.minimum(end, first_key + BLOCK_N - 1 + window - base)
        end = tl.where(reader == diagonal, tl.minimum(end, first_key + BLOCK_N), end)
        flat_start = (kv_head * num_tokens + other_start) * GROUP
        for row in range(first * GROUP, end * GROUP, BLOCK_M):
            dk_acc, dv_acc = backward_kv_block(
                dk_acc, dv_acc, k_tile, v_tile, kept, q, dout, denominator, delta, dq,
                flat_start, other_start, end, row, base, key_position, limit,
                q_stride_n, q_stride_h, dout_stride_n, dout_stride_h, scale, softcap, window,
                GROUP, HEAD_DIM, HAS_WINDOW, HAS_SOFTCAP, True, LARGE, DQ, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if HAS_KEEP:  # exactly 0 for removed keys, whatever flowed through the zeros in their place
        dk_acc = tl.where(kept[:, None], dk_acc, 0.0)
        dv_acc = tl.where(kept[:, None], dv_acc, 0.0)
    target = ((key + n).to(tl.int64) * KEY_HEADS + kv_head) * HEAD_DIM
    store_rows(dk, target, dk_acc * factor, exists, HEAD_DIM, BLOCK_D)
    store_rows(dv, target, dv_acc, exists, HEAD_DIM, BLOCK_D)
