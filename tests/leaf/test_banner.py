"""What is shown before training, as a log file of 80 columns has it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import tiny
from rich.console import Console
from test_trainer import Stream, arguments, groups, model

from leaf import banner
from leaf.estimate import Estimator
from leaf.trainer import LeafTrainer


def shown(trainer: LeafTrainer) -> str:
    """All that a training shows, its line breaks removed."""
    console = Console(file=io.StringIO(), width=80)
    trainer.add_callback(banner.Banner(trainer, console.print))
    trainer.train()
    written = console.file.getvalue()
    assert "\x1b" not in written
    assert max(map(len, written.splitlines())) <= 80
    return " ".join(written.split())


def make_trainer(folder: Any, data: Any = None, vocab: int = 24, **overrides: Any) -> LeafTrainer:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, **overrides}
    students = model(0).float(), model(1, hidden=32, vocab=vocab).float()
    return LeafTrainer(*students, arguments(folder, **options), data or groups())


def test_facts(tmp_path) -> None:
    text = shown(make_trainer(tmp_path, vocab=32, lambda_=0.25))
    assert "the student's head has 24 columns, the teacher's 32; the first 24 are compared: all of the smaller" in text
    assert "forward_kl, pair, λ 0.25 on originals, temperature 1" in text
    assert "7 groups, 2 without counterfactuals; 9 counterfactuals, all of each group" in text
    # groups 0 and 3: 8 tokens and 6 of a counterfactual that shares 1; 11 tokens
    assert "4 groups (2 × 2 accumulated × 1 ranks), about 48 tokens" in text
    assert text.count("memory after the first step: peak ") == 1
    assert "; predicted: " in text


def test_of_a_stream_and_of_equal_heads(tmp_path) -> None:
    text = shown(make_trainer(tmp_path, Stream()))
    assert "24 columns, the teacher's 24; all are compared" in text
    assert "a stream of groups" in text


def test_a_step_that_the_data_do_not_fill(tmp_path) -> None:
    text = shown(make_trainer(tmp_path, groups(3), per_device_train_batch_size=8, gradient_accumulation_steps=1))
    assert "a step 3 groups, about 48 tokens" in text, "8 + 5, 10 + 7 + 6 and 12"


def test_the_sample_has_its_masks_without_colours() -> None:
    tokenizer = tiny.tokenizer()
    kept, sign, rest, response = ("Tom has 2.", " The sign says 9.", " Eva?", " 2")
    parts = [tokenizer(part).input_ids for part in (kept, sign, rest, response)]
    whole = {"input_ids": [i for part in parts for i in part], "response_start": sum(map(len, parts[:3]))}
    pruned = {"input_ids": parts[0] + parts[2] + parts[3], "response_start": len(parts[0] + parts[2])}
    text = banner.sample({"id": "7", "original": whole, "counterfactuals": [pruned]}, tokenizer)
    assert text.plain.endswith("\nTom has 2.[- The sign says 9.-] Eva?\n▶  2")
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["[- The sign says 9.-]"] == banner.STYLES["deleted"]
    assert styles["Tom has 2."] == styles[" Eva?"] == banner.STYLES["prompt"]
    assert styles[" 2"] == banner.STYLES["response"]
    alone = banner.sample({"id": "7", "original": whole, "counterfactuals": []}, None)
    assert "[-" not in alone.plain
    assert str(parts[0][0]) in alone.plain


def test_spaces_between_tokens_stay() -> None:
    """SentencePiece decodes ▁sign as "sign"."""
    tokenizer = tiny.unigram()
    ids = tokenizer("Tom has 2 books.", add_special_tokens=False).input_ids
    at = next(i for i in range(1, len(ids)) if tokenizer.convert_ids_to_tokens(ids[i]).startswith("▁"))
    member = {"input_ids": ids, "response_start": len(ids) - 1}
    pruned = {"input_ids": ids[:at] + ids[at + 1 :], "response_start": len(ids) - 2}
    text = banner.sample({"id": "7", "original": member, "counterfactuals": [pruned]}, tokenizer).plain
    assert text.partition("\n")[2].replace("[-", "").replace("-]", "").replace("\n▶ ", "") == tokenizer.decode(ids)


def test_a_long_prompt_is_cut_in_the_middle() -> None:
    member = {"input_ids": [*range(1000)], "response_start": 990}
    text = banner.sample({"id": "7", "original": member, "counterfactuals": []}, None).plain
    assert " 49 … 890 tokens … 940 " in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("ids", "other", "expected"),
    [
        ([1, 2, 3, 4], [1, 4], {1, 2}),
        ([1, 2, 3, 4, 5], [2, 3, 5], {0, 3}),
        ([1, 1, 1], [1, 1], {2}),
        ([1, 2], [1, 2], set()),
        ([1, 2, 3], [1, 9, 3], {1}),
    ],
)
def test_missing(ids, other, expected) -> None:
    assert banner.missing(ids, other) == expected


def test_the_prediction_is_that_of_leaf_estimate(tmp_path, monkeypatch) -> None:
    asked = []

    def distillation(self: Estimator, checkpointing: bool, pack: Any) -> Any:
        asked.append(pack["layout"].num_tokens)
        return real(self, checkpointing, pack)

    real = Estimator.distillation
    monkeypatch.setattr(Estimator, "distillation", distillation)
    trainer = make_trainer(tmp_path)
    text, total = banner.predict(trainer)
    student, teacher = (sum(p.nbytes for p in m.parameters()) for m in (trainer.model, trainer.teacher))
    assert asked == [24]
    banner.predict(make_trainer(tmp_path, max_tokens=14))
    assert asked == [24, 13], "the larger of two packs"
    assert total > 4 * student + teacher
    assert total - (4 * student + teacher) < 2**22
    assert "predicted: weights" in text


def test_what_is_not_known_is_said(tmp_path, monkeypatch) -> None:
    assert "not for optim=sgd" in banner.predict(make_trainer(tmp_path, optim="sgd"))[0]
    monkeypatch.setattr(banner, "TRACED_LAYERS", 3)
    text, total = banner.predict(make_trainer(tmp_path))
    assert total is None
    assert "see `leaf estimate`" in text
    monkeypatch.undo()
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(Estimator, "distillation", refuse)
    assert "are not predicted: no such model" in banner.predict(trainer)[0]


def refuse(*_: Any) -> None:
    raise ValueError("no such model")
