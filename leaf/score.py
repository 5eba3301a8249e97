"""Stage 1: how sensitive each model's loss is to each prompt token (E1), and the confounder score (E2, E3)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from leaf_kernels import SharedPrefixLayout, linear_cross_entropy, token_scores
from leaf_kernels.integrations.transformers import NAME, check_model, register

from .data import Sample, Skip
from .objective import check_head, head_of, hidden_states

logger = logging.getLogger(__name__)

Loader = Callable[[], PreTrainedModel]


class HasTokens(Protocol):
    @property
    def input_ids(self) -> list[int]: ...


Item = TypeVar("Item", bound=HasTokens)

# Of the scores table, after those that every row has
_COLUMNS = (
    *("text", "prompt_chars", "input_ids", "offsets", "response_start", "scored"),
    *("teacher_norm", "student_norm", "score", "teacher_loss", "student_loss", "student_nll"),
)


class Sensitivity(NamedTuple):
    """One model on one sample."""

    norm: torch.Tensor  # [n] fp32, ‖d loss / d embedding‖ at every position; only scored ones are meaningful
    loss: float  # mean cross-entropy of the response tokens, end of turn included
    nll: torch.Tensor | None  # [n] fp32, −log p of each scored token given what precedes it; None unless asked for


def score_samples(
    samples: Iterable[Sample | Skip],
    load_teacher: Loader,
    load_student: Loader,
    *,
    max_tokens: int,
    perplexity: bool = False,
    activation_checkpointing: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the scores table, one per sample or skip, in order.

    One model is resident at a time: the teacher is loaded, used and freed before the student is loaded.

    Args:
        load_teacher, load_student: return a model on the device to use.
        max_tokens: budget of a pack; a longer sample gets a pack of its own.
        perplexity: also record the student's −log p of each scored token, for the perplexity control.
        progress: called with the number of samples finished by a model (each sample counts twice in all).
    """
    items = list(samples)
    usable = [item for item in items if isinstance(item, Sample)]
    results = []
    for load, wants_nll in ((load_teacher, False), (load_student, perplexity)):
        model = load()
        results.append(
            list(
                sensitivities(
                    model,
                    usable,
                    max_tokens=max_tokens,
                    perplexity=wants_nll,
                    activation_checkpointing=activation_checkpointing,
                    progress=progress,
                )
            )
        )
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    scored = (score_row(*each) for each in zip(usable, *results))
    for item in items:
        yield next(scored) if isinstance(item, Sample) else skipped_row(item)


def sensitivities(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    perplexity: bool = False,
    activation_checkpointing: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Sensitivity]:
    """E1 for one model, in order. Samples are packed, never mixed: the loss of a pack is the sum of its samples' means.

    No parameter ever has a gradient: weights are frozen and the loss is differentiated with respect to detached embeddings.
    Logits are never held for more than a chunk of the response rows. The model is left frozen, in eval mode, on
    `attn_implementation="leaf"` and, where asked, with activation checkpointing on.
    """
    register()
    check_model(model)
    model.set_attn_implementation(NAME)
    model.requires_grad_(False).eval()
    check_head(model)
    if activation_checkpointing and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # checkpoints in train mode only; its children stay in eval mode: no dropout
    for batch in batches(samples, max_tokens):
        yield from _pack_sensitivities(model, batch, perplexity)
        if progress is not None:
            progress(len(batch))


def batches(items: Sequence[Item], max_tokens: int) -> Iterator[list[Item]]:
    """Consecutive items with at most `max_tokens` tokens together; a longer one gets a batch of its own."""
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and size + len(item.input_ids) > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item.input_ids)
    if batch:
        yield batch


def _pack_sensitivities(model: PreTrainedModel, batch: Sequence[Sample], perplexity: bool) -> Iterator[Sensitivity]:
    device = model.device
    lengths = [len(s.input_ids) for s in batch]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    layout = SharedPrefixLayout.from_lengths(lengths).to(device)
    input_ids = torch.tensor([i for s in batch for i in s.input_ids], device=device)
    labels = input_ids.roll(
        -1
    )  # the last row of a sample would predict the next sample's first token: it is never used

    # The row that predicts a token is the one before it.
    rows, weights = [], []
    for start, length, sample in zip(starts, lengths, batch):
        targets = length - sample.response_start
        rows.append(torch.arange(start + sample.response_start - 1, start + length - 1))
        weights.append(torch.full((targets,), 1 / targets))
    response_rows = torch.cat(rows).to(device)
    token_weight = torch.zeros(len(input_ids), device=device).index_copy_(
        0, response_rows, torch.cat(weights).to(device)
    )

    embeddings = model.get_input_embeddings()(input_ids[None]).detach().requires_grad_()
    inputs = {"inputs_embeds": embeddings, "position_ids": layout.position_ids[None], "layout": layout}
    head = head_of(model)
    options: dict[str, Any] = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
    with torch.enable_grad():
        hidden = hidden_states(model, inputs)
        loss, per_token = linear_cross_entropy(
            hidden, head.weight, labels, token_weight=token_weight, rows=response_rows, **options
        )
        (gradient,) = torch.autograd.grad(loss, embeddings)
    norm = torch.linalg.vector_norm(gradient[0], dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    nll = None
    if perplexity:
        prompt = torch.tensor([i for s in batch for i in s.scored], device=device)
        prompt_rows = (prompt & (layout.position_ids > 0)).nonzero().squeeze(1) - 1
        with torch.no_grad():
            nll = linear_cross_entropy(hidden.detach(), head.weight, labels, rows=prompt_rows, **options)[1]
        nll = nll.roll(1).cpu()  # from the predicting row to the predicted token
    losses = torch.stack([x.sum() for x in (per_token * token_weight).split(lengths)]).tolist()
    norm = norm.cpu()
    for i, (start, length) in enumerate(zip(starts, lengths)):
        here = slice(start, start + length)
        yield Sensitivity(norm[here], losses[i], None if nll is None else nll[here])


def score_row(sample: Sample, teacher: Sensitivity, student: Sensitivity) -> dict[str, Any]:
    """A row of the scores table: E2 and E3 on the two norms."""
    scored = torch.tensor(sample.scored)
    result = token_scores(
        teacher.norm[:, None], student.norm[:, None], torch.tensor([0, len(scored)], dtype=torch.int32), scored=scored
    )
    finite = bool(result.score[scored].isfinite().all())

    def column(values: torch.Tensor | None) -> list[float | None] | None:
        return None if values is None else [v if s else None for v, s in zip(values.tolist(), sample.scored)]

    return {
        **_identity(sample, "ok" if finite else "skipped", None if finite else "non_finite"),
        "text": sample.text,
        "prompt_chars": sample.prompt_chars,
        "input_ids": sample.input_ids,
        "offsets": [list(o) for o in sample.offsets],
        "response_start": sample.response_start,
        "scored": sample.scored,
        "teacher_norm": column(teacher.norm),
        "student_norm": column(student.norm),
        "score": column(result.score),
        "teacher_loss": teacher.loss,
        "student_loss": student.loss,
        "student_nll": column(student.nll),
    }


def skipped_row(skip: Skip) -> dict[str, Any]:
    """The row of the scores table that accounts for an input row which could not be used."""
    return {**_identity(skip, "skipped", skip.reason), **dict.fromkeys(_COLUMNS)}


def _identity(item: Sample | Skip, status: str, reason: str | None) -> dict[str, Any]:
    level, cut = getattr(item, "level", "instruction"), getattr(item, "cut", 0)
    return {"id": item.id, "level": level, "cut": cut, "status": status, "reason": reason}
