"""Whether a response answers its row rightly."""

from __future__ import annotations

import ast
import collections
import functools
import importlib
import json
import re
import string
import threading
from collections.abc import Callable

from . import sandbox

Grader = Callable[[str, str], bool]


def grade(grader: str | Grader, response: str, answer: str) -> bool:
    """Whether `response` answers as `answer` says.

    Args:
        grader: "exact" (equal but for spaces around), "math" (equal as mathematics: after `####`, in `\\boxed{}`, else
            the last expression; math-verify), "qa" (equal after SQuAD's normalisation; an answer that is a JSON list holds
            aliases), "module:function", called with (response, answer), or the function `python` itself.
    """
    return resolve(grader)(response, answer)


def resolve(grader: str | Grader) -> Grader:
    """The function behind a grader's name.

    Raises:
        ValueError: no such grader, module or function; "python" by its name, which nobody has allowed to run code, or
            where code cannot be run (see `leaf.sandbox`).
    """
    if grader is python:
        sandbox.isolation()
    if callable(grader):
        return grader
    if grader in GRADERS:
        return GRADERS[grader]
    if grader == "python":
        raise ValueError(
            "grader 'python' runs generated code on this machine, with few rights but behind no security boundary: allow it "
            "with --allow-code-execution (from Python: pass the function leaf.graders.python)"
        )
    module, colon, name = grader.partition(":")
    if not colon:
        raise ValueError(f"grader must be {', '.join(GRADERS)}, python or module:function, got {grader!r}")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"grader {grader!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise ValueError(f"grader {grader!r} is not a function")
    return lambda response, answer: bool(function(response, answer))


def checkable(grader: str | Grader, answer: str | None) -> bool:
    """Whether there is a reference answer that the grader can compare with."""
    if not answer or not answer.strip():
        return False
    runs_code = grader in ("python", python)
    if (runs_code or grader in GRADERS) and (_tests(answer) is not None) != runs_code:
        return False  # a function of the user's may want either
    return grader != "math" or bool(_parse(_reference(answer)))


def exact(response: str, answer: str) -> bool:
    return response.strip() == answer.strip()


def math(response: str, answer: str) -> bool:
    import math_verify

    found = _parse(_final(response))
    return bool(found) and math_verify.verify(_parse(_reference(answer)), found, timeout_seconds=_seconds())


def _final(text: str) -> str:
    """GSM8K's convention: the answer stands behind the last `####`."""
    return text.rpartition("####")[2].strip()


def _reference(answer: str) -> str:
    final = _final(answer)
    return final if "$" in final or "\\boxed" in final else f"\\boxed{{{final}}}"


@functools.lru_cache(maxsize=4096)  # a reference answer is compared with many responses
def _parse(text: str) -> list:
    import math_verify

    return math_verify.parse(text, parsing_timeout=_seconds())


def _seconds() -> int | None:
    """math-verify stops long computations by an alarm signal, which only the main thread can receive."""
    return 5 if threading.current_thread() is threading.main_thread() else None


def qa(response: str, answer: str) -> bool:
    said = normalise(response)
    return any(said == normalise(alias) for alias in _aliases(answer))


def f1(response: str, answer: str) -> float:
    """SQuAD's token F1 with the best of the aliases."""

    def score(said: collections.Counter[str], wanted: collections.Counter[str]) -> float:
        common = (said & wanted).total()
        return 2 * common / (said.total() + wanted.total()) if common else float(said == wanted)

    said = collections.Counter(normalise(response).split())
    return max(score(said, collections.Counter(normalise(alias).split())) for alias in _aliases(answer))


def normalise(text: str) -> str:
    """SQuAD's: what follows the last "answer is" or "answer:", lower case, no punctuation or articles, single spaces."""
    text = re.split(r"answer(?:\s+is\b|\s*:)", text.lower())[-1]
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _aliases(answer: str) -> list[str]:
    try:
        value = json.loads(answer)
    except json.JSONDecodeError:
        return [answer]
    return [str(alias) for alias in value] if isinstance(value, list) and value else [answer]


def python(response: str, answer: str) -> bool:
    """Whether the program in a response passes the tests in `answer`; it is run, as `leaf.sandbox` says.

    The program is the last fenced block of Python that defines a name which the tests use, else the last block, else the
    whole response. A body alone goes on in the prompt's function.

    Args:
        answer: a JSON list of statements, or a JSON object with HumanEval's `prompt`, `test` and `entry_point`.
    """
    tests = _tests(answer)
    if tests is None:
        raise ValueError(
            f"grader 'python': the answer holds no tests (a JSON list of asserts, or HumanEval's fields): {answer!r}"
        )
    return sandbox.passes(_program(response, tests["tests"]), **tests)


def _program(response: str, tests: str) -> str:
    fenced = re.findall(r"^```[ \t]*(\w*).*?\n(.*?)(?:^```|\Z)", response, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if language.lower() in ("", "py", "python", "python3")]
    used = set(re.findall(r"\w+", tests))
    defining = [block for block in blocks if used.intersection(re.findall(r"\b(?:def|class)\s+(\w+)", block))]
    return (defining or blocks or [response])[-1]


@functools.lru_cache(maxsize=4096)
def _tests(answer: str) -> dict[str, str] | None:
    """`prompt` and `tests` of a program; None where the answer is of another kind."""
    try:
        value = json.loads(answer)
        if isinstance(value, dict):
            prompt, tests = value.get("prompt", ""), f"{value['test']}\n\ncheck({value['entry_point']})\n"
        else:
            prompt, tests = "", "\n".join(value)
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(tests)))
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError):
        return None
    return {"prompt": prompt, "tests": tests} if asserts else None


GRADERS: dict[str, Grader] = {"exact": exact, "math": math, "qa": qa}
