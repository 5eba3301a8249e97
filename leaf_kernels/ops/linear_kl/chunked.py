"""`linear_kl` and `linear_cross_entropy` without a [rows, vocabulary] buffer: any device, plain torch.

The rows are processed in chunks. Token weights are known before the forward, so a chunk's logit gradient is turned into dX
and dW at once ("gradient in forward") and its logits are forgotten; the backward only multiplies by one scalar. With
z = softcap(s·(h Wᵀ + b)) / t and D a divergence between softmax(z) and a target,

    forward_kl     dD/dz = p_s − p_t
    reverse_kl     dD/dz = p_s (log p_s − log p_t − D)
    jsd            dD/dz = (1 − β) p_s (log p_s − log m − KL(p_s‖m))
    cross-entropy  dD/dz = p_s − onehot(label)

and d(w t² D)/d(h Wᵀ + b) = w t s (1 − tanh²) dD/dz. What is stored is that gradient times 1 / (max|w| t s), so that it keeps
its digits in 16 bits whatever the divisor inside w is; the factor comes back in the backward, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..._runtime.mm import addmm_into, mm_into, operand_dtype
from .head import LOGIT_FLOOR, Head, accumulator_dtype

# (logits [c, V], out [c, V], slice of the rows, gradient wanted) -> D [c]. dD/dz is left in `out`; `logits` may be
# overwritten unless the head has a softcap.
Criterion = Callable[[torch.Tensor, torch.Tensor, slice, bool], torch.Tensor]


def default_chunk_rows(vocab: int, dim: int, dtype: torch.dtype) -> int:
    """Rows per chunk: scratch as large as the weight's gradient, but at least 128 MiB and at most 2 GiB.

    A chunk costs a pass over dW ([V, D]), which that many rows pay for. Never a function of free memory: results must not
    depend on what else is on the device.
    """
    itemsize = accumulator_dtype(dtype).itemsize
    scratch = min(max(vocab * dim * itemsize, 2**27), 2**31)
    rows = scratch // (4 * vocab * itemsize)  # logits and log-probabilities of both models
    return max(rows // 64 * 64, min(rows, 64), 1)


class _Projection:
    """The logits of a head, chunk by chunk; its weight is cast once."""

    def __init__(
        self, head: Head, rows: torch.Tensor | None, row_weight: torch.Tensor, temperature: float, dtype: torch.dtype
    ) -> None:
        self.head, self.rows, self.unused = head, rows, (row_weight == 0)[:, None]
        self.temperature, self.dtype = temperature, dtype
        self.operand_dtype = operand_dtype(dtype, head.weight.device)
        self.weight = self.cast(head.weight.detach())
        self.bias = None if head.bias is None else head.bias.detach().to(accumulator_dtype(dtype))

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype).to(self.operand_dtype)

    def hidden(self, chunk: slice) -> torch.Tensor:
        """[c, D]. Rows of weight 0 are zeroed: a NaN there must not reach dW as 0 · NaN."""
        hidden = self.head.hidden.detach()
        hidden = hidden[chunk] if self.rows is None else hidden.index_select(0, self.rows[chunk])
        return self.cast(hidden).masked_fill(self.unused[chunk], 0)

    def logits_into(self, out: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        mm_into(out, hidden, self.weight.T)
        if self.bias is not None:
            out += self.bias
        cap, scale = self.head.softcap, self.head.logit_scale
        if cap is not None:
            out.mul_(scale / cap).tanh_().mul_(cap / self.temperature)
        elif scale != self.temperature:
            out *= scale / self.temperature
        return out if self.bias is None else out.clamp_(min=LOGIT_FLOOR)

    def through_softcap_(self, gradient: torch.Tensor, logits: torch.Tensor) -> None:
        """gradient *= 1 − tanh²; overwrites `logits`."""
        if self.head.softcap is not None:
            tanh = logits.mul_(self.temperature / self.head.softcap)
            gradient.addcmul_(gradient, tanh.square_(), value=-1)


@dataclass
class _Gradients:
    """Gradients up to the factor that the backward applies; None where not asked for."""

    hidden: torch.Tensor | None  # [M, D]
    weight: torch.Tensor | None  # [V, D]
    bias: torch.Tensor | None  # [V]


@dataclass
class _LinearLoss:
    """loss = Σ w t² D over the rows, everything but the head's tensors bound."""

    projection: _Projection
    criterion: Criterion
    row_weight: torch.Tensor  # [M]
    max_weight: torch.Tensor  # scalar, max|w|
    chunk_rows: int

    def run(self, wants: tuple[bool, ...]) -> tuple[torch.Tensor, torch.Tensor, _Gradients]:
        head = self.projection.head
        M, (V, D) = len(self.row_weight), head.weight.shape
        c = min(self.chunk_rows, M)
        new = self.row_weight.new_empty
        values, logits, log_probs = new(M), new(c, V), new(c, V)
        want_hidden, want_weight, want_bias = wants
        gradients = _Gradients(
            new(M, D) if want_hidden else None,
            new(V, D).zero_() if want_weight else None,
            new(V).zero_() if want_bias else None,
        )
        relative = self.row_weight / self.max_weight.clamp(min=torch.finfo(self.row_weight.dtype).tiny)
        for start in range(0, M, max(c, 1)):
            chunk = slice(start, min(start + c, M))
            n = chunk.stop - start
            z, out = logits[:n], log_probs[:n]
            hidden = self.projection.hidden(chunk)
            self.projection.logits_into(z, hidden)
            values[chunk] = self.criterion(z, out, chunk, any(wants))
            if not any(wants):
                continue
            gradient = out.mul_(relative[chunk, None])
            self.projection.through_softcap_(gradient, z)
            if gradients.bias is not None:
                gradients.bias += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)  # rounded once, where the products take 16-bit operands
            if gradients.hidden is not None:
                mm_into(gradients.hidden[chunk], gradient, self.projection.weight)
            if gradients.weight is not None:
                addmm_into(gradients.weight, gradient.T, hidden)
        values *= self.projection.temperature**2
        return (self.row_weight * values).sum(), values, gradients

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        head = self.projection.head
        parameters = head.hidden, head.weight, head.bias
        wants = tuple(torch.is_grad_enabled() and p is not None and p.requires_grad for p in parameters)
        if any(wants):
            return _GradientInForward.apply(*parameters, self, wants)
        return self.run(wants)[:2]


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, linear_loss: _LinearLoss, wants: tuple[bool, ...]):
        loss, values, gradients = linear_loss.run(wants)
        projection = linear_loss.projection
        ctx.save_for_backward(
            gradients.hidden, gradients.weight, gradients.bias, linear_loss.max_weight, projection.rows
        )
        ctx.scale = projection.temperature * projection.head.logit_scale
        ctx.hidden_shape = hidden.shape
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor):
        *gradients, max_weight, rows = ctx.saved_tensors
        factor = upstream * max_weight * ctx.scale
        # Out of place: the saved tensors must survive a second backward.
        hidden, weight, bias = (None if g is None else (g * factor).to(d) for g, d in zip(gradients, ctx.dtypes))
        if hidden is not None and rows is not None:
            # added, not copied: a row may be named twice
            hidden = hidden.new_zeros(ctx.hidden_shape).index_add_(0, rows, hidden)
        return hidden, weight, bias, None, None


def _linear_loss(projection: _Projection, criterion: Criterion, row_weight: torch.Tensor, chunk_rows: int):
    max_weight = row_weight.abs().amax() if len(row_weight) else row_weight.new_zeros(())
    return _LinearLoss(projection, criterion, row_weight, max_weight, chunk_rows)()


def linear_kl_chunked(
    student: Head,
    teacher: Head,
    rows: torch.Tensor | None,
    row_weight: torch.Tensor,
    temperature: float,
    divergence: str,
    beta: float,
    dtype: torch.dtype,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss and the [M] divergences of the rows (t² included); see `linear_kl`."""
    V, D = student.weight.shape
    chunk_rows = chunk_rows or default_chunk_rows(V, D, dtype)
    student_projection, teacher_projection = (
        _Projection(h, rows, row_weight, temperature, dtype) for h in (student, teacher)
    )
    c = min(chunk_rows, len(row_weight))
    buffers = [row_weight.new_empty(c, V) for _ in range(1 + (student.softcap is not None) + (divergence == "jsd"))]

    def criterion(logits: torch.Tensor, out: torch.Tensor, chunk: slice, want_gradient: bool) -> torch.Tensor:
        log_teacher, *spare = (b[: len(logits)] for b in buffers)
        if student.softcap is None:
            spare.append(logits)
        teacher_projection.logits_into(out, teacher_projection.hidden(chunk))
        torch.log_softmax(out, -1, out=log_teacher)
        log_student = torch.log_softmax(logits, -1, out=out)
        if divergence == "forward_kl":
            return _forward_kl(log_student, log_teacher, spare[0], want_gradient)
        if divergence == "reverse_kl":
            return _reverse_kl(log_student, log_teacher, spare[0], want_gradient)
        return _jsd(log_student, log_teacher, spare[0], spare[1], beta, want_gradient)

    return _linear_loss(student_projection, criterion, row_weight, chunk_rows)


def linear_cross_entropy_chunked(
    head: Head,
    labels: torch.Tensor,
    rows: torch.Tensor | None,
    row_weight: torch.Tensor,
    dtype: torch.dtype,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss and the [M] cross-entropies of the rows; `labels` [M] are valid. See `linear_cross_entropy`."""

    def criterion(logits: torch.Tensor, out: torch.Tensor, chunk: slice, want_gradient: bool) -> torch.Tensor:
        log_p = torch.log_softmax(logits, -1, out=out)
        label = labels[chunk, None]
        value = -log_p.gather(1, label).squeeze(1)
        if want_gradient:
            log_p.exp_().scatter_add_(1, label, log_p.new_full((), -1).expand_as(label))
        return value

    V, D = head.weight.shape
    chunk_rows = chunk_rows or default_chunk_rows(V, D, dtype)
    return _linear_loss(_Projection(head, rows, row_weight, 1.0, dtype), criterion, row_weight, chunk_rows)


# The divergences work in place on [c, V] buffers: all are scratch afterwards, except that dD/dz is left in `log_student`.
# Logits are finite (LOGIT_FLOOR), so p = 0 times a difference of logs is 0.


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
