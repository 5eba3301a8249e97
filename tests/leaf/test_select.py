from __future__ import annotations

import pytest
import tiny

from leaf.data import Encoder, Row, Skip, read_rows
from leaf.generate import asker
from leaf.select import Answer, Selected, answer_rows, decide, roles, select_rows

RIGHT, WRONG, UNCHECKED = Answer("r", True), Answer("w", False), Answer("u", None)


def row(response: str = "own", answer: str | None = "9") -> Row:
    (made,) = read_rows([{"prompt": "How many?", "completion": response, "answer": answer}], responses="teacher")
    assert isinstance(made, Row)
    return made


@pytest.mark.parametrize(
    ("select", "teacher", "student", "status", "reason"),
    [
        ("student_wrong", RIGHT, WRONG, "ok", None),
        ("student_wrong", RIGHT, RIGHT, "dropped", "student_right"),
        ("student_wrong", WRONG, WRONG, "dropped", "teacher_wrong"),
        ("student_wrong", UNCHECKED, UNCHECKED, "ok", "no_checkable_answer"),
        ("teacher_right", RIGHT, None, "ok", None),
        ("teacher_right", WRONG, None, "dropped", "teacher_wrong"),
        ("teacher_right", UNCHECKED, None, "ok", "no_checkable_answer"),
        ("all", None, None, "ok", None),
        ("teacher_right", Skip("0", "too_long", "d"), None, "skipped", "too_long"),
    ],
)
def test_decide(select: str, teacher, student, status: str, reason: str | None) -> None:
    found = decide(row(), teacher, student, select=select)
    assert (found.status, found.reason) == (status, reason)
    assert found.row is not None
    assert found.row.messages[-1]["content"] == "own"


@pytest.mark.parametrize(
    ("select", "teacher", "own", "status", "response"),
    [
        ("teacher_right", RIGHT, "own", "ok", "r"),
        ("all", UNCHECKED, "", "ok", "u"),
        ("all", WRONG, "own", "ok", "own"),
        ("all", WRONG, "", "dropped", ""),
        ("all", Answer(" ", None), "own", "dropped", " "),
    ],
)
def test_the_teachers_answer_as_target(select: str, teacher: Answer, own: str, status: str, response: str) -> None:
    found = decide(row(own), teacher, None, select=select, responses="teacher")
    assert found.row is not None
    assert (found.status, found.row.messages[-1]["content"]) == (status, response)


def test_roles() -> None:
    assert roles("student_wrong") == ("student", "teacher")
    assert roles("teacher_right") == roles("all", "teacher") == ("teacher",)
    assert roles("all") == ()
    with pytest.raises(ValueError, match="select must be one of student_wrong, teacher_right, all"):
        roles("best")


def test_select_rows() -> None:
    tokenizer = tiny.tokenizer()
    encoder = Encoder(tokenizer, max_length=60)
    models = {
        role: tiny.model(tokenizer, seed=n, initializer_range=0.5) for n, role in enumerate(("teacher", "student"))
    }
    questions = ["How many?", "Tom has 2 books.", "The sign says 9.", "x" * 300]
    records = [{"prompt": q, "completion": "own", "answer": "?"} for q in questions]
    records.append({"prompt": "no answer", "completion": "own"})
    records.append({"prompt": "empty", "completion": "", "answer": "1"})
    asked = [row for row in read_rows(records) if isinstance(row, Row)]
    said = {
        role: list(
            answer_rows(asker(lambda model=model: model, encoder, max_new_tokens=5), encoder, asked, grader="exact")
        )
        for role, model in models.items()
    }
    records[0]["answer"] = said["teacher"][0].response.strip() or "empty"  # only the teacher is right
    records[1]["answer"] = said["student"][1].response.strip()
    assert records[0]["answer"] != said["student"][0].response.strip()
    loaded: list[str] = []

    def loader(role: str):
        def load():
            loaded.append(role)
            return models[role]

        return load

    loaders = {role: loader(role) for role in models}
    rows = list(read_rows(records))
    found = list(select_rows(rows, encoder, loaders, select="student_wrong", grader="exact", max_new_tokens=5))
    assert loaded == ["student", "teacher"]
    assert [(s.id, s.status, s.reason) for s in found] == [
        ("0", "ok", None),
        ("1", "dropped", "student_right"),
        ("2", "dropped", "teacher_wrong"),
        ("3", "skipped", "too_long"),
        ("4", "ok", "no_checkable_answer"),
        ("5", "skipped", "empty_response"),
    ]
    assert found[0].teacher == said["teacher"][0].__class__(said["teacher"][0].response, True)
    everything = list(select_rows(rows, encoder, {}, select="all"))
    assert [s.status for s in everything] == ["ok"] * 5 + ["skipped"]
    assert isinstance(everything[0], Selected)


def test_rows_that_cannot_be_checked_are_not_asked() -> None:
    encoder, asked = Encoder(tiny.tokenizer()), []

    def ask(prompts):
        asked.append(len(prompts))
        return dict.fromkeys(prompts, "x")

    rows = list(
        read_rows([{"prompt": "How many", "completion": "2"}, {"prompt": "a", "completion": "x", "answer": "x"}])
    )
    for unchecked, count in ((False, 1), (True, 2)):
        answers = list(answer_rows(ask, encoder, rows, grader="exact", ask_unchecked=unchecked))
        assert [answer.right for answer in answers] == [None, True]
        assert asked.pop() == count
