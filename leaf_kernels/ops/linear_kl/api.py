"""`linear_kl`, `linear_kl_topk` and `linear_cross_entropy`: what a user reads."""

from __future__ import annotations

import torch

from ..._runtime.checks import check_device, check_dtype, check_floating, check_shape, check_tensor, compute_dtype
from ...types import Impl, LinearCrossEntropyOutput, LinearKLOutput, LinearKLTopkOutput
from .arguments import (
    check_numbers,
    check_token_weight,
    first_tokens,
    head,
    implementation,
    named,
    scatter,
    useful_rows,
)
from .head import PADDING, accumulator_dtype
from .op import linear_kl_fused, linear_kl_topk_fused
from .reference import linear_cross_entropy_reference, linear_kl_reference, linear_kl_topk_reference

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
_TAILS = ("bucket", "renormalise")


def linear_kl(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    token_weight: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float | None = None,
    vocab_size: int | None = None,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    impl: str | Impl = "auto",
) -> LinearKLOutput:
    """Divergence between a teacher's and a student's next-token distributions, without ever holding their logits.

    loss = Σ_n w_n t² D_n, p = softmax(z), z = softcap(logit_scale · (h Wᵀ + b)) / t, softcap(x) = c · tanh(x / c):

    - forward_kl: D = KL(p_teacher ‖ p_student), the paper's choice (E7)
    - reverse_kl: D = KL(p_student ‖ p_teacher)
    - jsd: D = β KL(p_teacher ‖ m) + (1 − β) KL(p_student ‖ m), m = β p_teacher + (1 − β) p_student

    Nothing is averaged: the caller puts the divisor into `token_weight`.

    Args:
        student_hidden, student_weight: [N, Ds] and [V, Ds], any strides.
        teacher_hidden, teacher_weight: [N, Dt] and [V', Dt]; constants.
        token_weight: [N] floating point, w; a constant. None = 1 everywhere. Rows of weight 0 are not projected; they
            contribute exact zeros whatever they hold, NaN included.
        rows: [M] int64, the rows to use; a row named twice counts twice. None = the rows of non-zero weight, which costs one
            host sync (none if there is no `token_weight` either).
        temperature: t > 0.
        divergence: "forward_kl" | "reverse_kl" | "jsd".
        beta: 0 < β < 1, for "jsd" only.
        vocab_size: use the first `vocab_size` rows of both weights and biases; required where V and V' differ (padded
            embeddings). The rest gets exact-zero gradient.
        student_bias, teacher_bias: [V] and [V']. A bias of -inf bans a token (a softcap brings it back). Where only one
            model bans a token on which the other has mass, the loss is of the order of 1e30, not +inf, its gradient finite.
        student_softcap, teacher_softcap: tanh cap c > 0 on the scaled logits; None = none.
        student_logit_scale, teacher_logit_scale: factor on the logits.
        chunk_rows: rows projected at a time; None = a fixed function of V, Ds and the dtype. Only rounding depends on it.
        impl: "auto" | "triton" | "reference". Triton: chunks of rows, one kernel on their logits between matrix products,
            gradients computed in the forward; auto takes it on NVIDIA GPUs, and on a CPU the same chunks in plain torch.
            "reference": the specification, which holds all logits.

    Returns:
        loss: scalar, fp32 (fp64 when computing in fp64). per_token: [N], t² D of each row without its weight, 0 where a row
        was not used; detached.

    Gradients: student_hidden, student_weight and student_bias where they require them, in their own dtype. Differentiable
    once: what is made with `create_graph=True` is a constant or raises when it is differentiated (not with
    impl="reference"). Deterministic, unless `rows` names one row more than twice on a GPU.

    Numerics: operands are rounded to autocast's dtype when it is active (fp32 parameters are fine then), otherwise all
    tensors must share one dtype. Logits, losses and accumulators are fp32 (fp64 for fp64). NaN in a row of non-zero weight
    makes the loss NaN. In fp16 the reverse KL's gradient with respect to a logit is clamped, at 65504 · t · max|w| or above.

    Memory, beside the gradients that were asked for (dW in fp32 until the backward) and casts of the weights (on a CPU those
    of 16 bits are widened): scratch for one chunk of rows, at most 2 GiB, and on a CPU about as much as the larger of 128
    MiB and dW; nothing grows with N · V. Under `no_grad` no gradient is computed.

    Raises:
        ValueError, TypeError: naming the argument; for instance a teacher tensor that requires grad, vocabularies that
            differ without `vocab_size`, a DTensor.
    """
    op = "linear_kl"
    student = head(op, "student_", student_hidden, student_weight, student_bias, student_softcap, student_logit_scale)
    teacher = head(op, "teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    for name, tensor in (("hidden", teacher.hidden), ("weight", teacher.weight), ("bias", teacher.bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op}: teacher_{name} requires grad, but the teacher is a constant; pass it .detach()-ed")
    N = len(student_hidden)
    if len(teacher_hidden) != N:
        raise ValueError(f"{op}: student_hidden has {N} rows but teacher_hidden has {len(teacher_hidden)}")
    if vocab_size is None and len(student_weight) != len(teacher_weight):
        raise ValueError(
            f"{op}: student_weight has {len(student_weight)} rows but teacher_weight has {len(teacher_weight)}; "
            "compare the two tokenizers and pass vocab_size= (the number of tokens that they share)"
        )
    student, teacher = first_tokens(op, student, vocab_size), first_tokens(op, teacher, vocab_size)
    if divergence not in _DIVERGENCES:
        raise ValueError(f"{op}: divergence must be one of {', '.join(map(repr, _DIVERGENCES))}, got {divergence!r}")
    if divergence == "jsd" and (beta is None or not 0 < beta < 1):
        raise ValueError(
            f"{op}: divergence='jsd' needs 0 < beta < 1, got {beta}; the ends are forward_kl and reverse_kl"
        )
    if divergence != "jsd" and beta is not None:
        raise ValueError(f"{op}: beta={beta} has no meaning for divergence={divergence!r}; it belongs to 'jsd'")
    check_numbers(op, temperature, chunk_rows)
    device = student_hidden.device
    check_device(op, device, teacher_hidden=teacher_hidden, token_weight=token_weight, rows=rows)
    dtype = compute_dtype(op, device, **named("student_", student), **named("teacher_", teacher))
    rows, row_weight = useful_rows(op, N, token_weight, rows, dtype, device)

    how = implementation(op, impl, device, dtype)
    arguments = (student, teacher, rows, row_weight, temperature, divergence, beta or 0.0, dtype)
    with torch.autocast(device.type, enabled=False):
        if how == "specification":
            loss, values = linear_kl_reference(*arguments)
        else:
            loss, values = linear_kl_fused(*arguments, chunk_rows, triton=how == "triton")
    return LinearKLOutput(loss, scatter(N, rows, row_weight, values))


def linear_kl_topk(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_logprobs: torch.Tensor,
    *,
    token_weight: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    temperature: float = 1.0,
    tail: str = "bucket",
    vocab_size: int | None = None,
    student_bias: torch.Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    impl: str | Impl = "auto",
) -> LinearKLTopkOutput:
    """Forward KL from a teacher of whom only the K most probable tokens of each row are known, without student logits.

    loss = Σ_n w_n t² D_n, with p_k the teacher's and q_k the student's probabilities of the K tokens at temperature t:

    - bucket: D = Σ_k p_k (log p_k − log q_k) + τ (log τ − log σ), τ = 1 − Σ_k p_k and σ = 1 − Σ_k q_k: the KL of K + 1
      outcomes, the last of which is "any other token". Never more than the full KL, and 0 if q = p.
    - renormalise: D = Σ_k p̂_k (log p̂_k − log q̂_k), p̂ = p / Σ_k p_k and q̂ = q / Σ_k q_k: the KL given that the token is one
      of the K. What the student does beside them is left free.

    Args:
        student_hidden, student_weight: [N, D] and [V, D], any strides.
        topk_ids: [N, K] int64, distinct in a row, in [0, V) (`vocab_size` if given); −1 = padding.
        topk_logprobs: [N, K] floating point: log-softmax of the teacher's logits / t at these ids, over all tokens that the
            student has too (cut logits of padded embeddings off before the softmax); a constant. Not looked at where the id
            is −1.
        token_weight, rows, temperature, vocab_size, student_bias, student_softcap, student_logit_scale, chunk_rows, impl: as
            in `linear_kl`.
        tail: "bucket" | "renormalise".

    Returns:
        loss: scalar, fp32 (fp64 when computing in fp64). per_token: [N], t² D of each row without its weight; detached.
        covered_mass: [N], Σ_k p_k, how much of the teacher the K tokens are. Both are 0 where a row was not used.

    Gradients, numerics, memory and errors as in `linear_kl`. σ is summed over the other tokens, not subtracted from 1, so a
    student that is sure of the K tokens has exact gradients too. An id outside the vocabulary raises a RuntimeError on a
    CPU and trips a device-side assertion on a GPU.
    """
    op = "linear_kl_topk"
    student = head(op, "student_", student_hidden, student_weight, student_bias, student_softcap, student_logit_scale)
    student = first_tokens(op, student, vocab_size)
    N, device = len(student_hidden), student_hidden.device
    check_dtype(op, "topk_ids", check_tensor(op, "topk_ids", topk_ids, 2), torch.int64)
    check_shape(op, "topk_ids", topk_ids, (N, topk_ids.shape[1]), "to match student_hidden [N, D]")
    check_tensor(op, "topk_logprobs", topk_logprobs, 2)
    check_shape(op, "topk_logprobs", topk_logprobs, tuple(topk_ids.shape), "to match topk_ids [N, K]")
    check_floating(op, topk_logprobs=topk_logprobs)
    if topk_logprobs.requires_grad:
        raise ValueError(f"{op}: topk_logprobs requires grad, but the teacher is a constant; pass it .detach()-ed")
    if tail not in _TAILS:
        raise ValueError(f"{op}: tail must be one of {', '.join(map(repr, _TAILS))}, got {tail!r}")
    check_numbers(op, temperature, chunk_rows)
    check_device(op, device, topk_ids=topk_ids, topk_logprobs=topk_logprobs, token_weight=token_weight, rows=rows)
    dtype = compute_dtype(op, device, **named("student_", student))
    rows, row_weight = useful_rows(op, N, token_weight, rows, dtype, device)
    # Padding where a row has no weight: what it holds does not matter
    ids = torch.where(row_weight[:, None] != 0, topk_ids if rows is None else topk_ids[rows], PADDING)
    logprobs = (topk_logprobs if rows is None else topk_logprobs[rows]).to(row_weight.dtype)
    covered = torch.where(ids != PADDING, logprobs.exp(), 0).sum(1)

    how = implementation(op, impl, device, dtype)
    arguments = (student, ids, logprobs, rows, row_weight, temperature, tail == "bucket", dtype)
    with torch.autocast(device.type, enabled=False):
        if how == "specification":
            loss, values = linear_kl_topk_reference(*arguments)
        else:
            loss, values = linear_kl_topk_fused(*arguments, chunk_rows, triton=how == "triton")
    return LinearKLTopkOutput(loss, *(scatter(N, rows, row_weight, x) for x in (values, covered)))


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    token_weight: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    impl: str | Impl = "auto",
) -> LinearCrossEntropyOutput:
    """Cross-entropy of a linear head's next-token distribution, without ever holding its logits.

    loss = Σ_n w_n · (−log softmax(z_n)[label_n]), z = softcap(logit_scale · (h Wᵀ + b)). Nothing is averaged: the caller
    puts the divisor into `token_weight`. A label belongs to its own row: shift before.

    Args:
        hidden, weight: [N, D] and [V, D], any strides.
        labels: [N] int64 in [0, V), or −100, which means weight 0. Not looked at where the weight is 0.
        token_weight: [N] floating point, a constant; None = 1 everywhere. As in `linear_kl`.
        rows: [M] int64, the rows to use. None = the rows of non-zero weight and a label, which costs one host sync.
        bias: [V]. softcap: tanh cap c > 0 on the scaled logits. logit_scale: factor on the logits.
        vocab_size: use the first `vocab_size` rows of weight and bias (padded embeddings).
        chunk_rows, impl: as in `linear_kl`.

    Returns:
        loss: scalar, fp32 (fp64 when computing in fp64). per_token: [N], the cross-entropy of each row without its weight, 0
        where a row was not used; detached.

    Gradients: hidden, weight and bias where they require them; a frozen weight costs neither the buffer nor the product of
    its gradient. Numerics, memory, determinism and errors as in `linear_kl`. A label outside [0, V) raises a RuntimeError on
    a CPU and trips a device-side assertion on a GPU.
    """
    op = "linear_cross_entropy"
    check_numbers(op, 1.0, chunk_rows)
    linear = first_tokens(op, head(op, "", hidden, weight, bias, softcap, logit_scale), vocab_size)
    N, device = len(hidden), hidden.device
    check_dtype(op, "labels", check_tensor(op, "labels", labels, 1), torch.int64)
    check_shape(op, "labels", labels, (N,), "to match hidden [N, D]")
    check_device(op, device, labels=labels, token_weight=token_weight, rows=rows)
    dtype = compute_dtype(op, device, **named("", linear))
    labelled = (labels != -100).to(accumulator_dtype(dtype))
    if token_weight is not None:
        check_token_weight(op, N, token_weight)
        labelled = torch.where(labelled != 0, token_weight.to(labelled.dtype), 0)
    rows, row_weight = useful_rows(op, N, labelled, rows, dtype, device)
    row_labels = torch.where(row_weight != 0, labels[rows], 0)

    how = implementation(op, impl, device, dtype)
    with torch.autocast(device.type, enabled=False):
        if how == "specification":
            loss, values = linear_cross_entropy_reference(linear, row_labels, rows, row_weight, dtype)
        else:
            # A teacher that gives the label all of its mass. A negative label is beyond the vocabulary, not padding.
            ids = torch.where(row_labels < 0, len(linear.weight), row_labels)[:, None]
            loss, values = linear_kl_topk_fused(
                linear, ids, torch.zeros_like(ids, dtype=row_weight.dtype), rows, row_weight, 1.0, True, dtype, chunk_rows,
                triton=how == "triton",
            )  # fmt: skip
    return LinearCrossEntropyOutput(loss, scatter(N, rows, row_weight, values))
