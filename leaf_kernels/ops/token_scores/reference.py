"""The specification of `token_scores`, `flag_tokens` and `flagged_spans`: plain torch, all segments at once, no sync."""

from __future__ import annotations

import math

import torch

from ...types import FlaggedSpans, TokenScores


def _segment_ids(segment_starts: torch.Tensor, N: int) -> torch.Tensor:
    """[N] int64: the segment of each position, S for positions before the first and beyond the last segment."""
    positions = torch.arange(N, device=segment_starts.device, dtype=segment_starts.dtype)
    segment = torch.searchsorted(segment_starts[1:], positions, right=True)
    return segment.masked_fill_(positions < segment_starts[0], len(segment_starts) - 1)


def _reduce(x: torch.Tensor, segment: torch.Tensor, S: int, how: str, empty: float) -> torch.Tensor:
    """[S + 1]: "amin" or "amax" of each segment, `empty` where it has no positions."""
    return x.new_full((S + 1,), empty).scatter_reduce_(0, segment, x, how)


def _any(x: torch.Tensor, segment: torch.Tensor, S: int) -> torch.Tensor:
    """[S + 1] bool: whether x holds anywhere in the segment."""
    return _reduce(x.int(), segment, S, "amax", 0).bool()


def _min_max(x: torch.Tensor, scored: torch.Tensor, segment: torch.Tensor, S: int, constant: float) -> torch.Tensor:
    """x over the scored positions of its segment, mapped to [0, 1]; `constant` where all of them are equal."""
    low = _reduce(x.masked_fill(~scored, math.inf), segment, S, "amin", math.inf)[segment]
    high = _reduce(x.masked_fill(~scored, -math.inf), segment, S, "amax", -math.inf)[segment]
    return torch.where(high > low, (x - low) / (high - low), constant)


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if gradient.device.type == "cpu" and gradient.dtype != wide:
        # torch reduces 16 bits one number at a time there, ten times slower; all widened at once they leave the cache
        return torch.cat([torch.linalg.vector_norm(rows.to(wide), dim=1) for rows in gradient.split(128)])
    return torch.linalg.vector_norm(gradient, dim=1, dtype=wide)


def token_scores_reference(
    teacher_grad: torch.Tensor, student_grad: torch.Tensor, segment_starts: torch.Tensor, scored: torch.Tensor | None
) -> TokenScores:
    """E1 to E3; see `token_scores`."""
    N, S = len(teacher_grad), len(segment_starts) - 1
    segment = _segment_ids(segment_starts, N)
    scored = segment < S if scored is None else scored & (segment < S)
    teacher, student = (_norm(g).masked_fill(~scored, 0) for g in (teacher_grad, student_grad))
    bad = _any(~(teacher.isfinite() & student.isfinite()), segment, S)[segment]
    difference = _min_max(teacher.double(), scored, segment, S, 0) - _min_max(student.double(), scored, segment, S, 0)
    score = _min_max(difference, scored, segment, S, 1).masked_fill(bad, math.nan).masked_fill(~scored, math.inf)
    return TokenScores(teacher, student, score.to(torch.promote_types(teacher.dtype, student.dtype)))


def flag_tokens_reference(
    score: torch.Tensor,
    segment_starts: torch.Tensor,
    rule: str,
    level: float,
    cap: float,
    flaggable: torch.Tensor | None,
) -> torch.Tensor:
    """E4; `level` is the q of the quantile rule or the τ of the threshold rule; see `flag_tokens`."""
    N, S = len(score), len(segment_starts) - 1
    segment = _segment_ids(segment_starts, N)
    scored = score.isfinite() & (segment < S) & ~_any(score.isnan(), segment, S)[segment]
    if rule == "threshold":
        flags = scored & (score <= level)
    else:
        n = torch.zeros(S + 1, dtype=torch.int64, device=score.device).index_add_(0, segment, scored.long())
        index = torch.minimum((level * n.double()).floor().long(), n - 1)
        # By (segment, score) with the unscored last: a segment keeps its place, so its order statistic is one gather away.
        key = score.masked_fill(~scored, math.inf)
        by_score = key.argsort(stable=True)
        ordered = key[by_score[segment[by_score].argsort(stable=True)]]
        place = (segment_starts[segment] - segment_starts[0]).long() + index[segment]
        threshold = ordered[place.clamp(0, max(N - 1, 0))].clamp(max=cap)
        flags = scored & (score <= threshold)
    return flags if flaggable is None else flags & flaggable


def flagged_spans_reference(flags: torch.Tensor, segment_starts: torch.Tensor) -> FlaggedSpans:
    """The spans of E5; see `flagged_spans`."""
    N, S = len(flags), len(segment_starts) - 1
    segment = _segment_ids(segment_starts, N)
    flags = flags & (segment < S)
    joined = flags[1:] & flags[:-1] & (segment[1:] == segment[:-1])  # with the position before
    no = flags.new_zeros(min(N, 1))
    starts, ends = flags & ~torch.cat([no, joined]), flags & ~torch.cat([joined, no])
    capacity = min(N, (N + S) // 2)  # a segment of n tokens has at most ceil(n / 2) runs
    positions = torch.arange(N, dtype=torch.int32, device=flags.device)

    def pack(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The chosen values, in order; the others all land in one slot too many."""
        slot = torch.where(chosen, chosen.cumsum(0) - 1, capacity)
        return positions.new_full((capacity + 1,), -1).scatter_(0, slot, values)[:capacity]

    return FlaggedSpans(
        pack(segment.int(), starts), pack(positions, starts), pack(positions + 1, ends), starts.sum().int()
    )
