"""Stage 4: what distillation changed: accuracy, and attention on the tokens that were flagged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from .attention import Marked, attention_to_marked
from .data import Skip
from .prune import PruneConfig, flags_of
from .select import Answer
from .units import token_ids

ScoreRow = Mapping[str, Any]


def attention_to_flagged(
    model: PreTrainedModel, score_rows: Sequence[ScoreRow], config: PruneConfig, *, max_tokens: int = 16384
) -> Iterator[float | None]:
    """For each row of a scores table, in order: the share of attention that falls on its flagged tokens while the model
    answers (mean over response tokens, heads and layers); None where nothing is flagged or scored."""
    flags = [flags_of(row, config).tolist() if row["status"] == "ok" else [] for row in score_rows]
    items = [
        Marked(token_ids(row), row["response_start"], marked) for row, marked in zip(score_rows, flags) if any(marked)
    ]
    shares = attention_to_marked(model, items, max_tokens=max_tokens)
    for marked in flags:
        yield next(shares) if any(marked) else None


def summary(answers: Iterable[Answer | Skip], attention: Iterable[float | None] = ()) -> dict[str, float | None]:
    """Accuracy over the rows that could be checked, and how many these are; skipped rows are counted apart.

    Returns:
        `accuracy` and `attention_to_flagged` (None where there is nothing to average), `checked`, `unchecked`, `skipped`.
    """
    answers, shares = list(answers), [share for share in attention if share is not None]
    right = [answer.right for answer in answers if isinstance(answer, Answer)]
    checked = [verdict for verdict in right if verdict is not None]
    return {
        "accuracy": sum(checked) / len(checked) if checked else None,
        "checked": len(checked),
        "unchecked": len(right) - len(checked),
        "skipped": len(answers) - len(right),
        "attention_to_flagged": sum(shares) / len(shares) if shares else None,
    }
