"""The released formats and TRL's, written and read back."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from test_prune import PARITY, QUESTION, SCORES, SUFFIX, TOKENS

from leaf.data import Encoder, Row, Sample, Skip, read_rows
from leaf.export import export, read_released_scores
from leaf.prune import PruneConfig, flags_of, prune

RECORDS = [
    {
        "instruction": "Tom has 2 books 🙂. The sign says 9.",
        "input": "How many, Tom?",
        "output": "He has two.\nSo 2.\n#### 2",
        "prompt_answer": "2",
        "source": "made",
        "type": "math",
        "filepath": "f.json",
    },
    {"instruction": "Empty", "output": ""},
    {"messages": [{"role": "user", "content": "  Eva is 5. "}, {"role": "assistant", "content": "Five.\nYes."}]},
]


def tables(template: str = "chatml") -> tuple[list[Row | Skip], list[dict], list[dict]]:
    """Rows, their scores at both levels (random norms) and counterfactuals."""
    rows = list(read_rows(RECORDS))
    encoder = Encoder(tiny.tokenizer(template))
    generator = torch.Generator().manual_seed(0)
    scores = []
    for row in rows:
        for level in ("instruction", "response"):
            for sample in encoder.encode(row, level=level) if isinstance(row, Row) else []:
                assert isinstance(sample, Sample)

                def column(scored: list[bool] = sample.scored) -> list[float | None]:
                    return [torch.rand((), generator=generator).item() if s else None for s in scored]

                scores.append(
                    {
                        **sample.__dict__,
                        **{"status": "ok", "reason": None, "student_nll": None},
                        **{"score": column(), "teacher_norm": column(), "student_norm": column()},
                        **{"teacher_loss": 1.0, "student_loss": 2.0},
                    }
                )
    return rows, scores, list(prune(scores, PruneConfig(q=0.2, cap=1.0)))


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_released_files(tmp_path, template: str) -> None:
    rows, scores, counterfactuals = tables(template)
    instruction_level = [c for c in counterfactuals if c["level"] == "instruction"]
    written = export(tmp_path, "released", rows, scores, counterfactuals)
    assert written["scores.json"] == 2

    entries = json.loads((tmp_path / "scores.json").read_text())
    assert [e["sample_id"] for e in entries] == [1, 3]
    assert (entries[0]["loss_1"], entries[0]["loss_2"]) == (2.0, 1.0)
    content = "".join(RECORDS[0][k] for k in ("instruction", "input"))
    assert "".join(e["token"] for e in entries[0]["grad_diff"]) == "".join(content.split())
    norms = [e["grad_norm_1"] for e in entries[1]["grad_diff"]]
    assert (min(norms), max(norms)) == (0, 1)
    assert set(entries[0]["grad_diff"][0]) == {"token", "grad_diff", "grad_norm_1", "grad_norm_2"}

    pruned = [json.loads(line) for line in (tmp_path / "pruned.jsonl").read_text().splitlines()]
    assert len(pruned) == len(instruction_level) > 2
    for record, counterfactual in zip(pruned, instruction_level):
        turn = record["instruction"] + ("\n" + record["input"] if "input" in record else "")
        assert turn.strip() in counterfactual["prompt"]
        assert counterfactual["prompt"].count(turn.strip()) == 1
        assert len(record["original_instruction"]) >= len(record["instruction"])
        assert all(
            token.strip() in record["original_instruction"] + "".join(RECORDS[0].values())
            for token in record["masked_tokens"]
        )
    first = [r for r in pruned if r["sample_id"] == 1]
    assert len(pruned) > len(first) > 0
    assert {(r["answer"], r["source"], r["type"], r["filepath"]) for r in first} == {("2", "made", "math", "f.json")}
    assert [r["mask_run_index"] for r in first] == list(range(len(first)))

    training = json.loads((tmp_path / "train.json").read_text())
    assert training[0] == {k: RECORDS[0][k] for k in ("instruction", "input", "output")}
    assert len(training) == 2 + len(counterfactuals)
    steps = [r for r in training if "step_response" in r]
    assert len(steps) == len(counterfactuals) - len(instruction_level) > 0
    assert {r["output"] for r in steps} == {"So 2.\n#### 2", "Yes."}
    for record, counterfactual in zip(steps, (c for c in counterfactuals if c["level"] == "response")):
        assert counterfactual["prompt"].endswith(record["step_response"])
        assert len(record["step_response"]) < len("He has two.\n")
    for name in ("pruned.jsonl", "train.json"):  # the package reads what it wrote
        again = list(read_rows(tmp_path / name))
        assert all(isinstance(row, Row) for row in again)
        assert len(again) == written[name]


def test_trl(tmp_path) -> None:
    rows, scores, counterfactuals = tables()
    counterfactuals[0] = {**counterfactuals[0], "verified": False}
    assert export(tmp_path, "trl", rows, scores, counterfactuals) == {"train.jsonl": 2 + len(counterfactuals) - 1}
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    original = records[0]["prompt"] + records[0]["completion"]
    assert original == scores[0]["text"]
    assert {r["prompt"] for r in records[2:]} == {c["prompt"] for c in counterfactuals[1:]}
    with pytest.raises(ValueError, match="format must be one of released, trl"):
        export(tmp_path, "csv", rows, scores, counterfactuals)


def test_released_scores_are_read(tmp_path) -> None:
    entry = {
        "sample_id": 2,
        "loss_1": 0.5,
        "loss_2": 0.25,
        "grad_diff": [
            {"token": t, "grad_diff": d, "grad_norm_1": 0.5, "grad_norm_2": 0.5} for t, d in zip(TOKENS, SCORES)
        ],
    }
    path = tmp_path / "scores.json"
    path.write_text(json.dumps([entry]))
    records = [{"instruction": "other", "output": "!"}, {"instruction": QUESTION + SUFFIX, "output": "!"}]
    (row,) = read_released_scores(path, read_rows(records))
    assert {k: row[k] for k in ("text", "offsets", "scored", "score")} == {
        k: PARITY[k] for k in ("text", "offsets", "scored", "score")
    }
    assert flags_of(row, PruneConfig(rule="threshold", tau=0.05)).nonzero().flatten().tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="token 'Every' is not next in its instruction, 'other'"):
        list(read_released_scores(path, read_rows(records[::-1])))
    with pytest.raises(ValueError, match="sample_id 2 is none of the 1 rows"):
        list(read_released_scores(path, read_rows(records[1:])))


def test_released_scores_round_trip(tmp_path) -> None:
    """Flags from our own scores equal those from the exported ones."""
    rows, scores, counterfactuals = tables()
    export(tmp_path, "released", rows, scores, counterfactuals)
    instruction = [row for row in rows if isinstance(row, Row)]
    again = read_released_scores(tmp_path / "scores.json", rows)
    for row, ours, theirs in zip(instruction, (s for s in scores if s["level"] == "instruction"), again):
        config = PruneConfig(rule="threshold", tau=0.2)
        texts = []
        for table in (ours, theirs):
            flags = flags_of(table, config)
            chars = {c for (a, b), f in zip(table["offsets"], flags) if f for c in range(a, b)}
            texts.append("".join(table["text"][c] for c in sorted(chars)).split())
        assert "".join(texts[0]) == "".join(texts[1])
        assert row.id == theirs["id"]
