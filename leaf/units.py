"""Teacher and student with different tokenizers: their tokens joined to the text units that both can express.

A unit is a piece of text that both models read in whole tokens, and that no smaller ones make up. E1 of a unit is the norm
of the loss's gradient with respect to all of its embeddings together: √Σ‖g‖² over its tokens, the norm of their gradients
written one after the other, and the token's own norm where the unit is one token.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .data import Encoder, Sample, Skip, Span
from .prune import characters
from .sensitivity import Sensitivity


class Pair(NamedTuple):
    """One text as each model reads it: the same sample twice where they have one tokenizer."""

    teacher: Sample
    student: Sample


def read_pairs(samples: Iterable[Sample | Skip], reader: Encoder | None = None) -> Iterator[Pair | Skip]:
    """The student's samples beside the teacher's; a skip of one is a skip of both.

    Args:
        reader: `Encoder.read_by` of the teacher's tokenizer; None where both models have one tokenizer.
    """
    for sample in samples:
        if isinstance(sample, Skip):
            yield sample
        elif reader is None:
            yield Pair(sample, sample)
        elif isinstance(read := reader.read(sample), Skip):
            yield read
        elif any(on_units(pair := Pair(read, sample)).scored):
            yield pair
        else:
            yield Skip(sample.id, "no_common_unit", "no text unit of both tokenizers may be scored as a whole")


def text_units(*tokenisations: Sequence[Span]) -> list[Span]:
    """The character ranges of the units of one text, in order.

    Positions are boundaries where a token of any tokenisation starts or ends and none goes on. So the units are the runs
    of tokens, of all tokenisations together, that share characters: the tokens themselves where all agree. Text without a
    token is in no unit, and a token without text neither.
    """
    tokens = sorted((start, end) for offsets in tokenisations for start, end in offsets if start < end)
    return [(tokens[first][0], max(end for _, end in tokens[first:last])) for first, last in characters(tokens)]


def on_units(pair: Pair) -> Sample:
    """The student's sample with a unit wherever it has a token, and no ids.

    A unit is scored where it holds tokens of both models and all of them are scored.
    """
    units = text_units(pair.teacher.offsets, pair.student.offsets)
    scored = [end <= pair.student.prompt_chars for _, end in units]
    for sample in pair:
        places = _unit_of(sample, units)
        for n, of_token in zip(places, sample.scored):
            if n is not None:
                scored[n] &= of_token
        held = set(places)
        scored = [each and n in held for n, each in enumerate(scored)]
    response_start = sum(start < pair.student.prompt_chars for start, _ in units)
    return dataclasses.replace(pair.student, input_ids=[], offsets=units, response_start=response_start, scored=scored)


def per_unit(sensitivity: Sensitivity, sample: Sample, units: Sequence[Span]) -> Sensitivity:
    """What was measured token by token, on units: √Σ norm² and Σ −log p, summed in fp64."""
    places = _unit_of(sample, units)
    tokens = torch.tensor([i for i, n in enumerate(places) if n is not None], dtype=torch.long)
    index = torch.tensor([n for n in places if n is not None], dtype=torch.long)

    def total(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(units), dtype=torch.float64).index_add_(0, index, values.double()[tokens])

    norm, nll = sensitivity.norm, sensitivity.nll
    # The square of an fp32 number is exact in fp64, and so is its root: a unit of one token keeps its norm to the bit.
    joined = total(norm.double() ** 2).sqrt().to(norm.dtype)
    return Sensitivity(joined, sensitivity.loss, None if nll is None else total(nll).to(nll.dtype))


def _unit_of(sample: Sample, units: Sequence[Span]) -> list[int | None]:
    """The unit of each token; None for a token without text."""
    starts = [start for start, _ in units]
    return [bisect.bisect_right(starts, start) - 1 if start < end else None for start, end in sample.offsets]


def token_ids(row: Mapping[str, Any]) -> list[int]:
    """The ids of a row of the scores table.

    Raises:
        ValueError: it has none, because its scores belong to text units, or were read from the released format.
    """
    if row["input_ids"] is None:
        raise ValueError(
            f"row {row['id']!r} has scores but no input_ids: its teacher and student have different tokenizers, or it comes "
            "from a file of the released format; training and attention need rows that were scored with one tokenizer"
        )
    return list(row["input_ids"])
