"""GSM8K's 1319 test rows through read → encode → score → prune → pack: no row is lost on the way."""

from __future__ import annotations

import pathlib

import gsm8k
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from leaf.data import Encoder, Row, Sample
from leaf.graders import grade
from leaf.pack import build_groups, sequences
from leaf.prune import PruneConfig, delete, prune
from leaf_kernels import SharedPrefixLayout, pack_groups


@pytest.fixture(scope="module")
def tokenizer(test_data: pathlib.Path) -> PreTrainedTokenizerFast:
    return gsm8k.tokenizer(test_data)


def read(test_data: pathlib.Path) -> list[Row]:
    rows = gsm8k.rows(test_data, "test")
    assert len(rows) == 1319
    return rows


def check_and_report(rows: list[Row], scores: list[dict], config: PruneConfig, encoder: Encoder, level: str) -> None:
    """Laws that every counterfactual obeys, groups of all rows, and the figures of the pack."""
    by_key = {(s["id"], s["level"], s["cut"]): s for s in scores}
    counterfactuals = list(prune(scores, config))
    for row in counterfactuals:
        source = by_key[row["source_id"], row["level"], row["cut"]]
        prompt = source["text"][: source["prompt_chars"]]
        assert row["prompt"] == delete(prompt, row["removed"]) != prompt
        assert row["response"] == source["text"][source["prompt_chars"] :]
        assert gsm8k.TEMPLATE.removeprefix("{question}") in row["prompt"]  # the literal is never pruned
    groups = build_groups(scores, counterfactuals, encoder.encode_text)
    assert [g["id"] for g in groups] == [row.id for row in rows]
    members = [sequences(g) for g in groups if g["counterfactuals"]]
    separate = sum(len(ids) for group in members for ids in group)
    layout, input_ids = SharedPrefixLayout.from_groups(members)
    packed = len(input_ids)
    assert packed < separate
    assert layout.num_segments == sum(map(len, members))
    fill = packed / (8192 * len(pack_groups(members, 8192)))
    assert fill >= 0.95 or len(rows) < 1000, "a pack that is half empty counts among few"
    print(  # noqa: T201 - shown by pytest -s
        f"\nGSM8K, {level} level: {len(rows)} rows, {len(counterfactuals)} spans in {len(members)} rows, "
        f"{separate} tokens apart, {packed} packed: {packed / separate:.2f}"
    )


def test_prune_and_pack_every_row(test_data: pathlib.Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows, encoder = read(test_data), Encoder(tokenizer)
    generator = torch.Generator().manual_seed(0)
    samples = [encoder.encode(row) for row in rows]
    assert all(len(s) == 1 and isinstance(s[0], Sample) for s in samples)
    for row, (sample,) in zip(rows, samples):
        assert tokenizer.decode(sample.input_ids) == sample.text
        scored = {c for (a, b), s in zip(sample.offsets, sample.scored) if s for c in range(a, b)}
        assert "".join(sample.text[c] for c in sorted(scored)).split() == row.record["question"].split()
    scores = [gsm8k.random_scores(sample, generator) for (sample,) in samples]
    check_and_report(rows, scores, PruneConfig(), encoder, "instruction")


def test_response_level_of_every_row(test_data: pathlib.Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows, encoder = read(test_data), Encoder(tokenizer)
    generator = torch.Generator().manual_seed(0)
    samples = [encoder.encode(row, level="response") for row in rows]
    assert all(isinstance(s, Sample) and s.cut == 1 for one in samples for s in one)  # every answer has a second line
    check_and_report(rows, [gsm8k.random_scores(s, generator) for (s,) in samples], PruneConfig(), encoder, "response")  # type: ignore[arg-type]


def test_every_reference_grades_itself(test_data: pathlib.Path) -> None:
    rows = read(test_data)
    assert all(row.answer is not None and grade("math", row.messages[-1]["content"], row.answer) for row in rows)
    assert not any(grade("math", "#### 123456789", row.answer or "") for row in rows[:50])


def score_and_check(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    samples = [sample for row in rows for sample in encoder.encode(row)]
    scores = gsm8k.model_scores(samples, tokenizer)
    assert [row["status"] for row in scores] == ["ok"] * len(rows)
    check_and_report(rows, scores, PruneConfig(), encoder, "instruction")


def test_score_with_models(test_data: pathlib.Path, tokenizer: PreTrainedTokenizerFast) -> None:
    score_and_check(read(test_data)[:60], tokenizer)


@pytest.mark.slow
def test_score_every_row_with_models(test_data: pathlib.Path, tokenizer: PreTrainedTokenizerFast) -> None:
    score_and_check(read(test_data), tokenizer)
