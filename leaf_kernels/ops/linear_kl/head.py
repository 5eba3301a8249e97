"""A linear layer on top of hidden states, as `linear_kl` and `linear_cross_entropy` see it."""

from __future__ import annotations

from typing import NamedTuple

import torch

# A bias of -inf bans a token. Its logit is held at this finite value: its probability is 0 all the same, and a token that
# only one of the two models bans gives a huge loss with a finite gradient instead of NaN.
LOGIT_FLOOR = -1e30


class Head(NamedTuple):
    """z = softcap(logit_scale · (h Wᵀ + b)), with softcap(x) = c · tanh(x / c)."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, losses and accumulated gradients."""
    return torch.float64 if dtype is torch.float64 else torch.float32
