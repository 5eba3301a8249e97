"""The grader `python`: what of a response is run, with which tests, and HumanEval's 164 problems."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import os
import pathlib

import pytest

from leaf import sandbox
from leaf.data import Row, read_rows
from leaf.graders import checkable, python, resolve

ASSERTS = json.dumps(["assert double(2) == 4", "assert double(-1) == -2"])
HUMANEVAL = json.dumps(
    {
        "prompt": 'from typing import List\n\n\ndef double(x: int) -> int:\n    """Twice."""\n',
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        "entry_point": "double",
    }
)
RIGHT = "def double(x):\n    return 2 * x\n"
WRONG = "def double(x):\n    return 3 * x\n"


@pytest.fixture
def runs() -> None:
    """Skips where no code can be run."""
    try:
        sandbox.isolation()
    except ValueError as error:
        pytest.skip(str(error))


RESPONSES = [
    (RIGHT, ASSERTS, True),
    (WRONG, ASSERTS, False),
    (RIGHT, json.dumps(["assert double(2) == 4", "assert double(3) == 7"]), False),
    ("", ASSERTS, False),
    (f"First a draft:\n```python\n{WRONG}```\nBetter:\n```python\n{RIGHT}```\nDone.", ASSERTS, True),
    (f"```python\n{RIGHT}```\nUse it:\n```python\nprint(double(int(input())))\n```", ASSERTS, True),
    (
        f"```python\n{RIGHT}```\nTested with:\n```python\ndef test():\n    assert double(1) == 3\ntest()\n```",
        ASSERTS,
        True,
    ),
    (f"```bash\npip install x\n```\n```py\n{RIGHT}", ASSERTS, True),  # never closed
    (f"```\n{RIGHT}```\n```text\ndef double(x): 4\n```", ASSERTS, True),
    (f"Here it is: {RIGHT}", ASSERTS, False),
    ("    return 2 * x\n", HUMANEVAL, True),
    ("    return 3 * x\n", HUMANEVAL, False),
    ("    return 2 * x\n\n\ndef other(y):\n    retu", HUMANEVAL, True),  # went on until its tokens were used up
    ("```python\n    y: List = [x, x]\n    return sum(y)\n```", HUMANEVAL, True),
    ("def double(x: List):\n    return 2 * x\n", HUMANEVAL, True),  # the prompt has the import
    ("double = lambda x: 2 * x", HUMANEVAL, True),
    ("    pass\n", HUMANEVAL, False),
    ("pass", HUMANEVAL, False),
    ("from __future__ import annotations\n\n" + RIGHT, HUMANEVAL, True),
    ("def check(candidate): pass\n", HUMANEVAL, False),  # the tests' own is the one that is called
]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(("response", "answer", "right"), RESPONSES)
def test_what_is_run(response: str, answer: str, right: bool) -> None:
    assert python(response, answer) is right


def test_only_tests_are_checkable() -> None:
    for answer in (ASSERTS, HUMANEVAL):
        assert checkable("python", answer)
        assert checkable(python, answer)
        assert not any(checkable(name, answer) for name in ("exact", "math", "qa"))
        assert checkable("module:function", answer)
        assert checkable(lambda response, answer: True, answer)
    others = ["", "9", "9 + 1", "[]", "{}", '"assert"', "[1]", '["Paris", "Lutetia"]', '["assert ("]', "assert True"]
    for answer in [*others, '{"test": "assert x", "prompt": ""}', "[" * 100000]:
        assert not checkable("python", answer), answer
    with pytest.raises(ValueError, match="the answer holds no tests"):
        python(RIGHT, "9")


def test_its_name_alone_runs_nothing() -> None:
    with pytest.raises(ValueError, match="--allow-code-execution"):
        resolve("python")


@pytest.mark.usefixtures("runs")
def test_the_function_is_an_allowance() -> None:
    assert resolve(python) is python


def test_refused_at_once_where_nothing_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ValueError("cannot be run safely enough")

    monkeypatch.setattr(sandbox, "isolation", refuse)
    with pytest.raises(ValueError, match="cannot be run safely enough"):
        resolve(python)


def test_tests_of_a_row_are_its_answer() -> None:
    asserts = {"id": "a", "context_messages": [{"role": "user", "content": "Double."}], "tests": json.loads(ASSERTS)}
    other = {"prompt": "p", "test": "class Test: ...", "entry_point": "double"}
    rows = [asserts, json.loads(HUMANEVAL), other, {**asserts, "answer": "9"}]
    read = list(read_rows(rows, responses="teacher"))
    answers = [row.answer for row in read if isinstance(row, Row)]
    assert answers == [ASSERTS, HUMANEVAL, None, "9"]
    (named,) = read_rows([asserts], answer_column="tests", responses="teacher")
    assert isinstance(named, Row)
    assert named.answer == ASSERTS


def humaneval(folder: pathlib.Path) -> list[Row]:
    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = list(read_rows(map(json.loads, file), response_column="canonical_solution"))
    assert len(rows) == 164
    assert all(isinstance(row, Row) and checkable("python", row.answer) for row in rows)
    return rows  # type: ignore[return-value]


def passed(responses: list[str], rows: list[Row]) -> list[str]:
    """Their tasks."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(pool.map(python, responses, [str(row.answer) for row in rows]))
    return [row.record["task_id"] for row, right in zip(rows, verdicts) if right]


@pytest.mark.usefixtures("runs")
def test_humaneval(test_data: pathlib.Path) -> None:
    rows = humaneval(test_data)
    tasks = [row.record["task_id"] for row in rows]
    bodies = [row.messages[-1]["content"] for row in rows]
    assert passed(bodies, rows) == tasks
    some = rows[::8]
    assert passed(["    return None\n"] * len(some), some) == []


@pytest.mark.slow
@pytest.mark.usefixtures("runs")
def test_humaneval_in_every_form(test_data: pathlib.Path) -> None:
    rows = humaneval(test_data)
    tasks = [row.record["task_id"] for row in rows]
    whole = [row.record["prompt"] + row.messages[-1]["content"] for row in rows]
    assert passed(whole, rows) == tasks
    assert passed([f"Here it is.\n\n```python\n{program}\n```\nIt works." for program in whole], rows) == tasks
    for body in ("    return None\n", "    import os\n    os._exit(0)\n", "    raise SystemExit(0)\n"):
        assert passed([body] * len(rows), rows) == []
    others = rows[1:] + rows[:1]
    assert passed([row.messages[-1]["content"] for row in others], rows) == []
