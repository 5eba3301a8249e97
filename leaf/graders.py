"""Whether a response answers its row rightly."""

from __future__ import annotations

import collections
import functools
import importlib
import json
import re
import string
import threading
from collections.abc import Callable

Grader = Callable[[str, str], bool]


def grade(grader: str | Grader, response: str, answer: str) -> bool:
    """Whether `response` answers as `answer` says.

    Args:
        grader: "exact" (equal but for spaces around), "math" (equal as mathematics: after `####`, in `\\boxed{}`, else
            the last expression; math-verify), "qa" (equal after SQuAD's normalisation; an answer that is a JSON list holds
            aliases), or "module:function", called with (response, answer).
    """
    return resolve(grader)(response, answer)


def resolve(grader: str | Grader) -> Grader:
    """The function behind a grader's name.

    Raises:
        ValueError: no such grader, module or function; "python" (running generated code is not part of this version).
    """
    if callable(grader):
        return grader
    if grader in GRADERS:
        return GRADERS[grader]
    if grader == "python":
        raise ValueError(
            "grader 'python' is not in this version: generated code would run on this machine. Write a function that runs "
            "it in a sandbox of yours and give --grader module:function, or grade with exact"
        )
    module, colon, name = grader.partition(":")
    if not colon:
        raise ValueError(f"grader must be {', '.join(GRADERS)} or module:function, got {grader!r}")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"grader {grader!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise ValueError(f"grader {grader!r} is not a function")
    return lambda response, answer: bool(function(response, answer))


def checkable(grader: str | Grader, answer: str | None) -> bool:
    """Whether there is a reference answer that the grader can compare with."""
    return bool(answer and answer.strip() and (grader != "math" or _parse(_reference(answer))))


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


GRADERS: dict[str, Grader] = {"exact": exact, "math": math, "qa": qa}
