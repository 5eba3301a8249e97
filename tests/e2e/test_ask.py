"""What a run asks its models: every prompt once."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import tiny
import torch
from small import Said, word_problems, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import leaf.run
from leaf.config import RunConfig
from leaf.run import Run, run_stages
from leaf.tables import open_table

PROMPTS = ["Tom has 2 books.", "Eva", "How many books does Tom have now?", "The sign says"]
ASKING = ("select", "score", "prune", "verify")


class Counter:
    """Replaces `generate` of `leaf.run`: remembers the prompts of every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[list[str]] = []
        own = leaf.run.generate

        def generate(model, tokenizer, prompts, **options):
            self.calls.append(list(prompts))
            return own(model, tokenizer, prompts, **options)

        monkeypatch.setattr(leaf.run, "generate", generate)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    return Counter(monkeypatch).calls


@pytest.fixture
def lenient(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with graders that do not mind what a random model says."""
    (tmp_path / "lenient.py").write_text(
        "def right(response, answer):\n    return True\ndef even(response, answer):\n    return int(answer) % 2 == 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of a child process
    monkeypatch.delitem(sys.modules, "lenient", raising=False)
    return tmp_path


def run(folder: pathlib.Path, pair: dict[str, str], **options: Any) -> Run:
    return Run(RunConfig.from_mapping({**pair, "output": str(folder / "run"), "max_new_tokens": 4, **options}), Said())


def ask(one: Run, prompts: list[str], role: str = "teacher") -> dict[str, str]:
    return dict(one.ask(one.name(role), role, prompts))


def test_only_new_prompts_are_generated(tmp_path: pathlib.Path, pair: dict[str, str], asked: list[list[str]]) -> None:
    first = run(tmp_path, pair)
    found = ask(first, [*PROMPTS[:3], PROMPTS[0]])
    assert sorted(asked.pop()) == sorted(PROMPTS[:3])  # one of them came twice
    again = run(tmp_path, pair)
    more = ask(again, PROMPTS[::-1])
    assert asked.pop() == PROMPTS[3:]
    assert more.items() > found.items()
    assert again.ui == ["teacher: 3 of 4 prompts answered before"]
    assert ask(again, []) == {}
    assert ask(run(tmp_path / "fresh", pair), PROMPTS) == more  # whatever they shared a batch with
    assert len(asked) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 5},
        {"dtype": "bfloat16"},
        {"engine": "vllm"},
        {"chat_template": "none"},  # the same end of turn: the prompts are rendered text already
        {"teacher_quantization": "8bit"},
        {"max_tokens": 64},
        {"grader": "exact"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_response_depends_on(
    tmp_path: pathlib.Path,
    pair: dict[str, str],
    asked: list[list[str]],
    change: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask(run(tmp_path, pair), PROMPTS)
    monkeypatch.setattr(Run, "engine", lambda self, name: self.load(name))
    load = leaf.run.load_model
    monkeypatch.setattr(leaf.run, "load_model", lambda *args, **_: load(*args))  # without bitsandbytes
    ask(run(tmp_path, pair, **change), PROMPTS)
    again = bool({"max_new_tokens", "dtype", "engine", "teacher_quantization"} & set(change))
    assert len(asked) == 1 + again


def test_another_model_or_tokenizer_is_asked_again(
    tmp_path: pathlib.Path, pair: dict[str, str], asked: list[list[str]]
) -> None:
    ask(run(tmp_path, pair), PROMPTS)
    ask(run(tmp_path, pair), PROMPTS, "student")
    model = AutoModelForCausalLM.from_pretrained(pair["teacher"])
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(pair["teacher"]).save_pretrained(tmp_path / "other")
    ask(run(tmp_path, {**pair, "teacher": str(tmp_path / "other")}), PROMPTS)
    tokenizer = tiny.tokenizer(vocab_size=300)
    AutoModelForCausalLM.from_pretrained(pair["student"]).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    ask(run(tmp_path, {**pair, "student": str(tmp_path / "student")}), PROMPTS)
    assert len(asked) == 4


def test_a_change_asks_what_is_new_and_a_grader_nothing(
    tmp_path: pathlib.Path, pair: dict[str, str], lenient: pathlib.Path, asked: list[list[str]]
) -> None:
    options: dict[str, Any] = {
        **pair,
        "data": write_rows(tmp_path / "rows.jsonl", word_problems(6)),
        "select": "student_wrong",
        "verify": "both",
        "max_new_tokens": 4,
        "grader": "lenient:right",
    }

    def stages(names: tuple[str, ...] = ASKING, output: str = "run", **change: Any) -> Said:
        said = Said()
        run_stages(RunConfig.from_mapping({**options, "output": str(tmp_path / output), **change}), names, said)
        return said

    def prompts(output: str = "run") -> set[str]:
        return {row["prompt"] for row in open_table(tmp_path / output / "prune")}

    stages(select="teacher_right")
    assert len(asked) == 3  # the teacher twice, the student once
    before = prompts()
    asked.clear()

    said = stages(select="teacher_right", q=0.2)
    new = prompts() - before
    assert [sorted(call) for call in asked] == [sorted(new)] * 2
    assert 0 < len(new) < len(prompts())
    assert f"verify-teacher: {len(prompts()) - len(new)} of {len(prompts())} prompts answered before" in said
    stages(select="teacher_right", q=0.2, output="fresh")
    for name in ("select", "prune", "verify"):
        assert open_table(tmp_path / "run" / name).rows() == open_table(tmp_path / "fresh" / name).rows()
    asked.clear()

    said = stages(("select",), select="teacher_right", q=0.2, grader="lenient:even")
    assert not asked
    assert "select: 3 of 6 left (dropped:teacher_wrong 3)" in said
    rows = word_problems(7)
    write_rows(tmp_path / "rows.jsonl", [rows[6], *rows[:6]])
    said = stages(("select",), select="teacher_right", q=0.2)
    assert [len(call) for call in asked] == [1]
    assert "select-teacher: 6 of 7 prompts answered before" in said


# `kill -9` in the middle of writing the response whose number is given.
KILLED = """
import os, signal, sys
from leaf import cache, cli
own, left = cache.Responses.__setitem__, [int(sys.argv[1])]
def die(self, prompt, response):
    own(self, prompt, response)
    left[0] -= 1
    if not left[0]:
        os.truncate(self._own, os.path.getsize(self._own) - 5)
        os.kill(os.getpid(), signal.SIGKILL)
cache.Responses.__setitem__ = die
cli.main(sys.argv[2:])
"""


def test_kill_and_resume(
    tmp_path: pathlib.Path, pair: dict[str, str], lenient: pathlib.Path, asked: list[list[str]]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", word_problems(5))
    options = {**pair, "data": data, "max_new_tokens": 4, "grader": "lenient:right", "verify": "both"}

    def config(name: str) -> RunConfig:
        return RunConfig.from_mapping({**options, "output": str(tmp_path / name)})

    run_stages(config("whole"), ASKING)
    total = sum(map(len, asked))
    asked.clear()
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({**options, "output": str(tmp_path / "killed")}))  # JSON is YAML
    argv = [sys.executable, "-c", KILLED, "7", "run", "--config", str(file)]  # after 5 of select, the second of verify
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run_stages(config("killed"), ASKING)
    assert sum(map(len, asked)) == total - 6  # nothing that was written is asked again
    for name in ASKING:
        whole, resumed = (open_table(tmp_path / run / name) for run in ("whole", "killed"))
        assert (resumed.rows(), resumed.counts) == (whole.rows(), whole.counts)


def test_ranks_share_the_prompts(
    tmp_path: pathlib.Path, pair: dict[str, str], asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for the ranks: all they share is the folder."""
    prompts = [f"{'Tom has books. ' * (n % 4)}{n}" for n in range(9)]
    wanted = ask(run(tmp_path / "alone", pair), prompts)
    asked.clear()
    ranks = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        ranks.append(run(tmp_path, pair))
    # transformers replaces a method of all models while it loads one: not for threads
    load, one_at_a_time = Run.load, threading.Lock()

    def loaded(*args: Any, **kwargs: Any) -> Any:
        with one_at_a_time:
            return load(*args, **kwargs)

    monkeypatch.setattr(Run, "load", loaded)
    found: dict[int, dict[str, str]] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: ask(ranks[n], prompts)}), daemon=True) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[n] for n in range(3)] == [wanted] * 3
    assert [len(call) for call in asked] == [3] * 3
    assert sorted(prompt for call in asked for prompt in call) == sorted(prompts)
