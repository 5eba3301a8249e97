"""`token_scores`, `flag_tokens` and `flagged_spans`: what a user reads."""

from __future__ import annotations

import torch

from ..._runtime.checks import check_device, check_dtype, check_floating, check_shape, check_tensor
from ..._runtime.dispatch import resolve_impl
from ...types import FlaggedSpans, Impl, TokenScores
from .reference import flag_tokens_reference, flagged_spans_reference, token_scores_reference


def token_scores(
    teacher_grad: torch.Tensor,
    student_grad: torch.Tensor,
    segment_starts: torch.Tensor,
    *,
    scored: torch.Tensor | None = None,
    impl: str | Impl = "auto",
) -> TokenScores:
    """Gradient sensitivities of two models and the confounder score made of them (E1 to E3), per segment of a pack.

    norm_i = ‖grad_i‖₂ (E1); ĝ = min–max of the norms over the scored positions of the segment (E2);
    score = min–max of ĝ_teacher − ĝ_student, again over the segment (E3). Low: the student reacts and the teacher does not.

    Args:
        teacher_grad, student_grad: [N, Ht] and [N, Hs], gradients of the loss with respect to the input embeddings; floating
            point, not necessarily of one dtype.
        segment_starts: [S + 1] int32; segment s is `segment_starts[s]:segment_starts[s + 1]`, possibly empty. Positions
            before `segment_starts[0]` and from `segment_starts[S]` on are not scored.
        scored: [N] bool, the positions that take part; None = all of them.
        impl: "auto" | "reference" | "triton".

    Returns:
        teacher_norm, student_norm: [N], 0 where not scored. score: [N] in [0, 1], +inf where not scored. All fp32 (fp64
        from fp64 gradients).

    Edge cases: norms that are all equal normalise to 0. A difference that is the same everywhere (one scored position, or
    equal gradients) scores 1, so that nothing is flagged. A norm that is not finite makes every scored position of its
    segment NaN, and no other segment.

    Numerics: norms are accumulated in fp32 (fp64), E2 and E3 in fp64 and rounded once. No host sync, no gradients.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    op = "token_scores"
    check_tensor(op, "teacher_grad", teacher_grad, 2)
    check_tensor(op, "student_grad", student_grad, 2)
    check_floating(op, teacher_grad=teacher_grad, student_grad=student_grad)
    N = len(teacher_grad)
    check_shape(op, "student_grad", student_grad, (N, student_grad.shape[1]), "to match teacher_grad [N, Ht]")
    _check_mask(op, "scored", scored, N)
    _check_segment_starts(op, segment_starts)
    check_device(op, teacher_grad.device, student_grad=student_grad, segment_starts=segment_starts, scored=scored)
    arguments = (teacher_grad.detach(), student_grad.detach(), segment_starts, scored)
    if resolve_impl(op, impl, teacher_grad.device) is Impl.TRITON:
        from .op import token_scores_triton

        return token_scores_triton(*arguments)
    return token_scores_reference(*arguments)


def flag_tokens(
    score: torch.Tensor,
    segment_starts: torch.Tensor,
    *,
    rule: str = "quantile",
    q: float | None = None,
    tau: float | None = None,
    cap: float = 0.5,
    flaggable: torch.Tensor | None = None,
    impl: str | Impl = "auto",
) -> torch.Tensor:
    """The confounding tokens of each segment (E4).

    - quantile: score <= min(sorted(scores)[min(floor(q · n), n − 1)], cap) over the n scored tokens of the segment (the
      authors' code): floor(q · n) + 1 tokens and ties.
    - threshold: score <= tau (the paper).

    Args:
        score: [N] floating point, as `token_scores` returns it; +inf where not scored.
        segment_starts: [S + 1] int32, as in `token_scores`.
        rule: "quantile", which needs `q`, or "threshold", which needs `tau`.
        q: in [0, 1]; q · n is taken in fp64. cap: upper limit of the quantile's threshold.
        flaggable: [N] bool; protected tokens (False) count in n but are never flagged. None = all flaggable.
        impl: "auto" | "reference" | "triton".

    Returns:
        [N] bool. Nothing is flagged where not scored, nor in a segment that holds a NaN. No host sync.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    op = "flag_tokens"
    check_floating(op, score=check_tensor(op, "score", score, 1))
    _check_mask(op, "flaggable", flaggable, len(score))
    _check_segment_starts(op, segment_starts)
    check_device(op, score.device, segment_starts=segment_starts, flaggable=flaggable)
    if rule == "quantile":
        if q is None or not 0 <= q <= 1 or tau is not None:
            raise ValueError(f"{op}: rule='quantile' needs q in [0, 1] and no tau, got q={q}, tau={tau}")
        level = q
    elif rule == "threshold":
        if tau is None or q is not None:
            raise ValueError(f"{op}: rule='threshold' needs tau and no q, got tau={tau}, q={q}")
        level = tau
    else:
        raise ValueError(f"{op}: rule must be one of 'quantile', 'threshold', got {rule!r}")
    arguments = (score.detach(), segment_starts, rule, level, cap, flaggable)
    if resolve_impl(op, impl, score.device) is Impl.TRITON:
        from .op import flag_tokens_triton

        return flag_tokens_triton(*arguments)
    return flag_tokens_reference(*arguments)


def flagged_spans(flags: torch.Tensor, segment_starts: torch.Tensor, *, impl: str | Impl = "auto") -> FlaggedSpans:
    """The spans of E5: maximal runs of consecutive flagged tokens, none across a segment boundary.

    Args:
        flags: [N] bool, as `flag_tokens` returns it.
        segment_starts: [S + 1] int32, as in `token_scores`; flags outside of all segments are ignored.
        impl: "auto" | "reference" | "triton".

    Returns:
        segment, start (inclusive), end (exclusive): [C] int32 in the order of position, the unused rest −1; positions are
        those of the pack. count: scalar int32 on the device. C = min(N, (N + S) // 2), which every input fits in.
        `.to_list()` is the host sync.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    op = "flagged_spans"
    check_dtype(op, "flags", check_tensor(op, "flags", flags, 1), torch.bool)
    _check_segment_starts(op, segment_starts)
    check_device(op, flags.device, segment_starts=segment_starts)
    if resolve_impl(op, impl, flags.device) is Impl.TRITON:
        from .op import flagged_spans_triton

        return flagged_spans_triton(flags, segment_starts)
    return flagged_spans_reference(flags, segment_starts)


def _check_segment_starts(op: str, segment_starts: torch.Tensor) -> None:
    check_dtype(op, "segment_starts", check_tensor(op, "segment_starts", segment_starts, 1), torch.int32)
    if len(segment_starts) == 0:
        raise ValueError(
            f"{op}: segment_starts must have S + 1 >= 1 entries, got none; no segments are torch.tensor([0])"
        )


def _check_mask(op: str, name: str, mask: torch.Tensor | None, N: int) -> None:
    if mask is not None:
        check_dtype(op, name, check_tensor(op, name, mask, 1), torch.bool)
        check_shape(op, name, mask, (N,), "to match the tokens")
