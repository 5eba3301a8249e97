"""`token_scores`, `flag_tokens` and `flagged_spans` on a GPU: an operator each."""

from __future__ import annotations

import struct

import torch

from ..._runtime.launch import architecture, launch
from ..._runtime.library import define
from ...types import FlaggedSpans, TokenScores
from ..pruned_attention.arguments import as_bytes


def scores(
    teacher_grad: torch.Tensor, student_grad: torch.Tensor, segment_starts: torch.Tensor, scored: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from . import kernels

    teacher, student = (g if g.stride(1) == 1 else g.contiguous() for g in (teacher_grad, student_grad))
    segment_starts = segment_starts.contiguous()
    scored = as_bytes(scored)
    N, S = len(teacher), len(segment_starts) - 1
    out = _empty(teacher, student)
    block, whole = (64, 64) if architecture(teacher.device) == "interpreter" else (1024, 2048)
    launch(
        kernels.row_norms, N,
        teacher, student, scored, segment_starts, *out, S, teacher.stride(0), student.stride(0),
        teacher.shape[1], student.shape[1], HAS_SCORED=scored is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    launch(
        kernels.segment_scores, S,
        *out[:2], scored, segment_starts, out[2], HAS_SCORED=scored is not None, BLOCK=whole, num_warps=16,
    )  # fmt: skip
    return out


def _empty(teacher: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = [torch.promote_types(g.dtype, torch.float32) for g in (teacher, student)]
    dtypes = (*wide, torch.promote_types(*wide))
    return tuple(torch.empty(teacher.shape[0], dtype=dtype, device=teacher.device) for dtype in dtypes)  # type: ignore[return-value]


_scores = define(
    "token_scores(Tensor teacher_grad, Tensor student_grad, Tensor segment_starts, Tensor? scored) -> "
    "(Tensor teacher_norm, Tensor student_norm, Tensor score)",
    scores,
    lambda teacher, student, *_: _empty(teacher, student),
)


def token_scores_triton(
    teacher_grad: torch.Tensor, student_grad: torch.Tensor, segment_starts: torch.Tensor, scored: torch.Tensor | None
) -> TokenScores:
    """See `token_scores`."""
    return TokenScores(*_scores(teacher_grad, student_grad, segment_starts, scored))


def flags(
    score: torch.Tensor, segment_starts: torch.Tensor, q: float | None, limit: float, flaggable: torch.Tensor | None
) -> torch.Tensor:
    from . import kernels

    segment_starts = segment_starts.contiguous()
    out = torch.empty(len(score), dtype=torch.uint8, device=score.device).zero_()  # for what is beyond the last segment
    block = 64 if architecture(score.device) == "interpreter" else 4096
    launch(
        kernels.flag_segments, len(segment_starts) - 1,
        score.contiguous(), as_bytes(flaggable), segment_starts, out, _bits(q or 0.0), _bits(limit),
        QUANTILE=q is not None, HAS_FLAGGABLE=flaggable is not None, BLOCK=block, num_warps=16,
    )  # fmt: skip
    return out.view(torch.bool)


def _bits(x: float) -> int:
    """The bits of an fp64 number: Triton would round a float argument to fp32."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


_flags = define(
    "flag_tokens(Tensor score, Tensor segment_starts, float? q, float limit, Tensor? flaggable) -> Tensor",
    flags,
    lambda score, *_: torch.empty_like(score, dtype=torch.bool),
)


def flag_tokens_triton(
    score: torch.Tensor,
    segment_starts: torch.Tensor,
    rule: str,
    level: float,
    cap: float,
    flaggable: torch.Tensor | None,
) -> torch.Tensor:
    """See `flag_tokens_reference`."""
    q, limit = (level, cap) if rule == "quantile" else (None, level)
    return _flags(score, segment_starts, q, limit, flaggable)


def spans(
    flags: torch.Tensor, segment_starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from . import kernels

    segment_starts = segment_starts.contiguous()
    N, S = len(flags), len(segment_starts) - 1
    out = _empty_spans(flags, segment_starts)
    block = 64 if architecture(flags.device) == "interpreter" else 1024
    blocks = max(1, -(-N // block))  # the count is written even where there are no tokens
    counts = torch.empty(blocks, dtype=torch.int32, device=flags.device)
    pack = (as_bytes(flags), segment_starts, counts)
    launch(kernels.count_runs, blocks, *pack, S, BLOCK=block, num_warps=4)
    launch(kernels.place_runs, blocks, *pack, *out, S, len(out[0]), BLOCK=block, num_warps=4)
    return out


def _empty_spans(
    flags: torch.Tensor, segment_starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    N, S = flags.shape[0], segment_starts.shape[0] - 1  # under torch.compile len() would fix them
    capacity = torch.sym_min(N, (N + S) // 2)
    shapes = ((capacity,), (capacity,), (capacity,), ())
    return tuple(torch.empty(shape, dtype=torch.int32, device=flags.device) for shape in shapes)  # type: ignore[return-value]


_spans = define(
    "flagged_spans(Tensor flags, Tensor segment_starts) -> (Tensor segment, Tensor start, Tensor end, Tensor count)",
    spans,
    _empty_spans,
)


def flagged_spans_triton(flags: torch.Tensor, segment_starts: torch.Tensor) -> FlaggedSpans:
    """See `flagged_spans`."""
    return FlaggedSpans(*_spans(flags, segment_starts))
