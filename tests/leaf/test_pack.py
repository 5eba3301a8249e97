"""From the tables to groups, and from groups to packs."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from leaf.data import Encoder, Sample, read_rows
from leaf.pack import Collator, build_groups
from leaf.prune import counterfactuals_from_flags

RECORD = {"prompt": "Eva is 5 years old. How many?", "completion": "2 plus 7 equals 9.\n\nThe answer is 9."}


def tables(levels: tuple[str, ...]) -> tuple[Encoder, list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores and counterfactuals of one row; the first and the third scored token are deleted, one at a time."""
    encoder = Encoder(tiny.tokenizer())
    (row,) = read_rows([RECORD])
    scores, counterfactuals = [], []
    for sample in (sample for level in levels for sample in encoder.encode(row, level=level)):
        assert isinstance(sample, Sample)
        fields = ("id", "level", "cut", "text", "prompt_chars", "input_ids", "offsets", "response_start", "scored")
        score = {"status": "ok", **{name: getattr(sample, name) for name in fields}}
        scores.append(score)
        positions = [i for i, scored in enumerate(sample.scored) if scored]
        flags = [i in (positions[0], positions[2]) for i in range(len(sample.scored))]
        made = counterfactuals_from_flags(score, flags)
        assert isinstance(made, list)
        counterfactuals += made
    return encoder, scores, counterfactuals


def texts(encoder: Encoder, member: dict[str, Any]) -> tuple[str, str]:
    ids, start = member["input_ids"], member["response_start"]
    return encoder.tokenizer.decode(ids[:start]), encoder.tokenizer.decode(ids[start:])


def test_both_levels_of_a_row_join_one_group():
    encoder, scores, counterfactuals = tables(("instruction", "response"))
    (group,) = build_groups(scores, counterfactuals, encoder.encode_text)
    assert len(group["counterfactuals"]) == 4
    _, target = texts(encoder, group["original"])
    assert target == RECORD["completion"] + "<|im_end|>"
    targets = [texts(encoder, c)[1] for c in group["counterfactuals"]]
    assert targets == [target, target, *["The answer is 9.<|im_end|>"] * 2], "at response level: what follows the cut"
    for counterfactual, row in zip(group["counterfactuals"], counterfactuals):
        assert "".join(texts(encoder, counterfactual)) == row["prompt"] + row["response"]
    packed = Collator(1000)([group])["packs"][0]
    response = len(group["original"]["input_ids"]) - group["original"]["response_start"]
    assert packed["weight_original"].sum() == response, "each original token counts once, however often it was cut"
    expected = sum(len(c["input_ids"]) - c["response_start"] for c in group["counterfactuals"]) / 4
    assert packed["weight_counterfactual"].sum() == pytest.approx(expected)


def test_an_original_of_the_response_level_is_distilled_on_its_whole_response():
    encoder, scores, counterfactuals = tables(("response",))
    (group,) = build_groups(scores, counterfactuals, encoder.encode_text)
    assert texts(encoder, group["original"])[1] == RECORD["completion"] + "<|im_end|>"


def test_which_counterfactuals_and_originals_stay():
    encoder, scores, counterfactuals = tables(("instruction",))
    scores.append({**scores[0], "id": "alone"})
    scores.append({**scores[0], "id": "skipped", "status": "skipped"})
    counterfactuals[0]["verified"] = False
    counterfactuals[1]["verified"] = True
    groups = build_groups(scores, counterfactuals, encoder.encode_text)
    assert [(g["id"], len(g["counterfactuals"])) for g in groups] == [(scores[0]["id"], 1), ("alone", 0)]
    paired = build_groups(scores, counterfactuals, encoder.encode_text, originals="paired")
    assert [g["id"] for g in paired] == [scores[0]["id"]]
    with pytest.raises(ValueError, match="must be 'all' or 'paired', got 'none'"):
        build_groups(scores, counterfactuals, encoder.encode_text, originals="none")


def test_tables_of_different_runs_are_refused():
    encoder, scores, counterfactuals = tables(("instruction",))
    scores[0]["id"] = "other"
    with pytest.raises(ValueError, match="come from different runs"):
        build_groups(scores, counterfactuals, encoder.encode_text)


def test_packs_hold_whole_groups_in_their_order():
    """Sizes 6, 5, 4, 5 once prefixes are shared: a cut in sequence would need three packs of ten."""

    def group(i: int, response: int, counterfactuals: int = 0) -> dict[str, Any]:
        member = {"input_ids": [10 * i, 10 * i + 1, *range(50, 50 + response)], "response_start": 2}
        return {"id": str(i), "original": member, "counterfactuals": [member] * counterfactuals}

    groups = [group(1, 2, 2), group(2, 3), group(3, 2), group(4, 3)]
    packs = Collator(10)(groups)["packs"]
    assert [pack["input_ids"].tolist() for pack in packs] == [
        [[10, 11, 50, 51, 51, 51, 30, 31, 50, 51]],
        [[20, 21, 50, 51, 52, 40, 41, 50, 51, 52]],
    ]
    assert [len(pack["labels"]) for pack in packs] == [3 * 2 + 2, 3 + 3]
    assert [pack["layout"].num_tokens for pack in Collator(5)(groups)["packs"]] == [6, 5, 5, 4], "too large: alone"
    (idle,) = Collator(10)([])["packs"]
    assert (idle["layout"].num_tokens, len(idle["labels"])) == (1, 0)


def test_a_target_must_follow():
    group = {"id": "0", "original": {"input_ids": [1, 2], "response_start": 2}, "counterfactuals": []}
    with pytest.raises(ValueError, match=r"response_start must lie in \[1, 2\)"):
        Collator(10)([group])
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        Collator(0)
