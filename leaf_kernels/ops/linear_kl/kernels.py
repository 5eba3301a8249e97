"""Triton kernels of `linear_kl`, `linear_kl_topk` and `linear_cross_entropy`: one program per row of a chunk.

Products x = h Wᵀ come in fp32 from the matrix product, rows of `width` >= V elements apart; what lies beyond V is no logit.
In units of log2, z = log2(e) softcap(scale (x + b)) / t. Every lane of a program runs a softmax of its own over the
columns that it sees, and the lanes are merged at the end of the row: no exchange between warps in the loop, and one
exponential per logit, because of pivot and logit one is the new pivot and its exponential is 1. The second pass reads the
row again and writes the gradient, rounded once, into a buffer of its own: 16 bits written over the fp32 row would race.
"""

import triton
import triton.language as tl

from ..pruned_attention.kernels import LOG2E, capped

# Logits are held above the floor, see head.py. Columns that hold none come below it, and the first pivot below these, all
# finite so that no difference is NaN.
FLOOR = tl.constexpr(-1e30 * 1.4426950408889634)
NO_LOGIT = tl.constexpr(-1e38)
FIRST_PIVOT = tl.constexpr(-3e38)


@triton.jit
def logits(
    row, bias, column, vocab, width, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):  # fmt: skip
    """(z, dz/dx up to the factor scale) at the columns of a row."""
    # `width` is a multiple of 16 and `vocab` may not be: this mask leaves 16-byte loads possible
    x = tl.load(row + column, mask=column < width, other=0.0)
    exists = (column < vocab) & (x != float("-inf"))  # NaN is one, and makes the row NaN
    if HAS_BIAS:
        x += tl.load(bias + column, mask=column < vocab, other=0.0)
    z, slope = capped(x, scale, softcap, HAS_SOFTCAP)
    if HAS_BIAS:
        z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(tl.abs(x) < float("inf"), slope, 0.0)  # a banned token
    return tl.where(exists, z, NO_LOGIT), slope


@triton.jit
def grow(pivot, z):
    """(new pivot, factor on what was summed up so far, exp2(z − new pivot))."""
    distance = z - pivot
    shrunk = tl.exp2(-tl.abs(distance))
    return tl.maximum(pivot, z), tl.where(distance > 0, shrunk, 1.0), tl.where(distance > 0, 1.0, shrunk)


@triton.jit
def rounded(gradient, dtype: tl.constexpr):
    """In the dtype of the products' operands. The reverse KL's gradient may be beyond fp16: it stays finite."""
    if dtype == tl.float16:
        gradient = tl.clamp(gradient, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return gradient.to(dtype)


@triton.jit
def merge(pivot, total):
    """(pivot, sum, weight of every lane) of a row from those of its lanes."""
    top = tl.max(pivot, 0)
    weight = tl.exp2(pivot - top)
    return top, tl.sum(total * weight, 0), weight


@triton.jit
def log_mean(log_student, log_teacher, log2_beta, log2_rest):
    """log2 of m = β p_teacher + (1 − β) p_student."""
    a = log_teacher + log2_beta
    b = log_student + log2_rest
    return tl.maximum(a, b) + tl.log2(1 + tl.exp2(-tl.abs(a - b)))


@triton.jit
def divergence_rows(
    student, teacher, student_bias, teacher_bias, relative, value, gradient,
    vocab, width,
    student_scale, student_softcap, teacher_scale, teacher_softcap, beta, log2_beta, log2_rest,
    DIVERGENCE: tl.constexpr, STUDENT_BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr, WANT_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value [rows] = D and gradient [rows, width] = dD/dx · relative, without the factor scale / t.

    Either KL takes one pass, with pivots M and sums L of both softmaxes:
    KL(p‖q) = Σ e^{z_p − M_p} (z_p − z_q) / L_p − (M_p − M_q) − log L_p + log L_q. The large terms
    cancel before the small ones are added. jsd needs the normalisers first.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * width
    teacher += row * width
    lane = tl.arange(0, BLOCK)

    student_pivot = tl.full([BLOCK], FIRST_PIVOT, tl.float32)
    teacher_pivot = tl.full([BLOCK], FIRST_PIVOT, tl.float32)
    student_total = tl.zeros([BLOCK], tl.float32)
    teacher_total = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        z_s, _ = logits(
            student, student_bias, start + lane, vocab, width, student_scale, student_softcap, STUDENT_BIAS,
            STUDENT_SOFTCAP,
        )  # fmt: skip
        z_t, _ = logits(
            teacher, teacher_bias, start + lane, vocab, width, teacher_scale, teacher_softcap, TEACHER_BIAS,
            TEACHER_SOFTCAP,
        )  # fmt: skip
        student_pivot, keep_s, term_s = grow(student_pivot, z_s)
        teacher_pivot, keep_t, term_t = grow(teacher_pivot, z_t)
        student_total = student_total * keep_s + term_s
        teacher_total = teacher_total * keep_t + term_t
        if DIVERGENCE == "forward_kl":
            cross = cross * keep_t + term_t * (z_t - z_s)
        if DIVERGENCE == "reverse_kl":
            cross = cross * keep_s + term_s * (z_s - z_t)
    top_s, sum_s, weight_s = merge(student_pivot, student_total)
    top_t, sum_t, weight_t = merge(teacher_pivot, teacher_total)
    log_s = tl.log2(sum_s)
    log_t = tl.log2(sum_t)

    if DIVERGENCE == "forward_kl":
        d = tl.sum(cross * weight_t, 0) / sum_t - (top_t - top_s) - (log_t - log_s)
    elif DIVERGENCE == "reverse_kl":
        d = tl.sum(cross * weight_s, 0) / sum_s - (top_s - top_t) - (log_s - log_t)
    else:
        from_teacher = tl.zeros([BLOCK], tl.float32)
        from_student = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            z_s, _ = logits(
                student, student_bias, start + lane, vocab, width, student_scale, student_softcap, STUDENT_BIAS,
                STUDENT_SOFTCAP,
            )  # fmt: skip
            z_t, _ = logits(
                teacher, teacher_bias, start + lane, vocab, width, teacher_scale, teacher_softcap, TEACHER_BIAS,
                TEACHER_SOFTCAP,
            )  # fmt: skip
            lp_s = (z_s - top_s) - log_s
            lp_t = (z_t - top_t) - log_t
            lm = log_mean(lp_s, lp_t, log2_beta, log2_rest)
            from_teacher += tl.exp2(lp_t) * (lp_t - lm)
            from_student += tl.exp2(lp_s) * (lp_s - lm)
        d_s = tl.sum(from_student, 0)
        d = beta * tl.sum(from_teacher, 0) + (1 - beta) * d_s
    tl.store(value + row, d / LOG2E)

    if WANT_GRADIENT:
        gradient += row * width
        factor = tl.load(relative + row)
        for start in range(0, vocab, BLOCK):
            column = start + lane
            z_s, slope = logits(
                student, student_bias, column, vocab, width, student_scale, student_softcap, STUDENT_BIAS,
                STUDENT_SOFTCAP,
            )  # fmt: skip
            z_t, _ = logits(
                teacher, teacher_bias, column, vocab, width, teacher_scale, teacher_softcap, TEACHER_BIAS,
                TEACHER_SOFTCAP,
            )  # fmt: skip
            if DIVERGENCE == "forward_kl":
                g = tl.exp2(z_s - top_s) / sum_s - tl.exp2(z_t - top_t) / sum_t
            else:
                lp_s = (z_s - top_s) - log_s
                lp_t = (z_t - top_t) - log_t
                if DIVERGENCE == "reverse_kl":
                    g = tl.exp2(lp_s) * ((lp_s - lp_t - d) / LOG2E)
                else:
                    lm = log_mean(lp_s, lp_t, log2_beta, log2_rest)
                    g = tl.exp2(lp_s) * ((lp_s - lm - d_s) / LOG2E) * (1 - beta)
            g = rounded(g * factor * slope, gradient.dtype.element_ty)
            tl.store(gradient + column, g, mask=column < width)


@triton.jit
def tail_rows(
    products, bias, log_kept, tail, relative, log_tail, gradient,
    vocab, width,
    scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WANT_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log_tail [rows]: log-sum-exp of the logits whose product is not −inf, −inf if there are none.

    gradient [rows, width] = p (1 − tail / (1 − S)) · relative · (1 − tanh²), p with exp(log_kept) in the normaliser, S that
    share of it; 0 where the product is −inf.
    """
    row = tl.program_id(0).to(tl.int64)
    products += row * width
    lane = tl.arange(0, BLOCK)
    pivot = tl.full([BLOCK], FIRST_PIVOT, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        z, _ = logits(products, bias, start + lane, vocab, width, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        pivot, keep, term = grow(pivot, z)
        total = total * keep + term
    top, sum_, _ = merge(pivot, total)
    tl.store(log_tail + row, tl.where(top > NO_LOGIT, (top + tl.log2(sum_)) / LOG2E, float("-inf")))

    if WANT_GRADIENT:
        gradient += row * width
        kept = tl.load(log_kept + row) * LOG2E
        high = tl.maximum(top, kept)
        share = tl.exp2(top - high) / (tl.exp2(kept - high) + sum_ * tl.exp2(top - high)) - tl.load(tail + row) / sum_
        factor = share * tl.load(relative + row)
        for start in range(0, vocab, BLOCK):
            column = start + lane
            z, slope = logits(products, bias, column, vocab, width, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            g = tl.where(z > NO_LOGIT, tl.exp2(z - top) * factor * slope, 0.0)
            tl.store(gradient + column, rounded(g, gradient.dtype.element_ty), mask=column < width)
