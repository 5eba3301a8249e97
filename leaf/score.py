"""Stage 1: how sensitive each model's loss is to each prompt token (E1), and the confounder score (E2, E3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from leaf_kernels import token_scores

from .data import Encoder, Sample, Skip
from .generate import Loader, free_memory
from .sensitivity import Sensitivity, sensitivities
from .units import Pair, on_units, per_unit, read_pairs

# Of the scores table, after those that every row has
_COLUMNS = (
    *("text", "prompt_chars", "input_ids", "offsets", "response_start", "scored"),
    *("teacher_norm", "student_norm", "score", "teacher_loss", "student_loss", "student_nll"),
)


def score_samples(
    samples: Iterable[Sample | Skip],
    load_teacher: Loader,
    load_student: Loader,
    *,
    max_tokens: int,
    perplexity: bool = False,
    activation_checkpointing: bool | None = None,
    reader: Encoder | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the scores table, one per sample or skip, in order.

    One model is resident at a time: the teacher is loaded, used and freed before the student is loaded.

    Args:
        load_teacher, load_student: return a model on the device to use.
        max_tokens: budget of a pack; a longer sample gets a pack of its own.
        perplexity: also record the student's −log p of each scored token, for the perplexity control.
        reader: `Encoder.read_by` of the teacher's tokenizer where it is not the student's: rows hold text units then.
    """
    items = list(read_pairs(samples, reader))
    usable = [item for item in items if isinstance(item, Pair)]
    results = []
    options: dict[str, Any] = {"max_tokens": max_tokens, "activation_checkpointing": activation_checkpointing}
    for role, load, wants_nll in (("teacher", load_teacher, False), ("student", load_student, perplexity)):
        own = [getattr(pair, role) for pair in usable]
        results.append(list(sensitivities(load(), own, perplexity=wants_nll, **options)))
        free_memory()
    scored = (score_pair(*each) for each in zip(usable, *results))
    for item in items:
        yield next(scored) if isinstance(item, Pair) else skipped_row(item)


def score_pair(pair: Pair, teacher: Sensitivity | Skip, student: Sensitivity | Skip) -> dict[str, Any]:
    """A row of the scores table, on the tokens of both models where they are the same, else on text units, without ids."""
    if pair.teacher is pair.student or isinstance(teacher, Skip) or isinstance(student, Skip):
        return score_row(pair.student, teacher, student)
    sample = on_units(pair)
    measured = (per_unit(one, own, sample.offsets) for one, own in zip((teacher, student), pair))
    return {**score_row(sample, *measured), "input_ids": None}


def score_row(sample: Sample, teacher: Sensitivity | Skip, student: Sensitivity | Skip) -> dict[str, Any]:
    """A row of the scores table: E2 and E3 on the two norms; skipped where a model could not measure it."""
    if isinstance(teacher, Skip) or isinstance(student, Skip):
        return skipped_row(teacher if isinstance(teacher, Skip) else student, sample)  # type: ignore[arg-type]
    scored = torch.tensor(sample.scored)
    result = token_scores(
        teacher.norm[:, None], student.norm[:, None], torch.tensor([0, len(scored)], dtype=torch.int32), scored=scored
    )
    finite = bool(result.score[scored].isfinite().all())

    def column(values: torch.Tensor | None) -> list[float | None] | None:
        return None if values is None else [v if s else None for v, s in zip(values.tolist(), sample.scored)]

    return {
        **_identity(sample),
        **({} if finite else {"status": "skipped", "reason": "non_finite", "detail": "a gradient is infinite or NaN"}),
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


def skipped_row(skip: Skip, sample: Sample | None = None) -> dict[str, Any]:
    """The row of the scores table that accounts for an input row, or one of its samples, which could not be used."""
    why = {"status": "skipped", "reason": skip.reason, "detail": skip.detail}
    return {**_identity(sample or skip), **why, **dict.fromkeys(_COLUMNS)}


def _identity(item: Sample | Skip) -> dict[str, Any]:
    level, cut = getattr(item, "level", "instruction"), getattr(item, "cut", 0)
    return {"id": item.id, "level": level, "cut": cut, "status": "ok", "reason": None, "detail": None}
