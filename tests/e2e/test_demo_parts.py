"""The built-in task's rows, tokenizer, metric, ground truth and fairness, without its training."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from leaf.data import Encoder, Row, Sample
from leaf.demo import comparison
from leaf.demo.arms import RECIPES
from leaf.demo.detection import detection, oracle
from leaf.demo.models import STUDENT, WINDOW, Size, encode, exact_match, make_model, outside_window, padded, train
from leaf.demo.task import NAMES, TEST_SETS, drop_words, make_rows, make_tokenizer
from leaf.generate import generate
from leaf.rows import read_rows


def test_rows_are_the_same_on_every_machine() -> None:
    row = make_rows("in_distribution", 1, seed=0)[0]
    assert row["prompt"] == (
        "rain falls today . Ann has 3 books . the sign says 2 . Leo is 11 years old . Ann loses 1 books . "
        "how many books does Ann have now ?"
    )
    assert row["completion"] == "3 minus 1 equals 2 . answer 2"
    assert make_rows("corpus", 20, 1) == make_rows("corpus", 20, 1)
    assert make_rows("corpus", 20, 1) != make_rows("corpus", 20, 2)


@pytest.mark.parametrize("name", [*TEST_SETS, "teacher", "corpus"])
def test_ground_truth(name: str) -> None:
    rows = make_rows(name, 400, seed=3)
    for row in rows:
        prompt, (a, sign, b, _, c, *_, answer) = row["prompt"], row["completion"].split()
        assert [prompt[s:e] for s, e in row["operands"]] == [a, b]
        assert int(c) == int(a) + (int(b) if sign == "plus" else -int(b))
        assert answer == c
        assert prompt.index(" has ") < max(prompt.find(" gives "), prompt.find(" loses "))
        if row["confounder"]:
            start, end = row["confounder"]
            assert prompt[:start].endswith("the sign says ")
            assert row["misleading"] == (prompt[start:end] != c)
        else:
            assert "sign" not in prompt
            assert not row["misleading"]
    misleading = sum(row["misleading"] for row in rows) / len(rows)
    signs = sum(row["confounder"] is not None for row in rows) / len(rows)
    expected = {"adversarial": (1, 1), "clean": (0, 0), "teacher": (0.75 * 16 / 17, 0.75)}.get(name, (0.05, 1))
    assert (misleading, signs) == pytest.approx(expected, abs=0.07)


def test_tokenizer() -> None:
    tokenizer = make_tokenizer()
    assert len(tokenizer) < 70
    row = make_rows("corpus", 1, 0)[0]
    user, response = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}
    text = tokenizer.apply_chat_template([user, response], tokenize=False)
    assert text == f"<bos> {row['prompt']} <ans> {row['completion']} <eos>"
    assert text.startswith(tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert [text[a:b] for a, b in encoded["offset_mapping"]] == text.split()
    assert tokenizer.decode(encoded["input_ids"]) == text


def test_only_the_words_of_the_prompt_are_scored() -> None:
    (row,) = read_rows(make_rows("corpus", 1, 0))
    assert isinstance(row, Row)
    (sample,) = Encoder(make_tokenizer()).encode(row)
    assert isinstance(sample, Sample)
    words = [sample.text[a:b].strip() for (a, b), scored in zip(sample.offsets, sample.scored) if scored]
    assert words == row.record["prompt"].split()


def test_word_dropout() -> None:
    row, rng = make_rows("corpus", 1, 0)[0], random.Random(0)
    operands = [row["prompt"][a:b] for a, b in row["operands"]]
    assert drop_words(row, rng, p=1.0, spare_operands=True) == " ".join(operands)
    assert drop_words(row, rng, p=1.0, spare_operands=False) is None
    assert drop_words(row, rng, p=0.0, spare_operands=False) == row["prompt"]


def test_exact_match_is_greedy_decoding() -> None:
    """On rows that the model has learnt by heart and on rows that it has not."""
    tokenizer = make_tokenizer()
    pairs = [(row["prompt"], row["completion"]) for row in make_rows("corpus", 12, 0)]
    model = make_model(tokenizer, STUDENT, seed=0)
    for _ in train(model, iter([pairs[:6]] * 60), padded(tokenizer), learning_rate=lambda step: 3e-3):
        pass
    found = exact_match(model, tokenizer, pairs)
    prompts = [f"<bos> {prompt} <ans> " for prompt, _ in pairs]
    greedy = dict(generate(model, tokenizer, prompts, max_new_tokens=12))
    assert found == [greedy[prompt] == response for prompt, (_, response) in zip(prompts, pairs)]
    assert {True, False} == set(found)


def test_encode_pads_on_the_right_and_asks_for_the_response_only() -> None:
    tokenizer = make_tokenizer()
    ids, labels = encode(tokenizer, [("Tom has 2 books .", "2 plus 1"), ("Eva", "3")])
    shown = [tokenizer.decode(row[row != -100]) for row in labels]
    assert shown == ["2 plus 1 <eos>", "3 <eos>"]
    assert tokenizer.decode(ids[1]) == "<bos> Eva <ans> 3 <eos>" + " <pad>" * (ids.shape[1] - 5)


def test_window() -> None:
    middle = {name: (low + high) / 2 for name, (low, high) in WINDOW.items()}
    assert outside_window(middle) == 0
    assert outside_window(dict.fromkeys(TEST_SETS, 1.0)) == pytest.approx(0.65 + 0.6)
    for name, (low, high) in WINDOW.items():
        assert outside_window({**middle, name: low - 0.01}) == pytest.approx(0.01)
        assert outside_window({**middle, name: low + 0.01}) == 0
        assert outside_window({**middle, name: low + 0.01}, margin=0.02) == pytest.approx(0.01)
        assert high == 1 or outside_window({**middle, name: high + 0.01}) == pytest.approx(0.01)


def _scored(record: dict[str, Any], lowest: int) -> dict[str, Any]:
    """A scores row whose word number `lowest` has the lowest score, the others rising from left to right."""
    (row,) = read_rows([record])
    assert isinstance(row, Row)
    (sample,) = Encoder(make_tokenizer()).encode(row)
    assert isinstance(sample, Sample)
    scored = [i for i, wanted in enumerate(sample.scored) if wanted]
    values: list[float | None] = [None] * len(sample.offsets)
    for place, i in enumerate(scored):
        values[i] = 0.0 if place == lowest else 0.5 + place / 100
    norm = [None if value is None else 1 - value for value in values]
    return {
        **dataclasses.asdict(sample),
        "status": "ok",
        "score": values,
        "student_norm": norm,
        "teacher_norm": norm,
    }


def test_detection() -> None:
    record = next(row for row in make_rows("corpus", 99, 0) if row["prompt"].split()[0] in NAMES)
    words = record["prompt"].split()
    confounder = words.index("says") + 1
    operand = len(record["prompt"][: record["operands"][0][0]].split())
    records = {record["id"]: record}

    found = detection([_scored(record, confounder)], records, student_wrong={record["id"]})
    assert found["auroc"] == found["auroc_student_wrong"] == found["auroc_student_gradient"] == 1
    assert found["recall"] == 1
    assert found["precision"] == pytest.approx(0.5)  # int(0.05 n) + 1 = 2 flags
    assert found["auroc_student_wrong_misleading"] == (1 if record["misleading"] else None)

    found = detection([_scored(record, operand)], records, student_wrong=set())
    assert found["recall"] == found["precision"] == 0
    assert found["operands_flagged"] == pytest.approx(0.5)
    assert found["auroc_student_wrong"] is None
    others = len(words) - 1
    assert found["auroc"] == pytest.approx((others - confounder) / others)  # those before it, the operand among them


def test_oracle_removes_the_confounder_alone() -> None:
    record = make_rows("corpus", 1, 0)[0]
    (made,) = oracle([_scored(record, 0)], {record["id"]: record})
    start, end = record["confounder"]
    rest = (record["prompt"][:start] + record["prompt"][end:]).split()
    assert made["prompt"].split() == ["<bos>", *rest, "<ans>"]


@pytest.mark.parametrize("preset", RECIPES)
def test_every_arm_has_the_same_steps_and_sequences(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Recorder:
        def __init__(self, model: Any, teacher: Any, args: Any, train_dataset: list[dict[str, Any]]):
            used = [min(len(g["counterfactuals"]), int(args.counterfactuals_per_sample)) for g in train_dataset]
            seen.append((args.max_steps, args.train_batch_size * (1 + sum(used) / len(used))))

        def remove_callback(self, callback: Any) -> None: ...

        def train(self) -> None: ...

    monkeypatch.setattr(comparison, "LeafTrainer", Recorder)
    model = make_model(make_tokenizer(), Size(16), seed=0)
    member = {"input_ids": [1, 2, 3], "response_start": 2}
    kd, one, two = ({"id": "0", "original": member, "counterfactuals": [member] * n} for n in range(3))
    recipe = RECIPES[preset]
    for groups in ([kd], [one], [two], [one, two]):
        comparison.distil(model, model, groups, recipe, seed=0)
    assert set(seen) == {(recipe.steps, 2 * recipe.groups)}
    comparison.distil(model, model, [kd, kd, one], recipe, seed=0)  # no whole number of groups gives the same
    assert 2 * recipe.groups - 2 < seen[-1][1] <= 2 * recipe.groups


def test_models_do_not_depend_on_the_global_seed() -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    first = make_model(tokenizer, Size(16), seed=5)
    torch.manual_seed(2)
    second = make_model(tokenizer, Size(16), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
