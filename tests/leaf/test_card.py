"""The model card: valid metadata, no machine paths, statistics that are those of the tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from test_trainer import arguments, groups, model

from leaf.card import NO_EVALUATION, PICTURE, add_evaluation, name_of, run_card
from leaf.trainer import LeafTrainer


def make_trainer(folder: Path) -> LeafTrainer:
    return LeafTrainer(model(0), model(1, hidden=32), arguments(folder, lambda_=0.25), groups())


def row(name: str, level: str, words: str, prompt: int) -> dict[str, Any]:
    """A token per character, the first `prompt` of which can be scored."""
    score = [i / len(words) if i < prompt else None for i in range(len(words))]
    norms = {role: [0.5] * len(words) for role in ("teacher_norm", "student_norm")}
    offsets = [(i, i + 1) for i in range(len(words))]
    shared = {"status": "ok", "cut": 0, "text": words, "offsets": offsets, "response_start": prompt, "score": score}
    return {"id": name, "level": level, **shared, **norms}


SCORES = [
    row("long", "instruction", "x" * 400, 390),
    row("a", "instruction", "abcdefgh", 6),
    row("b", "response", "abcdefgh", 5),
    {"id": "s", "level": "instruction", "cut": 0, "status": "skipped", "response_start": None},
]


def cf(source: str, level: str, removed: list[tuple[int, int]], verified: bool | None) -> dict[str, Any]:
    return {"source_id": source, "level": level, "cut": 0, "removed": removed, "verified": verified}


COUNTERFACTUALS = [
    cf("long", "instruction", [(0, 10)], None),
    cf("a", "instruction", [(0, 2)], True),
    cf("a", "instruction", [(4, 5)], True),
    cf("a", "instruction", [(3, 4)], False),
    cf("b", "response", [(1, 3)], True),
]


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """Of a student that lies in a folder."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    names = {"student": str(tmp_path / "models" / "mine"), "teacher": "org/teacher"}
    trainer = make_trainer(tmp_path / "run")
    run_card(trainer, tmp_path, scores=SCORES, counterfactuals=COUNTERFACTUALS, data="org/rows:main:train", **names)
    return tmp_path / "README.md"


def test_metadata_and_names(card: Path) -> None:
    data = ModelCard.load(card).data.to_dict()
    assert {name: data[name] for name in ("base_model", "library_name", "pipeline_tag", "datasets")} == {
        "base_model": "mine",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": "org/rows",
    }
    assert {"leaf", "knowledge-distillation", "arxiv:2506.07851"} <= set(data["tags"])
    text = card.read_text()
    assert "`mine` distilled from `org/teacher`" in text
    assert "| loss | λ = 0.25 |" in text
    assert os.sep + "models" not in text
    assert str(card.parent) not in text


def test_statistics_are_those_of_the_tables(card: Path) -> None:
    """Deleted: 10 of 390, and 2 + 1 of twice 6 prompt tokens; 2 of 5. The picture is of the row that fits one."""
    lines = card.read_text().splitlines()
    assert f"| instruction | 2 | 1 | 2 | 3 | 1 | {13 / 402:.2%} |" in lines
    assert "| response | 1 | 0 | 1 | 1 | 0 | 40.00% |" in lines
    assert any(line.startswith("Row `a`: ") for line in lines)
    assert (card.parent / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_evaluation_takes_its_place_and_can_be_repeated(card: Path, tmp_path: Path) -> None:
    assert NO_EVALUATION in card.read_text()
    rest = {"attention_to_flagged": None, "checked": 4, "unchecked": 1, "skipped": 0}
    for after in (0.5, 0.75):
        rows = [{"model": "before", "accuracy": 0.25, **rest}, {"model": "after", "accuracy": after, **rest}]
        add_evaluation(card, rows, str(tmp_path / "README.md"), unseen=True)
    text = card.read_text()
    assert NO_EVALUATION not in text
    assert "trained on**" not in text
    assert "| before | 0.25 | – | 4 | 1 | 0 |" in text
    assert "| after | 0.75 | – | 4 | 1 | 0 |" in text
    assert "| after | 0.5 |" not in text
    assert "## Use" in text
    (result,) = ModelCard.load(card).data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.75, "README.md")
    add_evaluation(card, rows, str(tmp_path / "README.md"), unseen=False)
    assert "rows that the student was trained on" in card.read_text()
    assert not ModelCard.load(card).data.eval_results, "no result to show around"
    other = tmp_path / "other.md"
    other.write_text("# Mine\n")
    add_evaluation(other, [], "x", unseen=True)
    add_evaluation(tmp_path / "missing.md", [], "x", unseen=True)
    assert other.read_text() == "# Mine\n"


def test_the_trainer_alone_writes_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(tags="mine", license="mit", finetuned_from="org/base", model_name="pupil")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/base", "mit")
    assert {"leaf", "mine"} <= set(card.data.tags)
    assert "# pupil" in card.text
    assert "distilled from `LlamaForCausalLM`" in card.text, "the teacher has no name"
    trainer.create_model_card()
    assert "base_model" not in ModelCard.load(tmp_path / "README.md").data.to_dict()


def test_names(tmp_path: Path) -> None:
    assert name_of("org/name") == "org/name"
    assert name_of(f"{tmp_path}/") == tmp_path.name
