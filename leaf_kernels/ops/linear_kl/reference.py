"""The specification of `linear_kl`, `linear_kl_topk` and `linear_cross_entropy`: plain torch under ordinary autograd.

Operands are rounded to the compute dtype, everything after that is fp32 (fp64 for fp64). It holds all logits. Under
autocast, autograd rounds the gradient of a cast operand to the compute dtype on its way back; other implementations do not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .head import LOGIT_FLOOR, PADDING, Head, accumulator_dtype


def _logits(
    head: Head, rows: torch.Tensor | None, row_weight: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """[M, V] logits divided by the temperature. What a row of weight 0 holds does not matter."""
    wide = accumulator_dtype(dtype)
    hidden = head.hidden if rows is None else head.hidden[rows]
    hidden = torch.where(row_weight[:, None] != 0, hidden, 0)
    z = F.linear(hidden.to(dtype).to(wide), head.weight.to(dtype).to(wide))
    if head.bias is not None:
        z = z + head.bias.to(wide)
    z = head.logit_scale * z
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    z = z / temperature
    return z if head.bias is None else z.clamp(min=LOGIT_FLOOR)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def linear_kl_reference(
    student: Head,
    teacher: Head,
    rows: torch.Tensor | None,
    row_weight: torch.Tensor,
    temperature: float,
    divergence: str,
    beta: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss and the [M] divergences of the rows (t² included); see `linear_kl`."""
    log_student = F.log_softmax(_logits(student, rows, row_weight, temperature, dtype), -1)
    log_teacher = F.log_softmax(_logits(teacher, rows, row_weight, temperature, dtype), -1)
    if divergence == "forward_kl":
        value = _kl(log_teacher, log_student)
    elif divergence == "reverse_kl":
        value = _kl(log_student, log_teacher)
    else:
        log_mean = torch.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
        value = beta * _kl(log_teacher, log_mean) + (1 - beta) * _kl(log_student, log_mean)
    value = temperature**2 * value
    return (row_weight * value).sum(), value.detach()


def linear_kl_topk_reference(
    student: Head,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    rows: torch.Tensor | None,
    row_weight: torch.Tensor,
    temperature: float,
    bucket: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss and the [M] divergences of the rows (t² included); ids and log_probs are [M, K]. See `linear_kl_topk`."""
    z = _logits(student, rows, row_weight, temperature, dtype)
    present = ids != PADDING
    index = torch.where(present, ids, 0)
    kept = torch.zeros_like(z).scatter_add_(1, index, present.to(z)) > 0
    log_teacher = torch.where(present, log_probs.to(z), -torch.inf)
    if bucket:
        log_student = F.log_softmax(z, -1)
        nothing_left = kept.all(-1, keepdim=True)
        log_tail = log_student.masked_fill(kept & ~nothing_left, -torch.inf).logsumexp(-1)
        tail = (1 - log_teacher.exp().sum(-1)).clamp(min=0).masked_fill(nothing_left[:, 0], 0)
        value = torch.where(tail > 0, tail * (tail.log() - log_tail), 0)
    else:
        nothing_kept = ~present.any(-1, keepdim=True)
        log_student = z - torch.where(kept | nothing_kept, z, -torch.inf).logsumexp(-1, keepdim=True)
        log_teacher = log_teacher - torch.where(nothing_kept, 0, log_teacher.logsumexp(-1, keepdim=True))
        value = torch.zeros_like(z[:, 0])
    p_teacher = log_teacher.exp()
    value = value + torch.where(p_teacher > 0, p_teacher * (log_teacher - log_student.gather(1, index)), 0).sum(-1)
    value = temperature**2 * value
    return (row_weight * value).sum(), value.detach()


def linear_cross_entropy_reference(
    head: Head,
    labels: torch.Tensor,
    rows: torch.Tensor | None,
    row_weight: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss and the [M] cross-entropies of the rows; `labels` [M] are valid. See `linear_cross_entropy`."""
    log_p = F.log_softmax(_logits(head, rows, row_weight, 1.0, dtype), -1)
    value = -log_p.gather(1, labels[:, None]).squeeze(1)
    return (row_weight * value).sum(), value.detach()
