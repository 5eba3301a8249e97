"""A linear layer on top of hidden states, as the ops see it."""

from __future__ import annotations

from typing import NamedTuple

import torch

# A bias of -inf bans a token. Its logit is held at this finite value: its probability is 0 all the same, and a token that
# only one of the two models bans gives a huge loss with a finite gradient instead of NaN.
LOGIT_FLOOR = -1e30

# The id of no token, in `linear_kl_topk`
PADDING = -1


class Head(NamedTuple):
    """z = softcap(logit_scale · (h Wᵀ + b)), with softcap(x) = c · tanh(x / c)."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


class LogitMap(NamedTuple):
    """What happens to a head's products x = h Wᵀ: z = softcap(scale · (x + b)) / t."""

    bias: torch.Tensor | None  # [V], fp32 (fp64 for fp64), contiguous
    softcap: float | None
    scale: float
    temperature: float

    @classmethod
    def of(cls, head: Head, temperature: float, dtype: torch.dtype) -> LogitMap:
        bias = None if head.bias is None else head.bias.to(accumulator_dtype(dtype)).contiguous()
        return cls(bias, head.softcap, head.logit_scale, temperature)

    def apply_(self, products: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """In place; `bias` is that of the columns at hand."""
        if bias is not None:
            products += bias
        if self.softcap is not None:
            products.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.scale != self.temperature:
            products *= self.scale / self.temperature
        return products if bias is None else products.clamp_(min=LOGIT_FLOOR)

    def backward_(self, gradient: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """From dD/dz to dD/dx but for the factor scale / t, in place: times 1 − tanh², and 0 for a banned token.

        Overwrites `z`, where −inf stands for a logit that has no gradient.
        """
        if bias is not None:
            gradient.mul_(bias.isfinite())
        if self.softcap is not None:
            tanh = z.mul_(self.temperature / self.softcap).clamp_(min=-1)
            gradient.addcmul_(gradient, tanh.square_(), value=-1)
        return gradient


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gradient of hidden states in `dtype` waits for the backward in, divided by P: that may be beyond fp16."""
    return torch.float32 if dtype is torch.float16 else dtype


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, losses and accumulated gradients."""
    return torch.float64 if dtype is torch.float64 else torch.float32
