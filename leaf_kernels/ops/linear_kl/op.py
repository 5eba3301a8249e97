"""The operators of `linear_kl`, `linear_kl_topk` and `linear_cross_entropy`, and their autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..._runtime.library import define
from .chunked import Options, Result, default_chunk_rows, linear_kl_chunked, linear_kl_topk_chunked
from .head import Head, stored_dtype

# The fields of Head and Options
_SHARED = (
    "Tensor hidden, Tensor weight, Tensor? bias, float? softcap, float logit_scale, Tensor? rows, Tensor row_weight, "
    "float temperature, ScalarType dtype, int chunk_rows, bool[] wants, bool triton"
)
_RESULT = "(Tensor loss, Tensor values, Tensor power, Tensor d_hidden, Tensor d_weight, Tensor d_bias)"


def _unpack(args: tuple[Any, ...]) -> tuple[Head, Options, tuple[Any, ...]]:
    return Head(*args[:5]), Options(*args[5:12]), args[12:]


def kl(*args: Any) -> Result:
    student, options, (*teacher, divergence, beta) = _unpack(args)
    return linear_kl_chunked(student, Head(*teacher), options, divergence, beta)


def topk(*args: Any) -> Result:
    student, options, (ids, log_probs, bucket) = _unpack(args)
    return linear_kl_topk_chunked(student, ids, log_probs, options, bucket)


def _fake(*args: Any) -> Result:
    head, options, _ = _unpack(args)
    new, (M,), (V, D) = options.row_weight.new_empty, options.row_weight.shape, head.weight.shape
    want_hidden, want_weight, want_bias = options.wants
    return Result(
        loss=new(()),
        values=new(M),
        power=new(()),
        hidden=new((M, D) if want_hidden else 0, dtype=stored_dtype(head.hidden.dtype)),
        weight=new((V, D) if want_weight else 0),
        bias=new(V if want_bias else 0),
    )


_kl = define(
    f"linear_kl({_SHARED}, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, float? teacher_softcap, "
    f"float teacher_logit_scale, str divergence, float beta) -> {_RESULT}",
    kl,
    _fake,
)
_topk = define(f"linear_kl_topk({_SHARED}, Tensor ids, Tensor log_probs, bool bucket) -> {_RESULT}", topk, _fake)


class _GradientInForward(torch.autograd.Function):
    """(loss, values) of an operator. Only hidden, weight and bias have gradients."""

    @staticmethod
    def forward(ctx: Any, operator: Any, hidden, weight, bias, softcap, logit_scale, rows, *more):
        loss, values, power, *gradients = operator(hidden, weight, bias, softcap, logit_scale, rows, *more)
        ctx.save_for_backward(power, rows, *gradients)
        *_, wants, _ = more[:6]
        ctx.dtypes = [x.dtype if wanted else None for x, wanted in zip((hidden, weight, bias), wants)]
        ctx.num_rows, ctx.num_inputs = len(hidden), 7 + len(more)
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor):
        power, rows, *gradients = ctx.saved_tensors
        factor = (upstream * power).view(1)  # a scalar tensor would be rounded to the gradient's dtype first
        # Out of place: the saved tensors must survive a second backward.
        hidden, weight, bias = (
            None if dtype is None else torch.mul(g, factor, out=torch.empty(g.shape, dtype=dtype, device=g.device))
            for g, dtype in zip(gradients, ctx.dtypes)
        )
        if hidden is not None and rows is not None:
            # added, not copied: a row may be named twice
            hidden = hidden.new_zeros(ctx.num_rows, hidden.shape[1]).index_add_(0, rows, hidden)
        return None, hidden, weight, bias, *[None] * (ctx.num_inputs - 4)


def _run(operator: Any, head: Head, options: Options, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if any(options.wants):
        return _GradientInForward.apply(operator, *head, *options, *more)
    loss, values, *_ = operator(*head, *options, *more)
    return loss, values


def _options(
    head: Head,
    rows: torch.Tensor | None,
    row_weight: torch.Tensor,
    temperature: float,
    dtype: torch.dtype,
    chunk_rows: int | None,
    triton: bool,
) -> Options:
    parameters = head.hidden, head.weight, head.bias
    wants = [torch.is_grad_enabled() and p is not None and p.requires_grad for p in parameters]
    if chunk_rows is None:
        V, D = head.weight.shape
        chunk_rows = default_chunk_rows(V, D, dtype, triton, dweight=wants[1])
    return Options(rows, row_weight, temperature, dtype, chunk_rows, wants, triton)


def linear_kl_fused(
    student: Head,
    teacher: Head,
    rows: torch.Tensor | None,
    row_weight: torch.Tensor,
    temperature: float,
    divergence: str,
    beta: float,
    dtype: torch.dtype,
    chunk_rows: int | None,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss and the [M] divergences of the rows (t² included); see `linear_kl`."""
    options = _options(student, rows, row_weight, temperature, dtype, chunk_rows, triton)
    # torch.compile refuses one tensor as two inputs, and a frozen head may be both models'
    theirs = [None if x is None else x.detach() for x in teacher[:3]]
    return _run(_kl, student, options, *theirs, *teacher[3:], divergence, beta)


def linear_kl_topk_fused(
    student: Head,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    rows: torch.Tensor | None,
    row_weight: torch.Tensor,
    temperature: float,
    bucket: bool,
    dtype: torch.dtype,
    chunk_rows: int | None,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss and the [M] divergences of the rows (t² included); ids and log_probs are [M, K]. See `linear_kl_topk`."""
    options = _options(student, rows, row_weight, temperature, dtype, chunk_rows, triton)
    return _run(_topk, student, options, ids, log_probs, bucket)
