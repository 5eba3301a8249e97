"""A run from rows to a report; what is computed again, and why."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from small import Said, word_problems, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from leaf import cli, sandbox
from leaf.config import RunConfig
from leaf.demo.models import Size, make_model
from leaf.demo.task import make_rows, make_tokenizer
from leaf.run import run_all, run_stages
from leaf.tables import open_table

TABLES = ("select", "score-teacher", "score-student", "score", "prune", "verify", "distill", "eval")


def config(folder: pathlib.Path, pair: dict[str, str], **options: Any) -> RunConfig:
    defaults = {
        **pair,
        "data": write_rows(folder / "rows.jsonl", word_problems(6)),
        "output": str(folder / "run"),
        "select": "all",
        "verify": "none",
        "max_new_tokens": 4,
        "level": "both",
        "training": {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 3},
    }
    return RunConfig.from_mapping({**defaults, **options})


def test_every_stage_has_output(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    c = config(tmp_path, pair)
    said = Said()
    assert run_all(c, said) == []
    output = pathlib.Path(c.output)
    for name in TABLES:
        assert len(open_table(output / name)) > 0, name
    for name in ("report.html", "tokens.csv", "plots/scores.png"):
        assert (output / name).stat().st_size > 0, name
    before, after = (AutoModelForCausalLM.from_pretrained(name) for name in (c.student, output / "model"))
    assert AutoTokenizer.from_pretrained(output / "model").chat_template
    assert before.state_dict().keys() == after.state_dict().keys()
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert open_table(output / "distill").counts == {"groups": 6, "steps": 2}
    assert any("sample p0: [-deleted-] in its first counterfactual" in message for message in said)
    card = ModelCard.load(output / "model" / "README.md")
    assert (card.data.base_model, card.data.eval_results) == ("student", None)
    assert "rows that the student was trained on" in card.text, "no --eval-data was given"
    assert (output / "model" / "pruned_sample.png").stat().st_size > 0
    assert [row["model"] for row in open_table(output / "eval")] == ["before", "after"]
    scores = open_table(output / "score").rows()
    assert [(row["id"], row["level"]) for row in scores[:2]] == [("p0", "instruction"), ("p0", "response")]
    text = {(row["id"], row["level"], row["cut"]): row["text"] for row in scores}
    for row in open_table(output / "verify"):
        source = text[row["source_id"], row["level"], row["cut"]]
        kept = "".join(char for n, char in enumerate(source) if not any(a <= n < b for a, b in row["removed"]))
        assert row["prompt"] + row["response"] == kept

    again = Said()
    assert run_all(c, again) == []
    assert {f"{name}: unchanged" for name in TABLES} <= set(again)
    assert not any("computed again" in message for message in again)


def test_what_a_change_reruns(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    stages = ("select", "score", "prune", "verify")
    run_stages(config(tmp_path, pair), stages)

    said = Said()
    run_stages(config(tmp_path, pair, q=0.2), stages, said)
    assert {f"{name}: unchanged" for name in ("select", "score-teacher", "score-student", "score")} <= set(said)
    assert "prune: computed again, because q (0.05 -> 0.2) changed" in said
    assert any(m.startswith("verify: computed again, because counterfactuals") for m in said)

    student = AutoModelForCausalLM.from_pretrained(pair["student"])
    torch.nn.init.normal_(student.lm_head.weight)
    student.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(pair["student"]).save_pretrained(tmp_path / "other")
    said = Said()
    run_stages(config(tmp_path, pair, q=0.2, student=str(tmp_path / "other")), stages, said)
    assert {"select: unchanged", "score-teacher: unchanged"} <= set(said)
    assert any(m.startswith("score-student: computed again, because model") for m in said)


def test_generation_verification_and_export(
    tmp_path: pathlib.Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A grader that accepts everything: the models are random."""
    (tmp_path / "lenient.py").write_text("def right(response, answer):\n    return True\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        c = config(tmp_path, pair, select="teacher_right", verify="both", grader="lenient:right", level="instruction")
        said = Said()
        run_stages(c, ("select", "score", "prune", "verify"), said)
    assert "select: 6 of 6 left (none skipped)" in said
    assert all(row["verified"] is True for row in open_table(f"{c.output}/verify"))
    assert open_table(f"{c.output}/select").rows()[0]["teacher_right"] is True
    assert "select-teacher: 0 of 6 prompts answered before" in said
    assert cli.main(["export", "--output", c.output]) == 0
    assert "train.json: " in capsys.readouterr().out
    assert (pathlib.Path(c.output) / "export" / "scores.json").exists()


def test_code_is_run_where_that_is_allowed(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    try:
        sandbox.isolation()
    except ValueError as error:
        pytest.skip(str(error))
    rows = [{"prompt": f"Write f({n}).", "completion": "def f(): ...", "tests": ["assert True"]} for n in range(2)]
    data = write_rows(tmp_path / "code.jsonl", [*rows, *word_problems(1)])
    c = config(tmp_path, pair, data=data, select="teacher_right", grader="python", allow_code_execution=True)
    run_stages(c, ("select",))
    rights = [row["teacher_right"] for row in open_table(f"{c.output}/select")]
    assert rights == [False, False, None]  # random text does not compile
    assert open_table(f"{c.output}/select").counts == {"dropped:teacher_wrong": 2, "ok:no_checkable_answer": 1}


def test_training_fields_are_checked_before_anything_runs(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    for training, message in (
        ({"learning_rat": 1e-3}, "no field 'learning_rat'; did you mean 'learning_rate'"),
        ({"lambda_": 0.3}, "use the option beside `training`"),
    ):
        with pytest.raises(ValueError, match=message):
            run_all(config(tmp_path, pair, training=training))
    assert not (tmp_path / "run").exists()


def test_the_example_runs_on_what_the_demo_writes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On untrained models, whose answers verify nothing."""
    tokenizer = make_tokenizer()
    for role, hidden in (("teacher", 32), ("student", 16)):
        make_model(tokenizer, Size(hidden), seed=0).save_pretrained(tmp_path / "out" / "models" / role)
        tokenizer.save_pretrained(tmp_path / "out" / "models" / role)
    write_rows(tmp_path / "out" / "rows.jsonl", make_rows("corpus", 10, seed=0))
    example = pathlib.Path(__file__).parents[2] / "examples" / "own_rows.yaml"
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--config", str(example), "--select", "all", "--verify", "none"]) == 0
    output = tmp_path / "out" / "own_rows"
    assert (output / "report.html").exists()
    assert open_table(output / "distill").counts == {"groups": 10, "steps": 5}
    assert [row["checked"] for row in open_table(output / "eval")] == [10, 10]


def test_attention_dropout_is_set_aside(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    tokenizer = tiny.tokenizer()
    for role, seed in (("teacher", 1), ("student", 0)):
        tiny.model(tokenizer, arch="gpt2", seed=seed, hidden=16, attn_pdrop=0.1).save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    said = Said()
    models = {role: str(tmp_path / role) for role in pair}
    run_stages(config(tmp_path, models), ("select", "score", "prune", "verify", "distill"), said)
    assert f"{tmp_path / 'student'}: attn_pdrop is set to 0" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.attn_pdrop == 0
