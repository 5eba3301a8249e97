"""The loop over chunks of rows behind `linear_kl`, `linear_kl_topk` and `linear_cross_entropy`.

Token weights are known before the forward, so a chunk's logit gradient is turned into dX and dW at once ("gradient in
forward") and its logits are forgotten; the backward only multiplies by one scalar. With z = softcap(s·(h Wᵀ + b)) / t and D
a divergence between softmax(z) and a target,

    d(w t² D) / d(h Wᵀ + b) = w t s (1 − tanh²) dD/dz

The products dX and dW see this gradient divided by P, the power of two just above max|w t s|: it keeps its digits in 16 bits
whatever the divisor inside w is, and the backward's multiplication by P rounds nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..._runtime.mm import addmm_into, mm_into, operand_dtype
from .head import PADDING, Head, LogitMap, accumulator_dtype, stored_dtype
from .rows_torch import Target, TorchRows

# (products [c, V] of the chunk's rows, the chunk, w t s / P [c]) -> (D [c], gradient [c, V]); products may be overwritten,
# the gradient is None where none is wanted
Step = Callable[[torch.Tensor, slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

# Bytes for the logits of a chunk and their gradient, at most. The rest of 2 GiB is for its hidden states and their gradient.
SCRATCH = 2**31 - 2**27
MOST_ROWS = 4096


def default_chunk_rows(vocab: int, dim: int, dtype: torch.dtype, triton: bool, dweight: bool = True) -> int:
    """Rows per chunk: never a function of free memory, because results must not depend on what else is on the device.

    A chunk costs a pass over dW ([V, D], where it is wanted), for which its rows have to pay. With kernels: as many rows as
    SCRATCH holds (logits of both models, a gradient of 16 bits), at most 4096. In plain torch (four buffers of logits, five
    for a jsd with a softcap): scratch as large as dW, but at least 128 MiB; 64 MiB without dW.
    """
    itemsize = accumulator_dtype(dtype).itemsize
    if triton:
        row_bytes, scratch = vocab * (2 * itemsize + dtype.itemsize), SCRATCH
    else:
        row_bytes = vocab * 4 * itemsize
        scratch = min(max(vocab * dim * itemsize, 2**27), SCRATCH) if dweight else 2**26
    rows = min(scratch // row_bytes, MOST_ROWS)
    return max(rows // 128 * 128, min(rows, 64), 1)


class Options(NamedTuple):
    """What every target shares."""

    rows: torch.Tensor | None  # [M]; None = all rows of the hidden states
    row_weight: torch.Tensor  # [M]
    temperature: float
    dtype: torch.dtype  # of the products' operands
    chunk_rows: int
    wants: list[bool]  # gradients of hidden states, weight and bias
    triton: bool  # kernels on the logits instead of plain torch


class Result(NamedTuple):
    """Gradients lack the factor P, and are empty where not wanted."""

    loss: torch.Tensor  # scalar
    values: torch.Tensor  # [M], t² D
    power: torch.Tensor  # scalar, P
    hidden: torch.Tensor  # [M, D], in the dtype of the hidden states, fp32 for fp16
    weight: torch.Tensor  # [V, D], fp32 (fp64 for fp64), as is the bias
    bias: torch.Tensor  # [V]


class _Projection:
    """A head's products, chunk by chunk; its weight is cast once."""

    def __init__(self, head: Head, options: Options) -> None:
        self.source, self.rows = head.hidden, options.rows
        self.unused = (options.row_weight == 0)[:, None]
        self.dtypes = options.dtype, operand_dtype(options.dtype, head.weight.device)
        self.weight = self._cast(head.weight)

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        for dtype in self.dtypes:
            x = x.to(dtype)
        return x if 1 in x.stride() else x.contiguous()  # or every product would copy it

    def hidden(self, chunk: slice) -> torch.Tensor:
        """[c, D]. Rows of weight 0 are zeroed: a NaN there must not reach dW as 0 · NaN."""
        hidden = self.source[chunk] if self.rows is None else self.source.index_select(0, self.rows[chunk])
        return self._cast(hidden).masked_fill(self.unused[chunk], 0)

    def products(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return mm_into(out[: len(hidden)], hidden, self.weight.T)


def linear_kl_chunked(student: Head, teacher: Head, options: Options, divergence: str, beta: float) -> Result:
    """See `linear_kl`."""
    rows = _rows(student, options)
    target = Target(LogitMap.of(teacher, options.temperature, options.dtype), divergence, beta)
    projection, teacher_products = _Projection(teacher, options), rows.new_products()

    def step(products: torch.Tensor, chunk: slice, relative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        theirs = projection.products(projection.hidden(chunk), teacher_products)
        return rows.divergence(products, theirs, relative, target)

    return _accumulate(student, options, rows, step)


def linear_kl_topk_chunked(
    student: Head, ids: torch.Tensor, log_probs: torch.Tensor, options: Options, bucket: bool
) -> Result:
    """See `linear_kl_topk`; ids and log_probs are [M, K].

    The K tokens are taken out of the logits, so that the probability of all others is a sum of its own and not 1 − Σ_k p_k,
    and put back into the gradient. With τ the teacher's mass beyond the K tokens, T its whole mass (1 but for rounding) and
    S the student's mass on the K tokens,

        dD/dz_j = T p_j − p_teacher,j  for the K tokens,  p_j (T − τ / (1 − S))  for the others
    """
    rows = _rows(student, options)

    def step(products: torch.Tensor, chunk: slice, relative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        present = ids[chunk] != PADDING
        index = torch.where(present, ids[chunk], 0)
        log_teacher = torch.where(present, log_probs[chunk].to(products.dtype), -torch.inf)
        z = rows.take(products, index, present)
        log_kept = z.logsumexp(1)  # of the student
        if bucket:
            mass = log_teacher.exp().sum(1)
            tail, whole = (1 - mass).clamp(min=0), mass.clamp(min=1)
            log_tail, gradient = rows.tail(products, log_kept, tail, relative * whole)
            log_total = torch.logaddexp(log_kept, log_tail)
            tail = torch.where(log_tail > -torch.inf, tail, 0)  # no tail, no mass: what is left of it is rounding
            value = _product(tail, tail.log() - (log_tail - log_total))
        else:
            tail, gradient = torch.zeros_like(log_kept), rows.no_tail(len(z))
            log_total = torch.where(present.any(1), log_kept, 0)
            log_teacher = log_teacher - torch.where(present.any(1), log_teacher.logsumexp(1), 0)[:, None]
            value = torch.zeros_like(log_total)
        log_student = z - log_total[:, None]
        teacher = log_teacher.exp()
        value = value + _product(teacher, log_teacher - log_student).sum(1)
        if gradient is not None:
            whole = teacher.sum(1) + tail
            kept = (log_student.exp() * whole[:, None] - teacher) * relative[:, None]
            bias = None if student.bias is None else student.bias[index]
            gradient.scatter_add_(1, index, rows.student.backward_(kept, z, bias).to(gradient.dtype))
        return value, gradient

    return _accumulate(student, options, rows, step)


def _product(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """p x, and 0 where p is, whatever x is."""
    return torch.where(p > 0, p * x, 0)


def _rows(student: Head, options: Options) -> TorchRows:
    """The passes over the logits of a chunk."""
    kind = TorchRows
    if options.triton:
        from .rows_triton import TritonRows as kind
    return kind(
        (min(options.chunk_rows, len(options.row_weight)), len(student.weight)),
        LogitMap.of(student, options.temperature, options.dtype),
        like=options.row_weight,
        operand_dtype=operand_dtype(options.dtype, student.weight.device),
        want_gradient=any(options.wants),
    )


def _accumulate(head: Head, options: Options, rows: TorchRows, step: Step) -> Result:
    projection, row_weight = _Projection(head, options), options.row_weight
    (M,), (V, D), t = row_weight.shape, head.weight.shape, options.temperature
    want_hidden, want_weight, want_bias = options.wants
    new = functools.partial(torch.empty, dtype=row_weight.dtype, device=row_weight.device)
    values = new(M)
    stored = stored_dtype(head.hidden.dtype)
    dhidden = torch.empty((M, D) if want_hidden else 0, dtype=stored, device=row_weight.device)
    dweight, dbias = new((V, D) if want_weight else 0).zero_(), new(V if want_bias else 0).zero_()
    products, chunk_rows = rows.new_products(), max(min(options.chunk_rows, M), 1)
    spare = new((chunk_rows, D) if want_hidden and dhidden.dtype != row_weight.dtype else 0)
    power, relative = _split(row_weight * (t * head.logit_scale))
    for start in range(0, M, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, M))
        hidden = projection.hidden(chunk)
        values[chunk], gradient = step(projection.products(hidden, products), chunk, relative[chunk])
        if gradient is None:
            continue
        if want_hidden:
            out = spare[: len(hidden)] if len(spare) else dhidden[chunk]
            mm_into(out, gradient, projection.weight)
            if len(spare):
                dhidden[chunk] = out
        if want_weight:
            addmm_into(dweight, gradient.T, hidden)
        if want_bias:
            dbias += gradient.sum(0, dtype=dbias.dtype)
    values *= t**2
    return Result((row_weight * values).sum(), values, power, dhidden, dweight, dbias)


def _split(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, weight / P) with P the least power of two above max|weight|; P = 1 if all are 0."""
    largest = weight.abs().amax() if len(weight) else weight.new_zeros(())
    mantissa, _ = torch.frexp(largest)
    power = torch.where(largest > 0, largest / mantissa, 1)
    return power, weight / power
