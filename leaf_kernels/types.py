"""The enum and the result tuples shared by the ops."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch


class Impl(str, Enum):
    """Which implementation of an op runs."""

    AUTO = "auto"
    TRITON = "triton"
    REFERENCE = "reference"
    TORCH_VARLEN = "torch_varlen"  # pruned_attention without prefixes: torch.nn.attention.varlen
    FLASH_ATTN = "flash_attn"  # the same through the flash-attn package


class LinearKLOutput(NamedTuple):
    """Result of `linear_kl`."""

    loss: torch.Tensor  # scalar, fp32 (fp64 for fp64 inputs), differentiable
    per_token: torch.Tensor  # [N], detached; the unweighted t²·D of each row, 0 where the row was not used


class LinearKLTopkOutput(NamedTuple):
    """Result of `linear_kl_topk`."""

    loss: torch.Tensor  # scalar, fp32 (fp64 for fp64 inputs), differentiable
    per_token: torch.Tensor  # [N], detached; the unweighted t²·D of each row, 0 where the row was not used
    covered_mass: torch.Tensor  # [N], detached; the teacher's probability of its K tokens, 0 where the row was not used


class LinearCrossEntropyOutput(NamedTuple):
    """Result of `linear_cross_entropy`."""

    loss: torch.Tensor  # scalar, fp32 (fp64 for fp64 inputs), differentiable
    per_token: torch.Tensor  # [N], detached; the unweighted cross-entropy of each row, 0 where the row was not used


class TokenScores(NamedTuple):
    """Result of `token_scores`; all [N], fp32 (fp64 from fp64 gradients)."""

    teacher_norm: torch.Tensor  # 0 where not scored
    student_norm: torch.Tensor
    score: torch.Tensor  # D of the paper's E3: low = a confounder; +inf where not scored


class FlaggedSpans(NamedTuple):
    """Result of `flagged_spans`: fixed capacity, so that building it needs no host sync."""

    segment: torch.Tensor  # [C] int32, -1 = unused
    start: torch.Tensor  # [C] int32, position in the pack, inclusive
    end: torch.Tensor  # [C] int32, exclusive
    count: torch.Tensor  # type: ignore[assignment]  # scalar int32 on the device; stands in for tuple.count

    def to_list(self) -> list[tuple[int, int, int]]:
        """The spans as (segment, start, end). This is the one host sync."""
        n = int(self.count)
        return list(zip(self.segment[:n].tolist(), self.start[:n].tolist(), self.end[:n].tolist()))
