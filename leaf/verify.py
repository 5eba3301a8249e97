"""Stage 2b: which counterfactuals keep their answer (E6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .data import Encoder
from .generate import Ask, Loader, asker
from .graders import Grader, checkable, resolve

ROLES = {"both": ("student", "teacher"), "teacher": ("teacher",), "none": ()}

Counterfactual = Mapping[str, Any]


def verify_rows(
    counterfactuals: Sequence[Counterfactual],
    answers: Mapping[str, str | None],
    encoder: Encoder,
    loaders: Mapping[str, Loader],
    *,
    verify: str = "teacher",
    grader: str | Grader = "math",
    max_new_tokens: int = 512,
    max_tokens: int = 16384,
) -> Iterator[dict[str, Any]]:
    """The counterfactuals with their verdict, in order; one model resident at a time.

    Args:
        answers: reference answer of each source row, by `source_id`.
        loaders: "teacher" and "student": functions without arguments that return the model.
        verify: who must answer rightly from the pruned prompt: "both" (the paper), "teacher" or "none".
    """
    if verify not in ROLES:
        raise ValueError(f"verify must be one of {', '.join(ROLES)}, got {verify!r}")
    verdicts = {}
    for role in ROLES[verify]:
        ask = asker(loaders[role], encoder, max_new_tokens=max_new_tokens, max_tokens=max_tokens)
        verdicts[role] = list(answered_rightly(ask, counterfactuals, answers, grader=grader))
    for n, row in enumerate(counterfactuals):
        yield decide(row, {role: right[n] for role, right in verdicts.items()})


def answered_rightly(
    ask: Ask,
    counterfactuals: Sequence[Counterfactual],
    answers: Mapping[str, str | None],
    *,
    grader: str | Grader = "math",
    first: int = 0,
) -> Iterator[bool | None]:
    """For each counterfactual from `first` on: whether the model's greedy continuation of its prompt is right.

    The model is asked at once, about all of them; answers are graded as they are read, in order.

    At response level the prompt holds the pruned first part of the response, and the continuation alone is graded: "exact",
    which compares whole responses, is for the instruction level, and "python" wants the whole program after the cut (what
    goes on inside a program is wrong). None = no answer to check by.
    """
    grade = resolve(grader)
    wanted = [answers[row["source_id"]] for row in counterfactuals]
    can_check = [answer is not None and checkable(grader, answer) for answer in wanted]
    said = ask([row["prompt"] for row, check in zip(counterfactuals, can_check) if check])

    def verdict(row: Counterfactual, answer: str, check: bool) -> bool | None:
        return grade(said[row["prompt"]], answer) if check else None

    return map(verdict, counterfactuals[first:], wanted[first:], can_check[first:])  # type: ignore[arg-type]


def decide(row: Counterfactual, right: Mapping[str, bool | None]) -> dict[str, Any]:
    """A counterfactual with `verified`: True = all who were asked are right, False = dropped, None = nobody could be
    asked (kept); `reason` says who was wrong or why nobody was asked."""
    wrong = [role for role in ("teacher", "student") if right.get(role) is False]
    if wrong:
        return {**row, "verified": False, "reason": "_and_".join(wrong) + "_wrong"}
    if not right:
        return {**row, "verified": None, "reason": "not_verified"}
    if None in right.values():
        return {**row, "verified": None, "reason": "no_checkable_answer"}
    return {**row, "verified": True, "reason": None}
