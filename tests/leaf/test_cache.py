from __future__ import annotations

import pathlib

import pytest

from leaf.cache import Responses

TEXTS = {"p": "2 plus 7", "🙂 \u2028": 'line\n\r"quoted" 中', "": ""}


def filled(folder: pathlib.Path, writer: int = 0) -> Responses:
    responses = Responses(folder, writer)
    for prompt, response in TEXTS.items():
        responses[prompt] = response
    return responses


def test_another_process_finds_what_was_written(tmp_path: pathlib.Path) -> None:
    first = filled(tmp_path)
    for responses in (first, Responses(tmp_path), Responses(tmp_path, 1)):
        assert {prompt: responses[prompt] for prompt in TEXTS} == TEXTS
        assert "other" not in responses
        with pytest.raises(KeyError):
            responses["other"]


def test_every_cut_keeps_the_whole_lines_before_it(tmp_path: pathlib.Path) -> None:
    filled(tmp_path / "whole")
    content = (tmp_path / "whole" / "0.jsonl").read_bytes()
    for size in range(len(content)):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "0.jsonl").write_bytes(content[:size])
        for _ in range(2):  # the second time after a line was added
            responses = Responses(folder)
            whole = content[:size].count(b"\n")
            assert [prompt in responses for prompt in TEXTS] == [n < whole for n in range(3)]
            responses["new"] = "1"
            assert Responses(folder)["new"] == "1"


def test_a_damaged_line_counts_as_never_asked(tmp_path: pathlib.Path) -> None:
    filled(tmp_path)
    file = tmp_path / "0.jsonl"
    first, _, last = file.read_bytes().splitlines()
    for damaged in (b"\0" * 40, b'["a"]', b"7", b'["half'):
        file.write_bytes(b"\n".join((first, damaged, last, b"")))
        responses = Responses(tmp_path)
        assert [prompt in responses for prompt in TEXTS] == [True, False, True]


def test_what_others_add_is_read_once_it_is_whole(tmp_path: pathlib.Path) -> None:
    filled(tmp_path / "whole")
    content = (tmp_path / "whole" / "0.jsonl").read_bytes()
    mine = Responses(tmp_path, 0)
    mine["a"] = "1"
    for size in range(len(content)):
        with (tmp_path / "1.jsonl").open("ab") as file:
            file.write(content[size : size + 1])
        mine.refresh()
        assert [prompt in mine for prompt in TEXTS] == [n < content[: size + 1].count(b"\n") for n in range(3)]
    assert {prompt: mine[prompt] for prompt in (*TEXTS, "a")} == {**TEXTS, "a": "1"}
