"""Flagging and deleting: the published rules, the controls, and what must never be deleted."""

from __future__ import annotations

import math
import re

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf.data import Encoder, Skip, read_rows
from leaf.prune import PruneConfig, counterfactuals_from_flags, delete, flags_of, prune, prune_row

SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
QUESTION = "Every day Tom doubles his $x$ coins. How many?"
TOKENS = ["Every", "day", "Tom", "doubles", "his", "$", "x", "$", "coins", ".", "How", "many", "?"]
SCORES = [0.01, 0.02, 0.9, 0.03, 0.8, 0.7, 0.7, 0.7, 0.9, 0.9, 0.8, 0.7, 0.6]


def score_row(text: str, tokens: list[str], scores: list[float | None], response: str = "!", **columns) -> dict:
    """A row of the scores table with given tokens at the start of `text`; as the authors' code, a token starts with
    the whitespace before it."""
    offsets, reached = [], 0
    for token in tokens:
        end = text.index(token, reached) + len(token)
        offsets.append((reached, end))
        reached = end
    offsets += [(reached, len(text)), (len(text), len(text) + len(response))]
    return {
        "id": "r",
        "level": "instruction",
        "cut": 0,
        "status": "ok",
        "reason": None,
        "text": text + response,
        "prompt_chars": len(text),
        "offsets": offsets,
        "response_start": len(tokens) + 1,
        "scored": [s is not None for s in scores] + [False, False],
        "score": [*scores, None, None],
        "student_nll": None,
        **columns,
    }


PARITY = score_row(QUESTION + SUFFIX, TOKENS, SCORES)


@pytest.mark.parametrize(
    ("rule", "runs"),
    [
        ({"rule": "quantile", "q": 0.05}, [[0]]),
        ({"rule": "quantile", "q": 0.10}, [[0, 1]]),
        ({"rule": "threshold", "tau": 0.05}, [[0, 1], [3]]),
    ],
)
def test_parity_vector(rule: dict, runs: list[list[int]]) -> None:
    config = PruneConfig(**rule)
    assert flags_of(PARITY, config).nonzero().flatten().tolist() == [i for run in runs for i in run]
    rows = prune_row(PARITY, config)
    pieces = [QUESTION[a:b] for a, b in PARITY["offsets"][: len(TOKENS)]]
    wanted = ["".join(p for i, p in enumerate(pieces) if i not in run) + SUFFIX for run in runs]
    assert [row["prompt"] for row in rows] == wanted
    assert [row["id"] for row in rows] == [f"r:instruction:0:{n}" for n in range(len(runs))]
    assert all(row["response"] == "!" and row["verified"] is None for row in rows)


def released_rule(scores: list[float], tokens: list[str], q: float) -> list[int]:
    """The authors' published rule, as method and code describe it."""
    threshold = min(sorted(scores)[int(len(scores) * q)], 0.5)
    flagged = [s <= threshold for s in scores]
    return [i for i, (f, t) in enumerate(zip(flagged, tokens)) if f and t.strip() not in ("", "\\")]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.6, 1.0]), st.sampled_from("ab \n\\")), min_size=1),
    st.sampled_from([0.0, 0.05, 0.1, 0.5]),
)
def test_quantile_rule_is_the_released_one(items: list[tuple[float, str]], q: float) -> None:
    scores, tokens = [s for s, _ in items], [t for _, t in items]
    row = score_row("".join(tokens), tokens, scores)
    assert flags_of(row, PruneConfig(q=q)).nonzero().flatten().tolist() == released_rule(scores, tokens, q)


def test_collective_removes_every_span_at_once() -> None:
    (row,) = prune_row(PARITY, PruneConfig(rule="threshold", tau=0.05, mode="collective"))
    assert row["prompt"] == " Tom his $x$ coins. How many?" + SUFFIX
    assert row["removed"] == [(0, 9), (13, 21)]


def test_response_level_has_its_own_threshold() -> None:
    row = {**PARITY, "level": "response", "cut": 1}
    config = PruneConfig(rule="threshold", tau=0.005, tau_response=0.015)
    assert not flags_of(PARITY, config).any()
    assert flags_of(row, config).sum() == 1


def test_never_flagged() -> None:
    tokens = ["a", " ", "\n", "\\", "7", "$x$", "`f`", "b"]
    row = score_row("".join(tokens), tokens, [0.0] * 8)
    every = {"rule": "threshold", "tau": 0.5}

    def flagged(*protect: str) -> list[str]:
        flags = flags_of(row, PruneConfig(**every, protect=protect))
        return [t for t, f in zip(tokens, flags) if f]

    assert flagged() == ["a", "7", "$x$", "`f`", "b"]
    assert flagged("digits") == ["a", "$x$", "`f`", "b"]
    assert flagged("latex", "code") == ["a", "7", "b"]


def test_why_there_is_no_counterfactual() -> None:
    high = score_row("a b", ["a", "b"], [1.0, 1.0])
    assert prune_row(high, PruneConfig()) == Skip("r", "nothing_flagged", "no token is flagged")
    everything = score_row("a b" + SUFFIX, ["a", "b"], [0.0, 0.0])
    assert prune_row(everything, PruneConfig(rule="threshold", tau=0.1)).reason == "nothing_left"
    unscored = {**high, "status": "skipped", "reason": "too_long"}
    assert prune_row(unscored, PruneConfig()).reason == "too_long"
    broken = score_row("a b", ["a", "b"], [math.nan, math.nan])
    assert prune_row(broken, PruneConfig()).reason == "nothing_flagged"
    assert list(prune([high, everything, unscored, broken], PruneConfig(rule="threshold", tau=0.1))) == []


def test_equal_prompts_count_once() -> None:
    row = score_row("abaxaba", ["ab", "a", "x", "a", "ba"], [0.0, 1.0, 1.0, 1.0, 0.0])
    prompts = [r["prompt"] for r in counterfactuals_from_flags(row, [True, False, False, False, True, False, False])]
    assert prompts == ["axaba", "abaxa"]
    twice = score_row("a-a", ["a", "-", "a"], [0.0, 1.0, 0.0])
    twice["offsets"][0] = (0, 2)  # "a-" and "-a": both leave "a"
    twice["offsets"][2] = (1, 3)
    assert [r["prompt"] for r in counterfactuals_from_flags(twice, [True, False, True, False, False])] == ["a"]


def test_one_model_signals() -> None:
    tokens = list("abcd")
    row = score_row(
        "abcd",
        tokens,
        [1.0, 1.0, 1.0, 1.0],
        teacher_norm=[5.0, 0.1, 3.0, 4.0, None, None],
        student_norm=[1.0, 2.0, 9.0, 3.0, None, None],
        student_nll=[0.5, 0.1, 0.2, 7.0, None, None],
    )
    picked = {
        signal: flags_of(row, PruneConfig(signal=signal)).nonzero().flatten().tolist()
        for signal in ("student_gradient", "teacher_gradient", "perplexity")
    }
    assert picked == {"student_gradient": [2], "teacher_gradient": [1], "perplexity": [3]}
    with pytest.raises(ValueError, match="'perplexity' needs student_nll, which row 'r' lacks"):
        flags_of({**row, "student_nll": None}, PruneConfig(signal="perplexity"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.7, 1.0]), min_size=2, max_size=25), st.integers(0, 3))
def test_random_control_has_the_same_spans_elsewhere(scores: list[float], seed: int) -> None:
    tokens = ["w"] * len(scores)
    row = score_row("w" * len(scores), tokens, scores)

    def lengths(flags: torch.Tensor) -> list[int]:
        return sorted(len(run) for run in re.findall("1+", "".join(str(int(f)) for f in flags)))

    real = flags_of(row, PruneConfig(q=0.2))
    config = PruneConfig(q=0.2, signal="random", seed=seed)
    control = flags_of(row, config)
    assert lengths(control) == lengths(real)
    assert torch.equal(control, flags_of(row, config))
    assert not control[row["response_start"] :].any()


def test_random_control_depends_on_seed_and_row() -> None:
    tokens = ["w"] * 50
    row = score_row("w" * 50, tokens, [0.0] * 2 + [1.0] * 48)
    places = {
        flags_of({**row, "id": name}, PruneConfig(signal="random", seed=seed)).nonzero()[0].item()
        for name in "ab"
        for seed in range(4)
    }
    assert len(places) > 4


def rendered(text: str, scores=None) -> dict:
    """The scores row of a real sample: `scores(n)` for its n-th scored token."""
    (row,) = read_rows([{"prompt": text, "completion": "ok"}])
    (sample,) = Encoder(tiny.tokenizer()).encode(row)
    count = iter(range(10**6))
    values = [scores(next(count)) if s else None for s in sample.scored]
    return {**sample.__dict__, "status": "ok", "reason": None, "score": values}


def covered(row: dict, tokens: torch.Tensor) -> set[int]:
    """The characters of some tokens."""
    return {c for (a, b), chosen in zip(row["offsets"], tokens) if chosen for c in range(a, b)}


def test_a_character_is_deleted_whole() -> None:
    text = "x 🙂 日本 é y"
    n = sum(rendered(text, lambda n: 1.0)["scored"])
    for flagged in range(n):
        source = rendered(text, lambda n, at=flagged: float(n != at))
        flags = flags_of(source, PruneConfig())
        assert not covered(source, flags) & covered(source, ~flags)
        pruned = prune_row(source, PruneConfig())
        if isinstance(pruned, Skip):
            continue
        (row,) = pruned
        ((start, end),) = row["removed"]
        kept = row["prompt"].split("user\n")[1].split("<|im_end|>")[0]
        assert len(kept) == len(text) - (end - start)
        assert kept in {text[:a] + text[b:] for a in range(len(text)) for b in range(a, len(text) + 1)}
        assert "�" not in kept


def test_random_control_never_splits_a_character() -> None:
    row = rendered("🙂日本 wide and 🙂 more", lambda n: float(n > 2))
    for seed in range(20):
        for found in prune_row(row, PruneConfig(signal="random", seed=seed)):
            flags = flags_of(row, PruneConfig(signal="random", seed=seed))
            assert not covered(row, flags) & covered(row, ~flags)
            assert "�" not in found["prompt"]


def test_delete() -> None:
    assert delete("abcdef", [(0, 1), (3, 5)]) == "bcf"
    assert delete("abc", []) == "abc"


def test_bad_options() -> None:
    for options, message in [
        ({"rule": "top"}, "rule must be one of quantile, threshold"),
        ({"rule": "threshold"}, "needs tau"),
        ({"signal": "loss"}, "signal must be one of gradient"),
        ({"mode": "token"}, "mode must be one of span"),
        ({"protect": ("numbers",)}, "protect knows digits, latex, code"),
    ]:
        with pytest.raises(ValueError, match=message):
            PruneConfig(**options)
    with pytest.raises(ValueError, match="needs a flag per token"):
        counterfactuals_from_flags(PARITY, [True])
    with pytest.raises(ValueError, match="none in its response"):
        counterfactuals_from_flags(PARITY, [True] * len(PARITY["offsets"]))
