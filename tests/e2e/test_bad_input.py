"""Bad input: a clear error or a counted skip, and nothing that was written before is lost or half-written."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import tiny
import torch
from small import word_problems, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaForCausalLM

from leaf import cli
from leaf.tables import open_table


class Leaf:
    """The command line on one run directory."""

    def __init__(self, folder: pathlib.Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]):
        self.folder, self.pair, self.capsys = folder, dict(pair), capsys
        self.output = folder / "run"

    def __call__(self, command: str, *flags: str, rows: list[dict[str, Any]] | str | None = None) -> tuple[int, str]:
        """(exit code, what was said). `rows`: the content of the data file."""
        argv = [command, *flags, "--output", str(self.output)]
        if command != "prune":
            argv += [part for role, name in self.pair.items() for part in (f"--{role}", name)]
        if rows is not None:
            path = self.folder / "rows.jsonl"
            if isinstance(rows, str):
                path.write_text(rows, encoding="utf-8")
            else:
                write_rows(path, rows)
            argv += ["--data", str(path)]
        code = cli.main(argv)
        return code, self.capsys.readouterr().err

    def model(self, name: str, *, seed: int = 3, tokenizer: Any = None) -> str:
        tokenizer = tokenizer or tiny.tokenizer()
        folder = self.folder / name
        size = {"vocab_size": 512} if isinstance(tokenizer, ByT5Tokenizer) else {}
        tiny.model(tokenizer, seed=seed, hidden=16, **size).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)


@pytest.fixture
def leaf(tmp_path: pathlib.Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Leaf:
    return Leaf(tmp_path, pair, capsys)


ALL = ("--select", "all")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "no rows in it"),
        ("\n\n", "no rows in it"),
        ('{"prompt": "a"}\n', "line 1: no response"),
        ('{"completion": "a"}\n', "line 1: no prompt"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2 is not valid JSON"),
        ("[1, 2]", "a row must be an object"),
        ('{"prompt": 3, "completion": "b"}', "field 'prompt' must be text"),
    ],
)
def test_files_that_cannot_be_read(leaf: Leaf, rows: str, message: str) -> None:
    leaf("select", *ALL, rows=word_problems(2))
    kept = open_table(leaf.output / "select").rows()
    code, said = leaf("select", *ALL, rows=rows)
    assert code == 2
    assert message in said
    assert said.startswith("leaf select: ")
    assert open_table(leaf.output / "select").rows() == kept  # what was there is still there


def test_rows_that_cannot_be_used_are_counted(leaf: Leaf) -> None:
    good = word_problems(3)
    long = {**good[0], "id": "long", "prompt": "many words " * 200}
    bad = [{"id": "empty", "prompt": "a", "completion": " "}, {"id": "none", "prompt": "", "completion": "a"}, long]
    code, said = leaf("select", *ALL, rows=[bad[0], good[0], bad[1], good[1], bad[2], good[2]])
    assert code == 1
    assert "2 of 6 rows were skipped" in said
    assert open_table(leaf.output / "select").counts == {
        "ok": 4,
        "skipped:empty_prompt": 1,
        "skipped:empty_response": 1,
    }
    code, said = leaf("score", "--max-length", "200")
    assert code == 1
    assert "1 of 4 rows were skipped, more than --max-skip-fraction 0.01 (skipped:too_long 1)" in said
    fate = [(row["id"], row["status"], row["reason"], row["detail"]) for row in open_table(leaf.output / "score")]
    assert [each for each in fate if each[1] == "ok"] == [(f"p{n}", "ok", None, None) for n in range(3)]
    (name, status, reason, detail) = fate[2]
    assert (name, status, reason) == ("long", "skipped", "too_long")
    assert "max_length is 200" in detail
    assert leaf("score", "--max-length", "200", "--max-skip-fraction", "0.5")[0] == 0
    assert leaf("prune", "--verify", "none")[0] == 0  # the skipped row does not stop what follows


def test_models_that_cannot_be_used(leaf: Leaf) -> None:
    assert leaf("select", *ALL, rows=word_problems(2))[0] == 0
    for pair, message in (
        ({"teacher": leaf.pair["student"]}, "teacher and student are the same model"),
        ({"student": leaf.model("plain", tokenizer=tiny.tokenizer(None))}, "the tokenizer has no chat template"),
        ({"student": leaf.model("slow", tokenizer=ByT5Tokenizer())}, "is a slow tokenizer"),
        ({"student": str(leaf.folder / "absent")}, "student: there is no folder"),
        ({"student": "mistyped"}, "there is no folder 'mistyped' here, and as a hub id: "),
        ({"teacher": "models/mistyped"}, "there is no folder 'models/mistyped' here, and as a hub id: "),
    ):
        before = leaf.pair
        leaf.pair = {**before, **pair}
        code, said = leaf("score")
        leaf.pair = before
        assert code == 2, said
        assert message in said
        assert said.startswith("leaf score: ")
    assert not (leaf.output / "score").exists()
    assert leaf("score")[0] == 0


def test_a_template_that_trims_and_prints_dates(leaf: Leaf) -> None:
    tokenizer = tiny.tokenizer("llama3")
    leaf.pair = {
        "teacher": leaf.model("t", seed=5, tokenizer=tokenizer),
        "student": leaf.model("s", tokenizer=tokenizer),
    }
    rows = [
        {**row, "prompt": f"  {row['prompt']}\n", "completion": f" {row['completion']} "} for row in word_problems(2)
    ]
    assert leaf("select", *ALL, rows=rows)[0] == 0
    assert leaf("score")[0] == 0
    text = open_table(leaf.output / "score").rows()[0]["text"]
    assert "Today: 26 Jul 2024" in text  # pinned: the same tomorrow
    assert rows[0]["prompt"].strip() in text
    assert "score: unchanged" in leaf("score")[1]
    _, said = leaf("score", "--template-date", "2025-01-02")
    assert 'template_date (null -> "2025-01-02")' in said


def test_multi_byte_text_survives(leaf: Leaf) -> None:
    rows = [
        {"prompt": "Tom 👩‍👩‍👧 hat 3 Äpfel, 五 книг и ١٢. Wie viele?", "completion": "3 🍎 — also ٣"},
        {"prompt": "e\u0301 \u200b 𝔘nicode \U0001f600\U0001f600", "completion": "ﬁ"},
    ]
    assert leaf("select", *ALL, rows=rows)[0] == 0
    assert leaf("score", "--max-skip-fraction", "0")[0] == 0
    assert leaf("prune", "--verify", "none", "--q", "0.3")[0] == 0
    text = {row["id"]: row["text"] for row in open_table(leaf.output / "score")}
    pruned = open_table(leaf.output / "verify").rows()
    assert pruned
    for row in pruned:
        source = text[row["source_id"]]
        kept = "".join(char for n, char in enumerate(source) if not any(a <= n < b for a, b in row["removed"]))
        assert row["prompt"] + row["response"] == kept


def test_models_that_give_nan(leaf: Leaf) -> None:
    broken = AutoModelForCausalLM.from_pretrained(leaf.pair["student"])
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    broken.save_pretrained(leaf.folder / "nan")
    AutoTokenizer.from_pretrained(leaf.pair["student"]).save_pretrained(leaf.folder / "nan")
    assert leaf("select", *ALL, rows=word_problems(2))[0] == 0
    good = leaf.pair
    leaf.pair = {**good, "student": str(leaf.folder / "nan")}
    code, said = leaf("score")
    assert code == 2
    assert "no row is left after score (skipped:non_finite 2)" in said
    assert [row["reason"] for row in open_table(leaf.output / "score")] == ["non_finite"] * 2

    leaf.pair = good
    assert leaf("score")[0] == 0
    assert leaf("prune", "--verify", "none")[0] == 0
    kept = open_table(leaf.output / "verify").rows()
    code, said = leaf("distill", "--learning-rate", "1e30", "--max-steps", "5", "--batch-size", "2")
    assert code == 2
    assert "the loss is nan" in said
    assert not (leaf.output / "model").exists()
    assert open_table(leaf.output / "verify").rows() == kept
    assert leaf("distill", "--max-steps", "1", "--batch-size", "2")[0] == 0
    assert (leaf.output / "model" / "model.safetensors").exists()


def test_no_rows_left_names_the_remedy(leaf: Leaf) -> None:
    rows = word_problems(2)
    flags = ("--select", "teacher_right", "--max-new-tokens", "2")
    code, said = leaf("select", *flags, rows=rows)
    assert code == 2
    assert "no row is left after select (dropped:teacher_wrong 2); try --select" in said
    assert json.loads((leaf.output / "select" / "manifest.json").read_text())["shards"]
    code, said = leaf("run", *flags, "--max-steps", "1", rows=rows)  # stops there, and says so again
    assert code == 2
    assert "select: unchanged" in said
    assert not (leaf.output / "score").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "cuda"), "sees no GPU; use --device cpu"),
        (("--device", "gpu"), "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (("--grader", "pyton"), "'pyton'"),
        (("--grader", "python"), "allow it with --allow-code-execution"),
    ],
)
def test_what_is_misspelt_is_told_before_anything_runs(leaf: Leaf, flags: tuple[str, ...], message: str) -> None:
    if flags[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, said = leaf("run", *flags, rows=word_problems(4))
    assert (code, leaf.output.exists()) == (2, False)
    assert message in said


def test_a_pair_without_a_chat_template_runs_to_the_end(leaf: Leaf) -> None:
    for role, seed in (("teacher", 1), ("student", 0)):
        leaf.pair[role] = leaf.model(role, seed=seed, tokenizer=tiny.tokenizer(None))
    options = (
        "--chat-template",
        "none",
        "--select",
        "all",
        "--verify",
        "none",
        "--max-steps",
        "1",
        "--batch-size",
        "2",
    )
    code, said = leaf("run", *options, "--max-new-tokens", "2", rows=word_problems(4))
    assert code == 0, said
    assert (leaf.output / "model" / "model.safetensors").exists()
    code, said = leaf("distill", "--chat-template", "none", "--max-steps", "1", "--batch-size", "2")
    assert (code, "unchanged" in said) == (0, True)


def test_what_cannot_generate_is_an_error(
    tmp_path: pathlib.Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = Leaf(tmp_path, pair, capsys)
    assert leaf("select", "--engine", "vllm", rows=word_problems(2)) == (
        2,
        "leaf select: --engine vllm: vllm is not installed: `pip install vllm`, or leave out --engine vllm\n",
    )

    def generate(self: Any, *args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    code, said = leaf("select", rows=word_problems(2))
    assert code == 2
    assert "new ones does not fit into the memory of cpu, even alone: lower --max-new-tokens" in said
