"""Triton kernels of the scores, flags and spans.

token_scores: norms of both models, one program per row; then E2 and E3, one program per segment.
flag_tokens: one program per segment. flagged_spans: a count and a scan, one program per block of positions.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))


@triton.jit
def norm(gradient, row, row_stride, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """‖gradient[row, :width]‖₂, accumulated in WIDE."""
    gradient += row * row_stride
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], WIDE)
    for start in range(0, width, BLOCK):
        x = tl.load(gradient + start + lane, mask=start + lane < width, other=0.0).to(WIDE)
        squares += x * x
    return tl.sqrt(tl.sum(squares, 0))


@triton.jit(do_not_specialize=["num_segments"])
def row_norms(
    teacher, student, scored, segment_starts, teacher_norm, student_norm, score,
    num_segments, teacher_stride, student_stride, teacher_width, student_width,
    HAS_SCORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """E1. Rows that are not scored are not read: norm 0, score +inf."""
    row = tl.program_id(0).to(tl.int64)
    wanted = (row >= tl.load(segment_starts)) & (row < tl.load(segment_starts + num_segments))
    if HAS_SCORED:
        wanted = wanted & (tl.load(scored + row) != 0)
    teacher_width = tl.where(wanted, teacher_width, 0)
    student_width = tl.where(wanted, student_width, 0)
    t = norm(teacher, row, teacher_stride, teacher_width, teacher_norm.dtype.element_ty, BLOCK)
    s = norm(student, row, student_stride, student_width, student_norm.dtype.element_ty, BLOCK)
    tl.store(teacher_norm + row, t)
    tl.store(student_norm + row, s)
    tl.store(score + row, INF, mask=wanted == 0)


@triton.jit
def load_norms(teacher_norm, student_norm, scored, position, end, HAS_SCORED: tl.constexpr):
    """(norms of both models in fp64, whether they are scored) at the positions before `end`."""
    wanted = position < end
    if HAS_SCORED:
        wanted = wanted & (tl.load(scored + position, mask=wanted, other=0) != 0)
    t = tl.load(teacher_norm + position, mask=wanted, other=0.0).to(tl.float64)
    s = tl.load(student_norm + position, mask=wanted, other=0.0).to(tl.float64)
    return t, s, wanted


@triton.jit
def extent(low, high):
    """high − low, +inf where they are equal: a range without an extent maps to 0."""
    return tl.where(high > low, high - low, INF)


@triton.jit
def difference(t, s, teacher_low, teacher_extent, student_low, student_extent):
    """ĝ_teacher − ĝ_student. Divided, not multiplied by an inverse: equal tokens must differ by exactly 0."""
    return (t - teacher_low) / teacher_extent - (s - student_low) / student_extent


@triton.jit
def segment_scores(
    teacher_norm, student_norm, scored, segment_starts, score, HAS_SCORED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """E2 and E3 in fp64, rounded once. Every lane keeps the extremes of what it sees.

    What is not scored reads 0, which no norm is below: it can only be taken for the lowest.
    """
    segment = tl.program_id(0)
    start = tl.load(segment_starts + segment)
    end = tl.load(segment_starts + segment + 1)
    lane = tl.arange(0, BLOCK)

    t_low = tl.full([BLOCK], INF, tl.float64)
    t_high = tl.full([BLOCK], -INF, tl.float64)
    s_low = t_low
    s_high = t_high
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        t, s, wanted = load_norms(teacher_norm, student_norm, scored, first + lane, end, HAS_SCORED)
        bad |= (wanted & ~((t < INF) & (s < INF))).to(tl.int32)  # inf or NaN
        t_low = tl.minimum(t_low, tl.where(wanted, t, INF))
        t_high = tl.maximum(t_high, t)
        s_low = tl.minimum(s_low, tl.where(wanted, s, INF))
        s_high = tl.maximum(s_high, s)
    any_bad = tl.max(bad, 0)
    teacher_low = tl.min(t_low, 0)
    student_low = tl.min(s_low, 0)
    teacher_extent = extent(teacher_low, tl.max(t_high, 0))
    student_extent = extent(student_low, tl.max(s_high, 0))

    d_low = tl.full([BLOCK], INF, tl.float64)
    d_high = tl.full([BLOCK], -INF, tl.float64)
    for first in range(start, end, BLOCK):
        t, s, wanted = load_norms(teacher_norm, student_norm, scored, first + lane, end, HAS_SCORED)
        d = difference(t, s, teacher_low, teacher_extent, student_low, student_extent)
        d_low = tl.minimum(d_low, tl.where(wanted, d, INF))
        d_high = tl.maximum(d_high, tl.where(wanted, d, -INF))
    low = tl.min(d_low, 0)
    high = tl.max(d_high, 0)

    for first in range(start, end, BLOCK):
        t, s, wanted = load_norms(teacher_norm, student_norm, scored, first + lane, end, HAS_SCORED)
        d = difference(t, s, teacher_low, teacher_extent, student_low, student_extent)
        value = tl.where(high > low, (d - low) / extent(low, high), 1.0)  # no difference, nothing to flag
        value = tl.where(any_bad != 0, float("nan"), value)
        tl.store(score + first + lane, value.to(score.dtype.element_ty), mask=wanted)


@triton.jit
def double(bits):
    """The fp64 number of these bits, which came as an integer: Triton takes a Python float in fp32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def load_scores(score, position, end):
    """(scores in fp32 or fp64, whether they are scored: finite) at the positions before `end`."""
    WIDE: tl.constexpr = tl.float64 if score.dtype.element_ty == tl.float64 else tl.float32
    x = tl.load(score + position, mask=position < end, other=INF).to(WIDE)
    return x, tl.abs(x) < INF


@triton.jit
def order(x, scored):
    """Integers that compare as the scores do, 0.0 like -0.0; the largest one where not scored."""
    x = tl.where(x == 0, 0.0, x)
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        last = 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.int32, bitcast=True)
        last = 0x7FFFFFFF
    return tl.where(scored, tl.where(bits < 0, bits ^ last, bits), last)


@triton.jit
def order_statistic(score, start, end, rank, BLOCK: tl.constexpr):
    """`order` of the score that has `rank` others before it: the largest integer with at most `rank` of them below it.

    Found two bits at a time, from the top. Counts do not depend on how equal scores are sorted, nor on who adds first.
    """
    lane = tl.arange(0, BLOCK)
    if score.dtype.element_ty == tl.float64:
        found = tl.full([], -0x8000000000000000, tl.int64)
        step = tl.full([], 0x4000000000000000, tl.int64)
    else:
        found = tl.full([], -0x80000000, tl.int32)
        step = tl.full([], 0x40000000, tl.int32)
    while step > 0:
        one = found + step
        two = one + step
        three = two + step
        below_one = tl.zeros([BLOCK], tl.int32)
        below_two = tl.zeros([BLOCK], tl.int32)
        below_three = tl.zeros([BLOCK], tl.int32)
        for first in range(start, end, BLOCK):
            x, scored = load_scores(score, first + lane, end)
            key = order(x, scored)
            below_one += (key < one).to(tl.int32)
            below_two += (key < two).to(tl.int32)
            below_three += (key < three).to(tl.int32)
        found = tl.where(tl.sum(below_one, 0) <= rank, one, found)
        found = tl.where(tl.sum(below_two, 0) <= rank, two, found)
        found = tl.where(tl.sum(below_three, 0) <= rank, three, found)
        step = step >> 2
    return found


@triton.jit(do_not_specialize=["q", "limit"])
def flag_segments(
    score, flaggable, segment_starts, flags, q, limit,
    QUANTILE: tl.constexpr, HAS_FLAGGABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """E4: scores up to `limit` and, with QUANTILE, up to the q-quantile. q and limit are the bits of fp64 numbers."""
    segment = tl.program_id(0)
    start = tl.load(segment_starts + segment)
    end = tl.load(segment_starts + segment + 1)
    lane = tl.arange(0, BLOCK)

    count = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        x, scored = load_scores(score, first + lane, end)
        count += scored.to(tl.int32)
        bad |= (x != x).to(tl.int32)
    n = tl.sum(count, 0)
    any_bad = tl.max(bad, 0)
    if QUANTILE:
        rank = (double(q) * n.to(tl.float64)).to(tl.int32)  # n at q = 1: above all scores, which is as good as n − 1
        threshold = order_statistic(score, start, end, rank, BLOCK)

    for first in range(start, end, BLOCK):
        position = first + lane
        x, scored = load_scores(score, position, end)
        # In the precision of the scores, as torch compares a tensor with a number
        rounded = double(limit).to(x.dtype).to(score.dtype.element_ty).to(x.dtype)
        flagged = scored & (x <= rounded) & (any_bad == 0)
        if QUANTILE:
            flagged = flagged & (order(x, scored) <= threshold)
        if HAS_FLAGGABLE:
            flagged = flagged & (tl.load(flaggable + position, mask=position < end, other=0) != 0)
        tl.store(flags + position, flagged.to(flags.dtype.element_ty), mask=position < end)


@triton.jit
def segment_of(segment_starts, num_segments, position):
    """How many segments end at or before the position: the one that it is in, `num_segments` beyond the last."""
    segment = tl.zeros_like(position)
    size = num_segments
    while size > 0:  # the answer is in segment … segment + size
        half = (size + 1) // 2
        end = tl.load(segment_starts + segment + half)
        segment += tl.where(end <= position, half, 0)
        size = size // 2
    return segment


@triton.jit
def runs(flags, segment_starts, num_segments, position):
    """(segment, whether a run starts here, whether one ends here). A neighbour in another segment is not looked at."""
    segment = segment_of(segment_starts, num_segments, position)
    start = tl.load(segment_starts + segment)
    inside = (segment < num_segments) & (position >= start)
    end = tl.load(segment_starts + segment + 1, mask=inside, other=0)
    flagged = tl.load(flags + position, mask=inside, other=0) != 0
    before = tl.load(flags + position - 1, mask=inside & (position > start), other=0) != 0
    after = tl.load(flags + position + 1, mask=inside & (position + 1 < end), other=0) != 0
    return segment, flagged & (before == 0), flagged & (after == 0)


@triton.jit(do_not_specialize=["num_segments"])
def count_runs(flags, segment_starts, counts, num_segments, BLOCK: tl.constexpr):
    """How many runs start in each block of positions."""
    block = tl.program_id(0)
    _, starts, _ = runs(flags, segment_starts, num_segments, block * BLOCK + tl.arange(0, BLOCK))
    tl.store(counts + block, tl.sum(starts.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_segments", "capacity"])
def place_runs(
    flags, segment_starts, counts, span_segment, span_start, span_end, span_count, num_segments, capacity,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every run in its slot, and −1 in the unused slots among those of the block's numbers."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tl.num_programs(0), BLOCK):
        other = first + lane
        count = tl.load(counts + other, mask=other < tl.num_programs(0), other=0)
        before += tl.where(other < block, count, 0)
        total += count
    runs_before = tl.sum(before, 0)
    runs_in_all = tl.sum(total, 0)

    position = block * BLOCK + lane
    segment, starts, ends = runs(flags, segment_starts, num_segments, position)
    slot = runs_before + tl.cumsum(starts.to(tl.int32), 0) - 1  # of the run that started last, in whatever block
    tl.store(span_segment + slot, segment, mask=starts)
    tl.store(span_start + slot, position, mask=starts)
    tl.store(span_end + slot, position + 1, mask=ends)
    unused = (position >= runs_in_all) & (position < capacity)
    tl.store(span_segment + position, -1, mask=unused)
    tl.store(span_start + position, -1, mask=unused)
    tl.store(span_end + position, -1, mask=unused)
    tl.store(span_count, runs_in_all, mask=block == 0)
