"""Triton kernels of `token_scores`: norms of both models, one program per row; then E2 and E3, one program per segment."""

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


@triton.jit
def row_norms(
    teacher, student, scored, segment_starts, teacher_norm, student_norm, score,
    num_segments, teacher_stride, student_stride, teacher_width, student_width,
    HAS_SCORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """E1. Rows that are not scored are not read: norm 0, score +inf."""
    row = tl.program_id(0).to(tl.int64)
    wanted = row < tl.load(segment_starts + num_segments)
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
    """E2 and E3 in fp64, rounded once. Every lane keeps the extremes of what it sees."""
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
        t_high = tl.maximum(t_high, tl.where(wanted, t, -INF))
        s_low = tl.minimum(s_low, tl.where(wanted, s, INF))
        s_high = tl.maximum(s_high, tl.where(wanted, s, -INF))
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
