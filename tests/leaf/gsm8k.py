"""GSM8K's rows as tests and benchmarks/packing.py use them: `import gsm8k`. `folder` is what LEAF_TEST_DATA names."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import tiny
import torch
from transformers import PreTrainedTokenizerFast

from leaf.data import Row, Sample, read_rows
from leaf.score import score_samples

TEMPLATE = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


def tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4000 tokens trained on a third of the training rows."""
    corpus = [record[field] for record in records(folder, "train")[::3] for field in record]
    return tiny.tokenizer(corpus=corpus, vocab_size=4000)


def records(folder: pathlib.Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def rows(folder: pathlib.Path, *splits: str) -> list[Row]:
    """All rows of the splits; none is skipped."""
    every = itertools.chain.from_iterable(records(folder, split) for split in splits)
    found = list(read_rows(every, prompt_template=TEMPLATE, response_column="answer"))
    assert all(isinstance(row, Row) for row in found)
    return found  # type: ignore[return-value]


def random_scores(sample: Sample, generator: torch.Generator) -> dict[str, Any]:
    """A row of the scores table whose scores mean nothing."""
    score = torch.rand(len(sample.scored), generator=generator).tolist()
    row = {**sample.__dict__, "status": "ok", "reason": None, "student_nll": None}
    return {**row, "score": [value if s else None for value, s in zip(score, sample.scored)]}


def model_scores(samples: Iterable[Sample], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """The scores table of two tiny models with random weights."""
    return list(
        score_samples(
            samples,
            lambda: tiny.model(tokenizer, hidden=32, seed=0),
            lambda: tiny.model(tokenizer, hidden=16, layers=1, seed=1),
            max_tokens=4096,
        )
    )
