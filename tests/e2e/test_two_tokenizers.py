"""Models with different tokenizers: everything up to an export, and nothing that trains."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import tiny
from small import Said, word_problems, write_rows

from leaf import cli
from leaf.config import RunConfig
from leaf.run import Run, run_all, run_stages
from leaf.tables import open_table

STAGES = ("select", "score", "prune", "verify", "report")


@pytest.fixture
def strangers(tmp_path: pathlib.Path, pair: dict[str, str]) -> dict[str, str]:
    """The student of `pair` and a teacher with another tokenizer."""
    tokenizer = tiny.unigram()
    tiny.model(tokenizer, seed=1, hidden=16, intermediate_size=32).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return {**pair, "teacher": str(tmp_path / "teacher")}


def config(folder: pathlib.Path, models: dict[str, str], **options: Any) -> RunConfig:
    defaults = {
        **models,
        "data": write_rows(folder / "rows.jsonl", word_problems(3)),
        "output": str(folder / "run"),
        "select": "all",
        "verify": "none",
        "max_new_tokens": 3,
        "level": "both",
    }
    return RunConfig.from_mapping({**defaults, **options})


def test_up_to_an_export(tmp_path: pathlib.Path, strangers: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kind.py").write_text("def right(response, answer):\n    return True\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        c = config(tmp_path, strangers, select="teacher_right", verify="both", grader="kind:right", q=0.2)
        said = Said()
        assert run_stages(c, STAGES, said) == []
        assert [message for message in said if "is plain text to the teacher" in message] == said[:1]
        again = Said()
        run_stages(c, STAGES, again)
    names = ("select", "score-teacher", "score-student", "score", "prune", "verify")
    assert {f"{name}: unchanged" for name in names} <= set(again)
    run = pathlib.Path(c.output)
    scores = open_table(run / "score").rows()
    assert [(row["status"], row["level"]) for row in scores] == [("ok", "instruction"), ("ok", "response")] * 3
    for row in scores:
        assert row["input_ids"] is None
        assert row["offsets"][row["response_start"]][0] == row["prompt_chars"]
        assert any(0 < score < 1 for score in row["score"] if score is not None)
    lengths = {role: [len(row["norm"]) for row in open_table(run / f"score-{role}")] for role in ("teacher", "student")}
    for row, of_teacher, of_student in zip(scores, *lengths.values(), strict=True):
        assert len(row["offsets"]) < min(of_teacher, of_student)
    kept = open_table(run / "verify").rows()
    assert {row["level"] for row in kept} == {"instruction", "response"}
    assert all(row["verified"] for row in kept)
    assert (run / "report.html").stat().st_size > 0
    assert cli.main(["export", "--output", c.output, "--format", "trl"]) == 0
    assert f"train.jsonl: {3 + len(kept)} records" in capsys.readouterr().out
    records = [json.loads(line) for line in (run / "export" / "train.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in kept} <= {record["prompt"] for record in records}


@pytest.mark.parametrize("stages", [("distill",), ("eval",), None])
def test_what_trains_is_refused_at_once(
    tmp_path: pathlib.Path, strangers: dict[str, str], stages: tuple[str, ...] | None
) -> None:
    c = config(tmp_path, strangers)
    with pytest.raises(ValueError, match="different tokenizers") as refused:
        run_all(c) if stages is None else run_stages(c, stages)
    message = str(refused.value)
    assert f"teacher {strangers['teacher']} cannot be distilled into student {strangers['student']}" in message
    assert "choose a teacher of the student's family" in message
    assert "`leaf export`" in message
    assert not (tmp_path / "run").exists()


def test_who_reads_with_what(tmp_path: pathlib.Path, strangers: dict[str, str], pair: dict[str, str]) -> None:
    run = Run(config(tmp_path, strangers))
    assert run.encoder_of(strangers["teacher"]) is run.reader is not None
    assert run.encoder_of(strangers["student"]) is run.encoder
    assert run.encoder_of("elsewhere/model") is run.encoder
    one = Run(config(tmp_path, pair))
    assert one.reader is None
    assert one.encoder_of(pair["teacher"]) is one.encoder
    alone = Run(config(tmp_path, {"student": pair["student"]}))
    assert alone.encoder_of(pair["student"]) is alone.encoder


def test_the_teacher_is_asked_in_its_own_way(
    tmp_path: pathlib.Path, strangers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import leaf.run

    asked: list[str] = []

    def said(model, tokenizer, prompts, **options):
        for prompt in prompts:
            asked.append(prompt)
            yield prompt, "2<|im_end|>3"

    monkeypatch.setattr(leaf.run, "generate", said)
    monkeypatch.setattr(Run, "engine", lambda self, model: None)
    run = Run(config(tmp_path, strangers))
    prompt = "<|im_start|>user\nHow many?"
    assert run.ask(strangers["teacher"], "teacher", [prompt]) == {prompt: "2"}
    assert run.ask(strangers["student"], "student", [prompt]) == {prompt: "2<|im_end|>3"}
    assert asked == [f"<s>{prompt}", prompt]
