from __future__ import annotations

import pytest
import tiny

from leaf.data import Encoder
from leaf.generate import generate
from leaf.verify import decide, verify_rows


def counterfactual(n: int, prompt: str) -> dict:
    return {"id": f"{n}:instruction:0:0", "source_id": str(n), "prompt": prompt, "response": "x<|im_end|>"}


@pytest.mark.parametrize(
    ("right", "verified", "reason"),
    [
        ({"teacher": True, "student": True}, True, None),
        ({"teacher": True, "student": False}, False, "student_wrong"),
        ({"teacher": False, "student": False}, False, "teacher_and_student_wrong"),
        ({"teacher": None, "student": None}, None, "no_checkable_answer"),
        ({"teacher": False}, False, "teacher_wrong"),
        ({}, None, "not_verified"),
    ],
)
def test_decide(right: dict, verified: bool | None, reason: str | None) -> None:
    found = decide(counterfactual(0, "p"), right)
    assert (found["verified"], found["reason"], found["prompt"]) == (verified, reason, "p")


def test_verify_rows_continues_from_the_pruned_prompt() -> None:
    tokenizer = tiny.tokenizer()
    encoder = Encoder(tokenizer)
    models = {
        role: tiny.model(tokenizer, seed=n, initializer_range=0.5) for n, role in enumerate(("teacher", "student"))
    }
    rows = [counterfactual(n, p) for n, p in enumerate(["How many", "Tom has 2", "Eva is", "The sign"])]
    said = {}
    for role, model in models.items():
        given = dict(generate(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=5))
        said[role] = [given[row["prompt"]] for row in rows]
    assert said["teacher"][0].strip() != said["student"][0].strip()
    answers = {"0": said["teacher"][0], "1": None, "2": said["student"][2], "3": "neither of them"}
    loaders = {role: (lambda role=role: models[role]) for role in models}
    options = {"grader": "exact", "max_new_tokens": 5}

    def verdicts(verify: str) -> list[tuple]:
        found = list(verify_rows(rows, answers, encoder, loaders, verify=verify, **options))
        assert [r["id"] for r in found] == [r["id"] for r in rows]
        return [(r["verified"], r["reason"]) for r in found]

    unchecked = (None, "no_checkable_answer")
    both = "teacher_and_student_wrong"
    assert verdicts("both") == [(False, "student_wrong"), unchecked, (False, "teacher_wrong"), (False, both)]
    assert verdicts("teacher") == [(True, None), unchecked, (False, "teacher_wrong"), (False, "teacher_wrong")]
    assert verdicts("none") == [(None, "not_verified")] * 4
    with pytest.raises(ValueError, match="verify must be one of both, teacher, none"):
        list(verify_rows(rows, answers, encoder, loaders, verify="student"))
