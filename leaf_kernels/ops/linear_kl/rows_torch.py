"""What is computed on the logits of a chunk of rows, in plain torch and in place: any device, fp32 and fp64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .head import LOGIT_FLOOR, LogitMap


class Target(NamedTuple):
    """A teacher, and how far from it is measured."""

    logit_map: LogitMap
    divergence: str
    beta: float


class TorchRows:
    """Passes over [n, V] products of a student, n <= c.

    The gradients are those of the divergence with respect to the products, times `relative` [n], in the dtype of the
    products' operands, and None where none is wanted. They live in a buffer that the next pass overwrites, as a pass may
    overwrite the products.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        student: LogitMap,
        *,
        like: torch.Tensor,
        operand_dtype: torch.dtype,
        want_gradient: bool,
    ) -> None:
        self.shape, self.student = shape, student
        self.like, self.operand_dtype, self.want_gradient = like, operand_dtype, want_gradient
        self.buffers: dict[str, torch.Tensor] = {}

    def new_products(self) -> torch.Tensor:
        return self.like.new_empty(self.shape)

    def _buffer(self, name: str, n: int) -> torch.Tensor:
        if name not in self.buffers:
            self.buffers[name] = self.new_products()
        return self.buffers[name][:n]

    def divergence(
        self, student: torch.Tensor, teacher: torch.Tensor, relative: torch.Tensor, target: Target
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(D [n] between the softmaxes of two products, gradient)."""
        n, teacher_map = len(student), target.logit_map
        z = self.student.apply_(student, self.student.bias)
        log_teacher = self._buffer("log_teacher", n)
        torch.log_softmax(teacher_map.apply_(teacher, teacher_map.bias), -1, out=log_teacher)
        log_student = torch.log_softmax(z, -1, out=teacher)
        spare = z if self.student.softcap is None else self._buffer("spare", n)  # the cap's slope needs z
        if target.divergence == "forward_kl":
            value = _forward_kl(log_student, log_teacher, spare, self.want_gradient)
        elif target.divergence == "reverse_kl":
            value = _reverse_kl(log_student, log_teacher, spare, self.want_gradient)
        else:
            value = _jsd(log_student, log_teacher, spare, self._buffer("other", n), target.beta, self.want_gradient)
        return value, self._finish(log_student, z, relative)

    def take(self, products: torch.Tensor, index: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """z [n, K] at `index`, −inf where not present; those that are present are taken out of the products."""
        z = self.student.apply_(products, self.student.bias).gather(1, index)
        # where not present, index is any valid one and the minimum changes nothing
        products.scatter_reduce_(1, index, torch.where(present, -torch.inf, torch.inf).to(z), "amin")
        return torch.where(present, z, -torch.inf)

    def tail(
        self, products: torch.Tensor, log_kept: torch.Tensor, tail: torch.Tensor, relative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(log-sum-exp [n] of what `take` left, −inf for nothing; gradient p (1 − tail / (1 − S)), 0 at what it took)."""
        z, out = products, self._buffer("gradient", len(products))
        pivot = z.amax(1, keepdim=True).clamp(min=2 * LOGIT_FLOOR)
        total = torch.sub(z, pivot, out=out).exp_().sum(1)
        log_tail = pivot[:, 0] + total.log()
        share = (pivot[:, 0] - torch.logaddexp(log_kept, log_tail)).exp() - torch.where(total > 0, tail / total, 0)
        return log_tail, self._finish(out, z, relative * share)

    def no_tail(self, n: int) -> torch.Tensor | None:
        """A gradient of zeros."""
        return self._buffer("gradient", n).zero_().to(self.operand_dtype) if self.want_gradient else None

    def _finish(self, gradient: torch.Tensor, z: torch.Tensor, factor: torch.Tensor) -> torch.Tensor | None:
        if not self.want_gradient:
            return None
        self.student.backward_(gradient.mul_(factor[:, None]), z, self.student.bias)
        if self.operand_dtype is torch.float16:  # the reverse KL's may be beyond its range
            gradient.clamp_(-65504, 65504)
        return gradient.to(self.operand_dtype)  # rounded once, where the products take 16-bit operands


# These work in place on [n, V] buffers: all are scratch afterwards, except that dD/dz is left in `log_student`.
# Logits are finite (LOGIT_FLOOR), so p = 0 times a difference of logs is 0.
#
#     forward_kl     dD/dz = p_s − p_t
#     reverse_kl     dD/dz = p_s (log p_s − log p_t − D)
#     jsd            dD/dz = (1 − β) p_s (log p_s − log m − KL(p_s‖m))


def _forward_kl(log_student: torch.Tensor, log_teacher: torch.Tensor, spare: torch.Tensor, want_gradient: bool):
    p_teacher = torch.exp(log_teacher, out=spare)
    value = log_teacher.sub_(log_student).mul_(p_teacher).sum(-1)
    if want_gradient:
        log_student.exp_().sub_(p_teacher)
    return value


def _reverse_kl(log_student: torch.Tensor, log_teacher: torch.Tensor, spare: torch.Tensor, want_gradient: bool):
    p_student = torch.exp(log_student, out=spare)
    difference = log_student.sub_(log_teacher)
    value = torch.mul(difference, p_student, out=log_teacher).sum(-1)
    if want_gradient:
        difference.sub_(value[:, None]).mul_(p_student)
    return value


def _jsd(
    log_student: torch.Tensor,
    log_teacher: torch.Tensor,
    spare: torch.Tensor,
    other: torch.Tensor,
    beta: float,
    want_gradient: bool,
):
    # log m = log β + log(p_t + p_s (1 − β) / β)
    log_mean = torch.add(log_student, math.log1p(-beta) - math.log(beta), out=spare)
    log_mean = torch.logaddexp(log_teacher, log_mean, out=log_mean).add_(math.log(beta))
    p_teacher = torch.exp(log_teacher, out=other)
    value_teacher = log_teacher.sub_(log_mean).mul_(p_teacher).sum(-1)
    p_student = torch.exp(log_student, out=other)
    difference = log_student.sub_(log_mean)
    value_student = torch.mul(difference, p_student, out=log_teacher).sum(-1)
    if want_gradient:
        difference.sub_(value_student[:, None]).mul_(p_student).mul_(1 - beta)
    return beta * value_teacher + (1 - beta) * value_student
