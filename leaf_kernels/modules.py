"""The losses as modules without parameters: Liger's order of arguments, hidden states of any leading shape, a mean."""

from __future__ import annotations

import torch

from . import linear_cross_entropy, linear_kl
from ._runtime.checks import check_shape, check_tensor
from .types import Impl


class _LinearLoss(torch.nn.Module):
    """Around the op of both losses: −100 in the labels masks a token, and the sum is divided by the number of the others."""

    def __init__(self, reduction: str, **options: object):
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"{type(self).__name__}: reduction must be 'mean' or 'sum', got {reduction!r}")
        self.reduction = reduction
        self.options = options

    def _reduce(self, loss: torch.Tensor, labels: torch.Tensor | None, tokens: int) -> torch.Tensor:
        if self.reduction == "sum":
            return loss
        return loss / (max(tokens, 1) if labels is None else (labels != -100).sum().clamp_min(1))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {"reduction": self.reduction, **self.options}.items())


def _check_labels(module: str, name: str, labels: torch.Tensor | None, tokens: tuple[int, ...]) -> None:
    if labels is None:
        return
    check_shape(module, name, check_tensor(module, name, labels, len(tokens)), tokens, "to match the hidden states")
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise TypeError(
            f"{module}: {name} must be labels, in which −100 masks a token, got {labels.dtype}; of a mask make them with "
            "torch.where(mask, labels, -100)"
        )


class LinearKLLoss(_LinearLoss):
    """`linear_kl` in place of `LigerFusedLinearJSD`.

        loss = LinearKLLoss(temperature=2.0)
        loss(student_hidden, student_weight, teacher_hidden, teacher_weight, shift_labels)

    The default is the forward KL, Liger's a JSD with `jsd_beta=0.5`: here `divergence="jsd", beta=0.5`. Its `jsd_beta` 0 and
    1 are "forward_kl" and "reverse_kl". Unlike Liger's, the loss has the factor t², which keeps gradients of one size
    whatever the temperature.

    Args:
        temperature, divergence, beta: as in `linear_kl`, like all that follows `reduction`.
        reduction: "mean" over the tokens of a call that are not masked (0 if all are), or "sum", to be divided by the tokens
            of all micro-batches.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        beta: float | None = None,
        reduction: str = "mean",
        vocab_size: int | None = None,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        chunk_rows: int | None = None,
        impl: str | Impl = "auto",
    ):
        super().__init__(
            reduction,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            vocab_size=vocab_size,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            chunk_rows=chunk_rows,
            impl=impl,
        )

    def forward(
        self,
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        student_bias: torch.Tensor | None = None,
        teacher_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scalar loss, fp32 (fp64 for fp64). Gradients: student_hidden, student_weight, student_bias.

        student_hidden, teacher_hidden: [..., Ds] and [..., Dt]. student_weight, teacher_weight: [V, Ds] and [V', Dt]; the
        teacher's tensors are used detached. shift_labels: [...] integers, of which only −100, "masked", has a meaning; None
        = all tokens. With labels, one host sync.
        """
        name, tokens = type(self).__name__, tuple(student_hidden.shape[:-1])
        check_shape(
            name, "teacher_hidden", teacher_hidden, (*tokens, teacher_hidden.shape[-1]), "as student_hidden [..., Ds]"
        )
        _check_labels(name, "shift_labels", shift_labels, tokens)
        weights = None if shift_labels is None else (shift_labels != -100).flatten().to(torch.float32)
        loss, per_token = linear_kl(
            student_hidden.flatten(0, -2),
            student_weight,
            teacher_hidden.detach().flatten(0, -2),
            teacher_weight.detach(),
            token_weight=weights,
            student_bias=student_bias,
            teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
            **self.options,  # type: ignore[arg-type]
        )
        return self._reduce(loss, shift_labels, len(per_token))


class LinearCrossEntropyLoss(_LinearLoss):
    """`linear_cross_entropy` in place of `LigerFusedLinearCrossEntropyLoss`: the weight comes first.

        loss = LinearCrossEntropyLoss()
        loss(lm_head.weight, hidden[:, :-1], labels[:, 1:])

    Args:
        softcap, logit_scale, vocab_size, chunk_rows, impl: as in `linear_cross_entropy`.
        reduction: "mean" over the labels that are not −100 (0 if all are), or "sum".
    """

    def __init__(
        self,
        *,
        reduction: str = "mean",
        softcap: float | None = None,
        logit_scale: float = 1.0,
        vocab_size: int | None = None,
        chunk_rows: int | None = None,
        impl: str | Impl = "auto",
    ):
        super().__init__(
            reduction,
            softcap=softcap,
            logit_scale=logit_scale,
            vocab_size=vocab_size,
            chunk_rows=chunk_rows,
            impl=impl,
        )

    def forward(
        self, weight: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scalar loss, fp32 (fp64 for fp64). Gradients: weight, hidden, bias.

        weight: [V, D]. hidden: [..., D]. labels: [...] int64, −100 = masked; a label belongs to its own token: shift before.
        One host sync.
        """
        _check_labels(type(self).__name__, "labels", labels, tuple(hidden.shape[:-1]))
        loss, _ = linear_cross_entropy(
            hidden.flatten(0, -2),
            weight,
            labels.flatten(),
            bias=bias,
            **self.options,  # type: ignore[arg-type]
        )
        return self._reduce(loss, labels, labels.numel())
