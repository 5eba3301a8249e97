"""`leaf doctor`: what it shows, and what it refuses."""

from __future__ import annotations

import io
import json
import pathlib
from typing import Any

import pytest
import tiny
from rich.console import Console

from leaf import doctor, sandbox
from leaf.config import RunConfig


def check(width: int = 200, **options: Any) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=width)
    ok = doctor.check(RunConfig.from_mapping(options), console)
    return ok, console.file.getvalue()  # type: ignore[attr-defined]


def save(folder: pathlib.Path, *, seed: int, tokenizer: Any = None, **options: Any) -> str:
    tokenizer = tokenizer or tiny.tokenizer()
    tiny.model(tokenizer, seed=seed, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pair(tmp_path: pathlib.Path) -> dict[str, str]:
    return {"teacher": save(tmp_path / "t", seed=1), "student": save(tmp_path / "s", seed=0)}


def test_the_machine_alone() -> None:
    ok, shown = check()
    assert ok
    for name in (*doctor.PACKAGES, "python", "cpu", "generated code"):
        assert name in shown


def test_what_first_launches_need(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("triton", reason="Triton launches kernels")
    monkeypatch.setattr(doctor, "precompiled_kernels", lambda gpus: "7 for sm_90")
    monkeypatch.setenv("CC", "/opt/cc")
    shown = check()[1]
    assert "7 for sm_90" in shown
    assert "/opt/cc" in shown or "Python.h" in shown
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda _: None)
    ok, shown = check()
    assert ok  # nothing on a CPU needs it
    assert "missing: a C compiler" in shown
    assert "not needed" in str(doctor._c_compiler(tmp_path))  # of a Triton that brings its launcher


def test_whether_generated_code_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ValueError("not safely [enough] here")

    monkeypatch.setattr(sandbox, "isolation", lambda: "namespaces")
    assert "can be run (--grader python), kept apart by namespaces" in check()[1]
    monkeypatch.setattr(sandbox, "isolation", refuse)
    ok, shown = check()
    assert ok  # nothing else needs it
    assert "--grader python is refused: not safely [enough] here" in shown


def test_long_paths_are_shown_whole(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "-".join(["experiment"] * 9)
    shown = check(width=80, teacher=save(folder / "t", seed=1), student=save(folder / "s", seed=0))[1]
    assert "…" not in shown
    (header,) = (line for line in shown.splitlines() if line.strip().startswith("teacher "))
    teacher, student = header.index("teacher"), header.index("student")
    lines = shown[shown.index("  model ") : shown.index("  architecture ")].splitlines()
    cells = zip(*((line[teacher:student].strip(), line[student:].strip()) for line in lines))
    assert ["".join(column) for column in cells] == [str(folder / "t"), str(folder / "s")]


@pytest.mark.parametrize("name", ["mistyped", "models/mistyped"])
def test_a_name_that_is_neither_a_folder_nor_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=f"there is no folder '{name}' here, and as a hub id: .*huggingface.co"):
        check(teacher=name, student=name)
    for path in (f"./{name}", f"../{name}"):
        with pytest.raises(ValueError, match="teacher: there is no folder"):
            check(teacher=path, student=path)


def test_a_good_pair_and_its_rows(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Tom has 2 böoks 中.", "completion": "2 plus 7"}, {"prompt": "Eva", "completion": ""}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok, shown = check(**pair, data=str(data))
    assert ok, shown
    assert "1 of 2" in shown
    assert "skipped: empty_response" in shown
    assert "böoks 中" in shown
    assert "2 plus 7" in shown
    assert "kept by the tokenizer" in shown
    assert "does not know" not in shown


def test_words_that_the_tokenizer_does_not_know(tmp_path: pathlib.Path) -> None:
    from leaf.demo.task import make_tokenizer

    tokenizer = make_tokenizer()
    words = {role: save(tmp_path / role, seed=n, tokenizer=tokenizer) for n, role in enumerate(("teacher", "student"))}
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Tom has 2 books .", "completion": "answer 2"}, {"prompt": "Natalia sold", "completion": "2"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, shown = check(**words, data=str(data))
    assert "1 of 2; the tokenizer does not know" in shown


def test_what_is_refused(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    same = {**pair, "teacher": pair["student"]}
    no_template = {**pair, "student": save(tmp_path / "n", seed=2, tokenizer=tiny.tokenizer(None))}
    for options, message in (
        (same, "teacher and student are the same model"),
        (no_template, "has no chat template: give --chat-template FILE"),
    ):
        ok, shown = check(**options)
        assert not ok
        assert message in shown
    assert check(**no_template, chat_template="none")[0]


def test_different_tokenizers_give_scores_only(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    other = {**pair, "teacher": save(tmp_path / "o", seed=1, tokenizer=tiny.unigram())}
    ok, shown = check(**other)
    assert ok
    assert "different tokenizers: scores only" in shown
    assert "the student's chat template is plain text to the teacher" in shown
    ok, shown = check(**other, chat_template="none")
    assert ok
    assert "cannot be distilled" in shown
    assert "plain text to the teacher" not in shown
    assert "different tokenizers" not in check(**pair)[1]
