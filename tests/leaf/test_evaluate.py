from __future__ import annotations

import pytest
import tiny
import torch

from leaf.data import Encoder, Row, Skip, read_rows
from leaf.evaluate import attention_to_flagged, summary
from leaf.prune import PruneConfig, flags_of
from leaf.select import Answer


def test_summary() -> None:
    answers = [Answer("a", True), Answer("b", False), Answer("c", True), Answer("d", None), Skip("4", "too_long")]
    assert summary(answers, iter([0.5, None, 0.25])) == {
        "accuracy": pytest.approx(2 / 3),
        "checked": 3,
        "unchecked": 1,
        "skipped": 1,
        "attention_to_flagged": 0.375,
    }
    assert summary([])["accuracy"] is None


def scores(encoder: Encoder, rows: list[Row]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    table = []
    for row in rows:
        (sample,) = encoder.encode(row)
        score = [torch.rand((), generator=generator).item() if s else None for s in sample.scored]
        table.append({**sample.__dict__, "status": "ok", "reason": None, "score": score})
    table.insert(1, {**dict.fromkeys(table[0]), "id": "s", "status": "skipped", "reason": "too_long"})
    return table


@torch.no_grad()
def eager_share(model, row: dict, flagged: list[int]) -> float:
    model.set_attn_implementation("eager")
    attentions = model(torch.tensor([row["input_ids"]]), output_attentions=True).attentions
    mean = torch.stack(attentions).mean((0, 1, 2))  # over layers and heads: [query, key]
    return float(mean[row["response_start"] - 1 : -1, flagged].sum(1).mean())


def test_attention_to_flagged_tokens() -> None:
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer, initializer_range=0.3)
    records = [
        {"prompt": "Tom has 2 books. The sign says 9.", "completion": "2."},
        {"prompt": "Eva?", "completion": "x"},
    ]
    table = scores(Encoder(tokenizer), [r for r in read_rows(records) if isinstance(r, Row)])
    config = PruneConfig(q=0.3)
    first, skipped, third = attention_to_flagged(model, table, config)
    assert skipped is None
    for row, share in ((table[0], first), (table[2], third)):
        flagged = flags_of(row, config).nonzero().flatten().tolist()
        assert share == pytest.approx(eager_share(model, row, flagged), rel=1e-4)
    nothing = PruneConfig(rule="threshold", tau=-1.0)
    assert list(attention_to_flagged(model, table, nothing)) == [None] * 3
