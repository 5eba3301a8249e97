from __future__ import annotations

import sys
import threading
import types

import pytest

from leaf.graders import checkable, f1, grade, resolve

CASES = [
    ("exact", " 9\n", "9", True),
    ("exact", "the answer is 9", "9", False),
    ("math", "2 plus 7 equals 9.\n#### 9", "So <<2+7=9>>9\n#### 9", True),
    ("math", "It is 9, no: #### 8", "#### 9", False),
    ("math", "So we get \\boxed{0.5}", "\\frac{1}{2}", True),
    ("math", "so $\\boxed{1+x}$", "x+1", True),
    ("math", "so \\boxed{x+2}", "x+1", False),
    ("math", "#### 70,000", "70000", True),
    ("math", "I do not know", "3", False),
    ("math", "", "3", False),
    ("qa", "Reasoning... So the answer is The Eiffel Tower.", "eiffel tower", True),
    ("qa", "Paris", '["Lutetia", "paris"]', True),
    ("qa", "Paris, France", "Paris", False),
]


@pytest.mark.parametrize(("grader", "response", "answer", "right"), CASES)
def test_graders(grader: str, response: str, answer: str, right: bool) -> None:
    assert grade(grader, response, answer) is right


def test_f1_takes_the_best_alias() -> None:
    assert f1("Answer: big red house", '["red house", "cat"]') == pytest.approx(0.8)
    assert f1("x", "y") == 0
    assert f1("the", "a") == 1  # both empty once normalised


def test_own_function(monkeypatch) -> None:
    module = types.ModuleType("own_grader")
    module.starts = lambda response, answer: 1 if response.startswith(answer) else 0
    module.constant = 3
    monkeypatch.setitem(sys.modules, "own_grader", module)
    assert grade("own_grader:starts", "9 apples", "9") is True
    assert grade(lambda response, answer: response > answer, "b", "a") is True
    for name, message in [
        ("own_grader:missing", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("own_grader:constant", "is not a function"),
        ("python", "--allow-code-execution"),
        ("rouge", "must be exact, math, qa, python or module:function"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve(name)


def test_checkable() -> None:
    assert checkable("math", "3")
    assert not checkable("exact", None)
    assert not checkable("qa", " ")
    assert not checkable("math", "####")


def test_math_outside_the_main_thread() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(grade("math", "#### 12345", "12345")))
    thread.start()
    thread.join()
    assert found == [True]
