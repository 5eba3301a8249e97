"""Stage 0: which rows to work on, by who answers them rightly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .data import Encoder, Rendered, Row, Skip
from .generate import Ask, Loader, asker
from .graders import Grader, checkable, resolve

SELECTIONS = ("student_wrong", "teacher_right", "all")


@dataclass(frozen=True)
class Answer:
    """What a model answered a row; `right` is None where the row has nothing to check it by."""

    response: str
    right: bool | None


@dataclass(frozen=True)
class Selected:
    """What became of a row: status "ok", "dropped" (by the selection) or "skipped" (unusable), and why.

    An "ok" row has the response that it is to be trained on. `reason` of an "ok" row is `no_checkable_answer` where it
    was kept without asking anyone, else None.
    """

    row: Row | None
    id: str
    status: str
    reason: str | None = None
    detail: str = ""
    teacher: Answer | None = None
    student: Answer | None = None


def roles(select: str, responses: str = "dataset") -> tuple[str, ...]:
    """Which models a selection asks.

    Raises:
        ValueError: an unknown selection.
    """
    if select not in SELECTIONS:
        raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, got {select!r}")
    if select == "student_wrong":
        return ("student", "teacher")
    return ("teacher",) if select == "teacher_right" or responses == "teacher" else ()


def select_rows(
    rows: Sequence[Row | Skip],
    encoder: Encoder,
    loaders: Mapping[str, Loader],
    *,
    select: str = "teacher_right",
    responses: str = "dataset",
    grader: str | Grader = "math",
    max_new_tokens: int = 512,
    max_tokens: int = 16384,
) -> Iterator[Selected]:
    """Asks the models that `select` needs, one resident at a time, and decides on every row, in order.

    Args:
        loaders: "teacher" and "student": functions without arguments that return the model.
        select: "student_wrong" keeps rows that the student answers wrongly and the teacher rightly (the paper),
            "teacher_right" rows that the teacher answers rightly, "all" every row.
        responses: "teacher" makes the teacher's answer the target (the dataset's stays where the teacher is wrong).
    """
    items = [unit for unit in rows if isinstance(unit, Row)]
    answers = {}
    for role in roles(select, responses):
        ask = asker(loaders[role], encoder, max_new_tokens=max_new_tokens, max_tokens=max_tokens)
        answers[role] = answer_rows(ask, encoder, items, grader=grader, ask_unchecked=responses == "teacher")
    for unit in rows:
        if isinstance(unit, Skip):
            yield Selected(None, unit.id, "skipped", unit.reason, unit.detail)
        else:
            given = {role: next(each) for role, each in answers.items()}
            yield decide(unit, given.get("teacher"), given.get("student"), select=select, responses=responses)


def answer_rows(
    ask: Ask,
    encoder: Encoder,
    rows: Sequence[Row],
    *,
    grader: str | Grader = "math",
    ask_unchecked: bool = False,
    first: int = 0,
) -> Iterator[Answer | Skip]:
    """What a model answers each row from `first` on, greedily, from the same prompt that it is scored and trained on.

    The model is asked at once, about all rows; answers are graded as they are read, in order. A row whose answer cannot be
    checked is asked only where `ask_unchecked`; else its response is "". A skip stands for a row that cannot be rendered,
    or whose prompt alone exceeds the encoder's `max_length`.
    """
    grade = resolve(grader)
    prompts = [_prompt(encoder, row) for row in rows]
    can_check = [row.answer is not None and checkable(grader, row.answer) for row in rows]
    said = ask([p for p, check in zip(prompts, can_check) if isinstance(p, str) and (check or ask_unchecked)])

    def answer(row: Row, prompt: str | Skip, check: bool) -> Answer | Skip:
        if isinstance(prompt, Skip):
            return prompt
        response = said[prompt] if check or ask_unchecked else ""
        return Answer(response, grade(response, row.answer) if check else None)  # type: ignore[arg-type]

    return map(answer, rows[first:], prompts[first:], can_check[first:])


def _prompt(encoder: Encoder, row: Row) -> str | Skip:
    rendered = encoder.render(row)
    if not isinstance(rendered, Rendered):
        return rendered
    prompt = rendered.text[: rendered.prompt_chars]
    limit = encoder.max_length
    if limit is not None:
        size = len(encoder.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        if size >= limit:
            return Skip(row.id, "too_long", f"the prompt alone has {size} tokens, max_length is {limit}")
    return prompt


def decide(
    row: Row, teacher: Answer | Skip | None, student: Answer | Skip | None, *, select: str, responses: str = "dataset"
) -> Selected:
    """What becomes of a row, from the answers of the models that were asked."""
    for answer in (teacher, student):
        if isinstance(answer, Skip):
            return Selected(row, row.id, "skipped", answer.reason, answer.detail)
    told = {"teacher": teacher, "student": student}
    own = row.messages[-1]["content"]
    if responses == "teacher" and isinstance(teacher, Answer) and teacher.right is not False:
        own = teacher.response
        row = dataclasses.replace(row, messages=[*row.messages[:-1], {**row.messages[-1], "content": own}])

    def selected(status: str, reason: str | None = None) -> Selected:
        return Selected(row, row.id, status, reason, **told)  # type: ignore[arg-type]

    if select == "student_wrong" and isinstance(student, Answer) and student.right:
        return selected("dropped", "student_right")
    if select != "all" and isinstance(teacher, Answer) and teacher.right is False:
        return selected("dropped", "teacher_wrong")
    if not own.strip():
        return selected("dropped", "no_response")
    unchecked = select != "all" and isinstance(teacher, Answer) and teacher.right is None
    return selected("ok", "no_checkable_answer" if unchecked else None)
