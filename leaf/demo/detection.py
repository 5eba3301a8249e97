"""Ground truth: how well scores find the planted confounder, and the counterfactuals of an oracle that knows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..data import Skip
from ..prune import PruneConfig, counterfactuals_from_flags, flags_of

ScoreRow = Mapping[str, Any]


def marked(text: str, offsets: Sequence[Sequence[int]], spans: Iterable[Sequence[int]], prompt: str) -> torch.Tensor:
    """[n] bool: tokens at `offsets` of the rendered `text` that overlap `spans`, character ranges of the row's prompt."""
    shift = text.index(prompt)
    places = [(a + shift, b + shift) for a, b in spans]
    return torch.tensor([any(start < b and a < end for a, b in places) for start, end in offsets])


def _marked(row: ScoreRow, spans: Iterable[Sequence[int]], record: Mapping[str, Any]) -> torch.Tensor:
    return marked(row["text"], row["offsets"], spans, record["prompt"])


def oracle(rows: Iterable[ScoreRow], records: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One counterfactual per row, without its confounder."""
    for row in rows:
        record = records[row["id"]]
        pruned = counterfactuals_from_flags(row, _marked(row, [record["confounder"]], record))
        if not isinstance(pruned, Skip):
            yield from pruned


def detection(
    rows: Iterable[ScoreRow], records: Mapping[str, Mapping[str, Any]], student_wrong: set[str]
) -> dict[str, Any]:
    """How the method's score (E3) and its quantile flags find the confounder Z among the scored tokens.

    `auroc`: probability that Z scores lower than another token of its row, mean over rows; also over the rows that the
    student answers wrongly, over those with a misleading sign, and over both; `auroc_student_gradient` is that of the
    student's norm alone. `precision`: share of flagged tokens that are Z. `recall`: share of rows whose Z is flagged.
    `operands_flagged`: share of flagged tokens that are operands, which must not be deleted.
    """
    ranks: dict[str, list[float]] = defaultdict(list)
    flagged = {"gradient": [0, 0, 0], "student_gradient": [0, 0, 0]}  # tokens, confounders, operands
    count = 0
    for row in rows:
        if row["status"] != "ok":
            continue
        count += 1
        record = records[row["id"]]
        z = int(_marked(row, [record["confounder"]], record).nonzero())
        operands = _marked(row, record["operands"], record)
        scored = torch.tensor(row["scored"])
        rank = _rank(_column(row, "score"), z, scored)
        wrong = row["id"] in student_wrong
        for name, wanted in (
            ("auroc", True),
            ("auroc_student_wrong", wrong),
            ("auroc_misleading", record["misleading"]),
            ("auroc_student_wrong_misleading", wrong and record["misleading"]),
        ):
            ranks[name] += [rank] if wanted else []
        ranks["auroc_student_gradient"].append(_rank(-_column(row, "student_norm"), z, scored))
        for signal, totals in flagged.items():
            flags = flags_of(row, PruneConfig(signal=signal))
            for i, chosen in enumerate((flags, flags[z], flags & operands)):
                totals[i] += int(chosen.sum())
    tokens, confounders, operands_flagged = flagged["gradient"]
    return {
        **{name: sum(values) / len(values) if values else None for name, values in sorted(ranks.items())},
        "precision": confounders / tokens,
        "recall": confounders / count,
        "operands_flagged": operands_flagged / tokens,
        "operands_flagged_student_gradient": flagged["student_gradient"][2] / flagged["student_gradient"][0],
    }


def _column(row: ScoreRow, name: str) -> torch.Tensor:
    return torch.tensor([float("nan") if value is None else value for value in row[name]])


def _rank(score: torch.Tensor, z: int, scored: torch.Tensor) -> float:
    others = scored.clone()
    others[z] = False
    return float(((score[others] > score[z]).float() + 0.5 * (score[others] == score[z])).mean())
