"""`token_scores` on a GPU: one operator over two kernels."""

from __future__ import annotations

import torch

from ..._runtime.launch import architecture, launch
from ..._runtime.library import define
from ...types import TokenScores
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
