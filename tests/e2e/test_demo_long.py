"""The long task: its rows, detection against closed forms, and a run of a few steps; the full run is slow."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from leaf.cli import main
from leaf.data import Encoder, Row, Sample
from leaf.demo import lengths
from leaf.demo.detection import find, totals
from leaf.demo.lengths import Recipe, Tokens, predict, solved, tokens
from leaf.demo.long import LEVELS, SIGNS, make_rows
from leaf.demo.models import Size, exact_match, make_model, train
from leaf.demo.task import TEST_SETS, make_tokenizer
from leaf.rows import read_rows
from leaf_kernels.integrations.transformers import NAME, register

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "demo" / "long.json"

TINY = Recipe(lengths=(50, 200), rows=2, max_steps=2, medium=(60, 80), long=(150, 200))
SPANS = ("confounders", "operands")


def sample(record: dict[str, Any]) -> Sample:
    (row,) = read_rows([record])
    assert isinstance(row, Row)
    (made,) = Encoder(make_tokenizer()).encode(row, level=record["level"])
    assert isinstance(made, Sample)
    return made


def cut(text: str, spans: list[list[int]]) -> list[str]:
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", [*TEST_SETS, "corpus"])
@pytest.mark.parametrize("length", [39, 40, 41, 53, 500, 2000])
def test_ground_truth(name: str, length: int, level: str) -> None:
    rows = make_rows(name, 40 if length < 500 else 10, 3, length=length, level=level)
    for row in rows:
        prompt, (step, _, answer) = row["prompt"], row["completion"].rpartition("\n")
        a, sign, b, _, c, *_, last = answer.split()
        assert answer == row["answer"]
        assert int(c) == int(last) == int(a) + (int(b) if sign == "plus" else -int(b))
        subject, item = prompt.split()[-4], prompt.split()[-6]
        assert prompt.endswith(f"how many {item} does {subject} have now ?")
        assert prompt.count(f"{subject} has {a} {item} .") == prompt.count(" has ") == 1
        change = f"{subject} loses {b} {item} ." if sign == "minus" else f"gives {subject} {b} {item} ."
        assert prompt.index(" has ") < prompt.index(change)
        assert cut(prompt, row["operands"]) == [a, b]
        assert len(prompt.split()) + 2 == length

        where, other = ("", "step_") if level == "instruction" else ("step_", "")
        text = prompt if level == "instruction" else row["completion"]
        planted = cut(text, row[f"{where}confounders"])
        assert len(planted) == (0 if name == "clean" else SIGNS if level == "instruction" else 1)
        assert text.count("the sign says") == len(planted)
        assert all(text[:start].endswith("the sign says ") for start, _ in row[f"{where}confounders"])
        assert not row[f"{other}confounders"]
        assert {z != c for z in planted} <= {row["misleading"]}
        assert cut(row["completion"], row["step_operands"]) == ([a] if step else [])
        assert bool(step) == (level == "response")
    if name in ("adversarial", "clean"):
        assert {row["misleading"] for row in rows} == {name == "adversarial"}


def test_signs_are_right_at_the_rate_of_the_short_task() -> None:
    rows = make_rows("corpus", 600, 0, length=40)
    assert sum(row["misleading"] for row in rows) / 600 == pytest.approx(0.05, abs=0.03)
    said = [set(cut(row["prompt"], row["confounders"])) for row in make_rows("adversarial", 80, 0, length=50)]
    assert 25 <= sum(len(numbers) == 1 for numbers in said) <= 55, "half of the time wrong signs agree"


def test_rows_are_the_same_on_every_machine() -> None:
    (row,) = make_rows("corpus", 1, 0, length=50, level="response")
    assert row == {
        "id": "corpus-50-response-0-0",
        "prompt": (
            "the sky is blue now . Ann sleeps now . Mia is old . Ann falls today . Mia sleeps now . Mia falls now . "
            "Zoe has 7 coins . Eva gives Zoe 4 coins . Max sleeps . how many coins does Zoe have now ?"
        ),
        "completion": (
            "Eva is 2 years old . Zoe is green today . the sign says 11 . Zoe has 7 coins .\n"
            "7 plus 4 equals 11 . answer 11"
        ),
        "answer": "7 plus 4 equals 11 . answer 11",
        "level": "response",
        "confounders": [],
        "operands": [[111, 112], [135, 136]],
        "step_confounders": [[56, 58]],
        "step_operands": [[69, 70]],
        "misleading": False,
    }
    assert make_rows("corpus", 5, 1, length=80) == make_rows("corpus", 5, 1, length=80)
    prompts = [make_rows(n, 1, s, length=80)[0]["prompt"] for n, s in (("corpus", 1), ("corpus", 2), ("clean", 1))]
    assert len(set(prompts)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 38}, "length must be at least 39 tokens here, got 38"),
        ({"length": 23, "level": "response"}, "length must be at least 24 tokens here, got 23"),
        ({"length": 50, "level": "step"}, "level must be one of instruction, response, got 'step'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rows("corpus", 1, 0, **options)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_scored(level: str) -> None:
    (record,) = make_rows("corpus", 1, 0, length=200, level=level)
    made = sample(record)
    words = [made.text[a:b].strip() for (a, b), scored in zip(made.offsets, made.scored) if scored]
    step = record["completion"].partition("\n")[0]
    assert words == (record["prompt"] if level == "instruction" else step).split()
    assert made.text[made.prompt_chars :].split() == [*record["answer"].split(), "<eos>"]
    (given,) = tokens(make_tokenizer(), [record])
    assert given == Tokens(made.input_ids, made.response_start)
    planted, operands = (lengths.planted(made.__dict__, record, name) for name in SPANS)
    assert int(planted.sum()) == (SIGNS if level == "instruction" else 1)
    assert int(operands.sum()) == (2 if level == "instruction" else 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("length", [50, 500])
def test_detection(length: int, level: str) -> None:
    """Scores that rise from left to right: a planted token beats the others that stand behind it."""
    (record,) = make_rows("adversarial", 1, 0, length=length, level=level)
    made = sample(record)
    places = [i for i, scored in enumerate(made.scored) if scored]
    score: list[float | None] = [None] * len(made.offsets)
    for order, i in enumerate(places):
        score[i] = order / len(places)
    row = {**made.__dict__, "status": "ok", "score": score, "student_norm": score, "teacher_norm": score}
    planted, operands = (lengths.planted(row, record, name) for name in SPANS)
    found = find(row, planted, operands)

    words = (record["prompt"] if level == "instruction" else record["completion"].partition("\n")[0]).split()
    signs = [n + 1 for n, word in enumerate(words) if word == "says"]
    others = len(words) - len(signs)
    behind = [others - (sign - before) for before, sign in enumerate(signs)]
    assert found.auroc == pytest.approx(sum(behind) / others / len(signs))
    assert found.auroc_student_gradient == pytest.approx(1 - found.auroc)
    flagged = int(0.05 * len(words)) + 1
    early = sum(sign < flagged for sign in signs)
    early_operands = int(operands[places[:flagged]].sum())
    assert found.flagged["gradient"] == [flagged, early, early_operands]
    assert totals([found, found]) == {
        "precision": pytest.approx(early / flagged),
        "recall": pytest.approx(early / len(signs)),
        "operands_flagged": pytest.approx(early_operands / flagged),
        "operands_flagged_student_gradient": pytest.approx(int(operands[places[-flagged:]].sum()) / flagged),
    }


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("length", [50, 200])
def test_measure(length: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted tokens are the lowest where the rows are drawn as usual, the highest where the signs mislead."""
    records = {row["id"]: row for test in TEST_SETS for row in make_rows(test, 3, 0, length=length, level=level)}
    asked: list[list[Tokens]] = []

    def score_samples(samples: list[Sample], *models: Any, **options: Any) -> Iterator[dict[str, Any]]:
        for one in samples:
            row = {**one.__dict__, "status": "ok"}
            signs = lengths.planted(row, records[one.id], "confounders").tolist()
            low = 0.0 if one.id.startswith("in_distribution") else 1.0
            others = [0.1 + n / 1000 for n in range(len(signs))]
            score = [(low if s else other) if ok else None for s, other, ok in zip(signs, others, one.scored)]
            yield {**row, "score": score, "student_norm": score, "teacher_norm": score}

    def solved(model: Any, items: list[Tokens]) -> list[bool]:
        asked.append(items)
        return [True, False, False]

    monkeypatch.setattr(lengths, "score_samples", score_samples)
    monkeypatch.setattr(lengths, "solved", solved)
    model = make_model(make_tokenizer(), Size(16), seed=0)
    cell = lengths.measure({"teacher": model, "student": model}, Encoder(make_tokenizer()), level, length, 3, 0)

    assert cell.detection["auroc"] == cell.detection["auroc_student_gradient_misleading"] == 1
    assert cell.detection["auroc_misleading"] == cell.detection["auroc_student_gradient"] == 0
    assert cell.detection["recall"] == 1
    assert cell.detection["recall_misleading"] == 0
    assert [row["id"] for row in cell.scores] == [f"adversarial-{length}-{level}-0-{n}" for n in range(3)]
    assert set(cell.accuracy.values()) == {1 / 3}

    samples = {name: sample(record) for name, record in records.items()}
    full = [[samples[f"{test}-{length}-{level}-0-{n}"] for n in range(3)] for test in TEST_SETS]
    before = [[len(one.input_ids) for one in items] for items in full]
    flags = [[int(0.05 * sum(one.scored)) + 1 for one in items] for items in full[:2]]
    after = [[n - flagged for n, flagged in zip(*pair)] for pair in zip(before, flags)]
    wanted = [*before, *before, after[0], after[0], after[1], after[1]]  # of teacher and student
    assert [[len(one.input_ids) for one in items] for items in asked] == wanted


def test_solved_is_exact_match() -> None:
    """On rows that the model has learnt by heart and on rows that it has not, packed and padded."""
    tokenizer = make_tokenizer()
    rows = make_rows("corpus", 12, 0, length=50)
    model = make_model(tokenizer, Size(32), seed=0)
    register()
    model.set_attn_implementation(NAME)
    items = tokens(tokenizer, rows)
    for _ in train(model, iter([items[:4]] * 80), predict, learning_rate=lambda step: 5e-3):
        pass
    found = solved(model, items)
    model.set_attn_implementation("sdpa")
    assert found == exact_match(model, tokenizer, [(row["prompt"], row["completion"]) for row in rows])
    assert {True, False} == set(found)


def test_words_missing() -> None:
    (row,) = make_rows("corpus", 1, 0, length=500, level="response")
    rng, steps = random.Random(0), set()
    for _ in range(20):
        fewer = lengths.with_words_missing(row, rng)
        assert 440 < len(fewer["prompt"].split()) < 498
        step, separator, answer = fewer["completion"].rpartition("\n")
        assert (separator, answer) == ("\n", row["answer"])
        assert row["answer"].split()[0] in step.split(), "operands stay"
        steps.add(len(step.split()))
    full = len(row["completion"].partition("\n")[0].split())
    assert full - 5 <= min(steps) < max(steps) <= full


def test_a_stage_ends_where_its_validation_rows_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third check of the first stage and the first of the second; validation rows are as long as the stage's longest."""
    shares = iter([0.5, 0.89, 0.9, 1.0])
    checked: list[set[int]] = []

    def solved(model: Any, items: list[Tokens]) -> list[bool]:
        checked.append({one.response_start for one in items})
        right = round(next(shares) * 100)
        return [True] * right + [False] * (100 - right)

    monkeypatch.setattr(lengths, "CHECK_EVERY", 2)
    monkeypatch.setattr(lengths, "solved", solved)
    recipe = dataclasses.replace(TINY, max_steps=9)
    said: list[str] = []

    def track(items: Any, total: int, description: str) -> Any:
        said.append(f"{description}, at most {total}")
        return items

    _, outcome = lengths.train_model(make_tokenizer(), "student", 3, recipe, track)
    assert outcome == {"short_steps": 6, "short_solved": 0.9, "mixed_steps": 2, "mixed_solved": 1.0}
    assert all(min(length) == 40 for length in checked[:3])
    assert min(checked[3]) == 200
    assert said == ["seed 3: student, short prompts, at most 9", "seed 3: student, mixed prompts, at most 9"]


def test_run(tmp_path: Path) -> None:
    results = lengths.run(tmp_path, recipe=TINY, seeds=(3,))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["seeds"] == [3]
    once = {"short_steps": [2], "short_solved": [0.0], "mixed_steps": [2], "mixed_solved": [0.0]}
    assert results["training"] == {"teacher": once, "student": once}
    parts = [f"{level}_level_{part}" for level in LEVELS for part in ("detection", "accuracy")]
    assert list(results["per_length"]) == parts
    for part, metrics in results["per_length"].items():
        wanted = {"auroc", "auroc_misleading", "auroc_student_gradient", "recall", "operands_flagged_misleading"}
        if part.endswith("accuracy"):
            wanted = {"teacher_clean", "student_adversarial", "teacher_adversarial_after_deletion"}
        assert wanted <= metrics.keys()
        for values in metrics.values():
            assert list(values) == ["50", "200"]
            assert all(len(seeds) == 1 and all(0 <= value <= 1 for value in seeds) for seeds in values.values())
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(lengths.summary(results))
    shown = console.export_text()
    assert "instruction level detection, 1 seed(s)" in shown
    page = (tmp_path / "report.html").read_text()
    assert "Response level accuracy" in page
    ids = [f"adversarial-{length}-{level}-3-{n}" for level in LEVELS for length in (50, 200) for n in range(2)]
    assert all(f'"id":"{row}"' in page for row in ids)


def test_seeds_are_put_together() -> None:
    one, two = (
        {"seed": n, "training": {}, "per_length": {"d": {"auroc": {"50": n / 10}}}, "seconds": {}} for n in (1, 2)
    )
    together = lengths.summarise([one, two])
    assert together["seeds"] == [1, 2]
    assert together["per_length"] == {"d": {"auroc": {"50": [0.1, 0.2]}}}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_detection_is_what_it_was(tmp_path: Path) -> None:
    """Not below the lowest of the committed seeds by more than their standard deviation."""
    results = lengths.run(tmp_path)
    for part, metrics in json.loads(COMMITTED.read_text())["per_length"].items():
        for name in ("auroc", "auroc_misleading") if part.endswith("detection") else ("teacher_adversarial",):
            for length, values in metrics[name].items():
                threshold = min(values) - statistics.stdev(values)
                assert results["per_length"][part][name][length][0] > threshold, (part, name, length)


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(folder: str, **options: Any) -> dict[str, Any]:
        asked.update(options, folder=folder)
        return {"seeds": [4], "per_length": {"response_level_detection": {"auroc": {"50": [0.5]}}}}

    monkeypatch.setattr(lengths, "run", run)
    assert main(["demo", "--task", "long", "--preset", "full"]) == 2
    assert "--preset is for --task short" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", "--task", "longer"])

    assert not asked
    assert main(["demo", "--task", "long", "--seeds", "4", "--output-dir", "there"]) == 0
    assert (asked["folder"], asked["seeds"]) == ("there", [4])
    assert "response level detection, 1 seed(s)" in " ".join(capsys.readouterr().err.split())
