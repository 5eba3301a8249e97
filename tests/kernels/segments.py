"""What the tests of token_scores, flag_tokens and flagged_spans share."""

from __future__ import annotations

import itertools

import torch

from leaf_kernels.testing import ragged_lengths, ragged_starts

IMPLS = ["auto", "triton"]  # on a CPU the specification, and the kernels in Triton's interpreter


def starts(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def pack(seed: int, tail: int = 3, segments: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of teacher and student, segment_starts, and a mask; `tail` positions are beyond the last segment."""
    segment_starts = ragged_starts(ragged_lengths(segments, 9, seed=seed))
    N = int(segment_starts[-1]) + tail
    g = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(N, 6, generator=g), torch.randn(N, 4, generator=g)
    return teacher, student, segment_starts, torch.rand(N, generator=g) < 0.7


def slices(segment_starts: torch.Tensor) -> list[slice]:
    edges = segment_starts.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
