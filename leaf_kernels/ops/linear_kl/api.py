"""`linear_kl` and `linear_cross_entropy`: what a user reads."""

from __future__ import annotations

import math

import torch

from ..._runtime.checks import check_device, check_dtype, check_floating, check_shape, check_tensor, compute_dtype
from ..._runtime.dispatch import resolve_impl
from ...types import Impl, LinearCrossEntropyOutput, LinearKLOutput
from .chunked import linear_cross_entropy_chunked, linear_kl_chunked
from .head import Head, accumulator_dtype
from .reference import linear_cross_entropy_reference, linear_kl_reference

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


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
        impl: "auto" | "reference" | "triton". Auto without a Triton kernel: chunks of rows, gradients computed in the
            forward. "reference": the specification, which holds all logits.

    Returns:
        loss: scalar, fp32 (fp64 when computing in fp64). per_token: [N], t² D of each row without its weight, 0 where a row
        was not used; detached.

    Gradients: student_hidden, student_weight and student_bias where they require them, in their own dtype. Differentiable
    once: a gradient made with `create_graph=True` is a constant (not with impl="reference"). The auto path is deterministic.

    Numerics: operands are rounded to autocast's dtype when it is active (fp32 parameters are fine then), otherwise all
    tensors must share one dtype. Logits, losses and accumulators are fp32 (fp64 for fp64).

    Memory: scratch of the larger of 128 MiB and the fp32 weight gradient, at most 2 GiB, plus the gradients that were asked
    for; nothing grows with N · V. Under `no_grad` no gradient is computed.

    Raises:
        ValueError, TypeError: naming the argument; for instance a teacher tensor that requires grad, vocabularies that
            differ without `vocab_size`, a DTensor.
    """
    op = "linear_kl"
    student = _head(op, "student_", student_hidden, student_weight, student_bias, student_softcap, student_logit_scale)
    teacher = _head(op, "teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
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
    student, teacher = _slice(op, student, vocab_size), _slice(op, teacher, vocab_size)
    if divergence not in _DIVERGENCES:
        raise ValueError(f"{op}: divergence must be one of {', '.join(map(repr, _DIVERGENCES))}, got {divergence!r}")
    if divergence == "jsd" and (beta is None or not 0 < beta < 1):
        raise ValueError(
            f"{op}: divergence='jsd' needs 0 < beta < 1, got {beta}; the ends are forward_kl and reverse_kl"
        )
    if divergence != "jsd" and beta is not None:
        raise ValueError(f"{op}: beta={beta} has no meaning for divergence={divergence!r}; it belongs to 'jsd'")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be at least 1, got {chunk_rows}")
    device = student_hidden.device
    check_device(op, device, teacher_hidden=teacher_hidden, token_weight=token_weight, rows=rows)
    dtype = compute_dtype(op, device, **_named("student_", student), **_named("teacher_", teacher))
    rows, row_weight = _useful_rows(op, N, token_weight, rows, dtype, device)

    resolve_impl(op, impl, device)  # refuses what cannot be served; the Triton kernel is still to come
    arguments = (student, teacher, rows, row_weight, temperature, divergence, beta or 0.0, dtype)
    with torch.autocast(device.type, enabled=False):
        if Impl(impl) is Impl.REFERENCE:
            loss, values = linear_kl_reference(*arguments)
        else:
            loss, values = linear_kl_chunked(*arguments, chunk_rows)
    return LinearKLOutput(loss, _scatter(N, rows, row_weight, values))


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
        impl: as in `linear_kl`.

    Returns:
        loss: scalar, fp32 (fp64 when computing in fp64). per_token: [N], the cross-entropy of each row without its weight, 0
        where a row was not used; detached.

    Gradients: hidden, weight and bias where they require them; a frozen weight costs neither the buffer nor the product of
    its gradient. Numerics, memory, determinism and errors as in `linear_kl`. A label outside [0, V) raises a RuntimeError on
    a CPU and trips a device-side assertion on a GPU.
    """
    op = "linear_cross_entropy"
    head = _slice(op, _head(op, "", hidden, weight, bias, softcap, logit_scale), vocab_size)
    N, device = len(hidden), hidden.device
    check_dtype(op, "labels", check_tensor(op, "labels", labels, 1), torch.int64)
    check_shape(op, "labels", labels, (N,), "to match hidden [N, D]")
    check_device(op, device, labels=labels, token_weight=token_weight, rows=rows)
    dtype = compute_dtype(op, device, **_named("", head))
    labelled = (labels != -100).to(accumulator_dtype(dtype))
    if token_weight is not None:
        _check_token_weight(op, N, token_weight)
        labelled = torch.where(labelled != 0, token_weight.to(labelled.dtype), 0)
    rows, row_weight = _useful_rows(op, N, labelled, rows, dtype, device)
    row_labels = torch.where(row_weight != 0, labels[rows], 0)

    resolve_impl(op, impl, device)  # refuses what cannot be served; the Triton kernel is still to come
    implementation = linear_cross_entropy_reference if Impl(impl) is Impl.REFERENCE else linear_cross_entropy_chunked
    with torch.autocast(device.type, enabled=False):
        loss, values = implementation(head, row_labels, rows, row_weight, dtype)
    return LinearCrossEntropyOutput(loss, _scatter(N, rows, row_weight, values))


def _head(
    op: str,
    prefix: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Head:
    check_tensor(op, f"{prefix}hidden", hidden, 2)
    check_tensor(op, f"{prefix}weight", weight, 2)
    if bias is not None:
        check_tensor(op, f"{prefix}bias", bias, 1)
    tensors = {f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias}
    check_floating(op, **tensors)
    check_device(op, hidden.device, **tensors)
    if weight.numel() == 0:
        raise ValueError(
            f"{op}: {prefix}weight is empty, got shape {tuple(weight.shape)}; gather it if it is sharded (FSDP, ZeRO-3)"
        )
    check_shape(op, f"{prefix}weight", weight, (len(weight), hidden.shape[1]), f"to match {prefix}hidden [N, D]")
    if bias is not None:
        check_shape(op, f"{prefix}bias", bias, (len(weight),), f"to match {prefix}weight [V, D]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: {prefix}softcap must be positive, got {softcap}; None means no cap")
    return Head(hidden, weight, bias, softcap, logit_scale)


def _slice(op: str, head: Head, vocab_size: int | None) -> Head:
    """The head of the first `vocab_size` tokens."""
    if vocab_size is None:
        return head
    V = len(head.weight)
    if not 0 < vocab_size <= V:
        raise ValueError(f"{op}: vocab_size must be between 1 and the {V} rows of the smaller weight, got {vocab_size}")
    return head._replace(weight=head.weight[:vocab_size], bias=None if head.bias is None else head.bias[:vocab_size])


def _named(prefix: str, head: Head) -> dict[str, torch.Tensor | None]:
    return {f"{prefix}hidden": head.hidden, f"{prefix}weight": head.weight, f"{prefix}bias": head.bias}


def _check_token_weight(op: str, N: int, token_weight: torch.Tensor) -> None:
    check_shape(
        op, "token_weight", check_tensor(op, "token_weight", token_weight, 1), (N,), "to match the hidden states"
    )
    check_floating(op, token_weight=token_weight)
    if token_weight.requires_grad:
        raise ValueError(f"{op}: token_weight requires grad, but it is a constant; pass it .detach()-ed")


def _useful_rows(
    op: str,
    N: int,
    token_weight: torch.Tensor | None,
    rows: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The rows to project, None = all of them, and their weights [M]."""
    if rows is not None:
        check_dtype(op, "rows", check_tensor(op, "rows", rows, 1), torch.int64)
    wide = accumulator_dtype(dtype)
    if token_weight is None:
        return rows, torch.ones(N if rows is None else len(rows), dtype=wide, device=device)
    _check_token_weight(op, N, token_weight)
    if rows is None:
        rows = token_weight.nonzero().squeeze(1)  # the one host sync of the contract
    return rows, token_weight[rows].to(wide)


def _scatter(N: int, rows: torch.Tensor | None, row_weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[N] per-token values, 0 on rows that were not used."""
    values = torch.where(row_weight != 0, values, 0)
    return values if rows is None else values.new_zeros(N).index_copy_(0, rows, values)
