"""Ground truth: how well scores find the planted confounder, and the counterfactuals of an oracle that knows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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


class Found(NamedTuple):
    """What the scores of a row say about its planted tokens."""

    auroc: float  # probability that a planted token scores lower than another scored token of the row
    auroc_student_gradient: float  # of the student's norm alone
    confounders: int  # planted tokens
    flagged: dict[str, list[int]]  # by signal: tokens that the quantile rule flags, confounders and operands among them


def find(row: ScoreRow, confounders: torch.Tensor, operands: torch.Tensor) -> Found:
    """How the method's score (E3) and its quantile flags find the tokens `confounders` [n] bool among the scored ones."""
    scored = torch.tensor(row["scored"])
    flagged = {}
    for signal in ("gradient", "student_gradient"):
        flags = flags_of(row, PruneConfig(signal=signal))
        flagged[signal] = [int(chosen.sum()) for chosen in (flags, flags & confounders, flags & operands)]
    return Found(
        _auroc(_column(row, "score"), confounders, scored),
        _auroc(-_column(row, "student_norm"), confounders, scored),
        int(confounders.sum()),
        flagged,
    )


def totals(found: Iterable[Found]) -> dict[str, float]:
    """`precision`: share of flagged tokens that are planted. `recall`: share of planted tokens that are flagged.
    `operands_flagged`: share of flagged tokens that are operands, which must not be deleted."""
    found = list(found)

    def total(signal: str, kind: int) -> int:
        return sum(one.flagged[signal][kind] for one in found)

    tokens = total("gradient", 0)
    return {
        "precision": total("gradient", 1) / tokens,
        "recall": total("gradient", 1) / sum(one.confounders for one in found),
        "operands_flagged": total("gradient", 2) / tokens,
        "operands_flagged_student_gradient": total("student_gradient", 2) / total("student_gradient", 0),
    }


def detection(
    rows: Iterable[ScoreRow], records: Mapping[str, Mapping[str, Any]], student_wrong: set[str]
) -> dict[str, Any]:
    """How the scores find the confounder Z: see `Found` and `totals`.

    `auroc` is the mean over rows; also over the rows that the student answers wrongly, over those with a misleading sign,
    and over both; `auroc_student_gradient` is that of the student's norm alone.
    """
    aurocs: dict[str, list[float]] = defaultdict(list)
    every = []
    for row in rows:
        if row["status"] != "ok":
            continue
        record = records[row["id"]]
        found = find(row, _marked(row, [record["confounder"]], record), _marked(row, record["operands"], record))
        every.append(found)
        wrong = row["id"] in student_wrong
        for name, wanted in (
            ("auroc", True),
            ("auroc_student_wrong", wrong),
            ("auroc_misleading", record["misleading"]),
            ("auroc_student_wrong_misleading", wrong and record["misleading"]),
        ):
            aurocs[name] += [found.auroc] if wanted else []
        aurocs["auroc_student_gradient"].append(found.auroc_student_gradient)
    return {
        **{name: sum(values) / len(values) if values else None for name, values in sorted(aurocs.items())},
        **totals(every),
    }


def _column(row: ScoreRow, name: str) -> torch.Tensor:
    return torch.tensor([float("nan") if value is None else value for value in row[name]])


def _auroc(score: torch.Tensor, low: torch.Tensor, scored: torch.Tensor) -> float:
    """Probability that a token of `low` has a lower score than another scored one; a tie counts half."""
    ours, others = score[low, None], score[scored & ~low]
    return float(((others > ours).float() + 0.5 * (others == ours)).mean())
