"""Stage 2a: from scores to counterfactuals (E4, E5), and the controls that flag by something else."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leaf_kernels import flag_tokens, flagged_spans, token_scores

from .data import Skip

logger = logging.getLogger(__name__)

SIGNALS = ("gradient", "student_gradient", "teacher_gradient", "perplexity", "random")
PROTECTED = {
    "digits": re.compile(r"\d+"),
    "latex": re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+(?:\{[^{}]*\})*", re.DOTALL),
    "code": re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL),
}

ScoreRow = Mapping[str, Any]


@dataclass(frozen=True)
class PruneConfig:
    """How tokens are flagged and deleted.

    Args:
        rule: "quantile" (the authors' code) flags scores up to min(q-quantile, cap); "threshold" (the paper) up to `tau`.
        tau_response: threshold at response level, `tau` if None.
        mode: "span" = one counterfactual per run of flagged tokens; "collective" = one without any of them.
        signal: "gradient" is the method (E3). Controls: "student_gradient" flags where the student is most sensitive,
            "teacher_gradient" where the teacher is least, "perplexity" what the student expects least; "random" puts spans
            of the number and lengths that "gradient" flags at random places.
        protect: texts that are never flagged, of "digits", "latex", "code". Whitespace and a bare backslash never are.
        seed: of the random control; a row's places depend on the seed and its id only.
    """

    rule: str = "quantile"
    q: float = 0.05
    tau: float | None = None
    tau_response: float | None = None
    cap: float = 0.5
    mode: str = "span"
    signal: str = "gradient"
    protect: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"rule": ("quantile", "threshold"), "mode": ("span", "collective"), "signal": SIGNALS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"prune: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if unknown := [name for name in self.protect if name not in PROTECTED]:
            raise ValueError(f"prune: protect knows {', '.join(PROTECTED)}, got {unknown[0]!r}")
        if self.rule == "threshold" and self.tau is None:
            raise ValueError("prune: rule='threshold' needs tau (the paper uses 0.05 to 0.15)")


def prune(score_rows: Iterable[ScoreRow], config: PruneConfig) -> Iterator[dict[str, Any]]:
    """Rows of the counterfactuals table; rows that give none are counted by reason in the log."""
    skipped: Counter[str] = Counter()
    for row in score_rows:
        pruned = prune_row(row, config)
        if isinstance(pruned, Skip):
            skipped[pruned.reason] += 1
        else:
            yield from pruned
    if skipped:
        logger.info("prune: no counterfactual for %s", ", ".join(f"{n} rows: {r}" for r, n in skipped.items()))


def prune_row(row: ScoreRow, config: PruneConfig) -> list[dict[str, Any]] | Skip:
    """The counterfactuals of a row of the scores table, or why there are none."""
    if row["status"] != "ok":
        return Skip(row["id"], row["reason"], "the row was not scored")
    return counterfactuals_from_flags(row, flags_of(row, config), config.mode)


def flags_of(row: ScoreRow, config: PruneConfig) -> torch.Tensor:
    """Flags of a row of the scores table, [n] bool: its confounding tokens, whole characters only."""
    groups = [(start, end) for start, end in characters(row["offsets"]) if end - start > 1]
    flaggable = _flaggable(row, config.protect, groups)
    tau = config.tau_response if row["level"] == "response" and config.tau_response is not None else config.tau
    flags = flag_tokens(
        _signal(row, config.signal),
        torch.tensor([0, len(flaggable)], dtype=torch.int32),
        rule=config.rule,
        flaggable=flaggable,
        **({"q": config.q, "cap": config.cap} if config.rule == "quantile" else {"tau": tau}),
    )
    for start, end in groups:  # several tokens that share a character can only be deleted together
        flags[start:end] = flags[start:end].any()
    if config.signal == "random":
        rng = random.Random(f"{config.seed}:{row['id']}:{row['level']}:{row['cut']}")
        flags = _elsewhere(flags, flaggable, groups, rng)
    return flags


def _signal(row: ScoreRow, signal: str) -> torch.Tensor:
    """What is compared with the threshold, [n] fp32: low = to flag, +inf where not scored.

    The one-model controls are E3 with the other model's norms constant, which normalises to 1 − ŝ or t̂.
    """
    if signal in ("gradient", "random"):
        return _column(row, "score", fill=torch.inf)
    if signal == "perplexity" and row["student_nll"] is None:
        raise ValueError(
            f"prune: signal='perplexity' needs student_nll, which row {row['id']!r} lacks; score again with perplexity"
        )
    none = torch.zeros(len(row["scored"]), 1)
    if signal == "teacher_gradient":
        teacher, student = _column(row, "teacher_norm")[:, None], none
    else:
        name = "student_norm" if signal == "student_gradient" else "student_nll"
        teacher, student = none, _column(row, name)[:, None]
    starts = torch.tensor([0, len(none)], dtype=torch.int32)
    return token_scores(teacher, student, starts, scored=torch.tensor(row["scored"])).score


def _column(row: ScoreRow, name: str, fill: float = 0.0) -> torch.Tensor:
    return torch.tensor([fill if value is None else value for value in row[name]], dtype=torch.float32)


def characters(offsets: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Runs of tokens [start, end) that share characters, as byte-level tokens of an emoji do; most hold one token."""
    groups: list[list[int]] = []
    reached = 0
    for n, (start, end) in enumerate(offsets):
        if groups and start < reached:
            groups[-1][1] = n + 1
        else:
            groups.append([n, n + 1])
        reached = max(reached, end)
    return [(start, end) for start, end in groups]


def _flaggable(row: ScoreRow, protect: Sequence[str], groups: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[n] bool: scored, more than whitespace or a bare backslash, and outside protected text."""
    text = row["text"]
    protected = bytearray(len(text))
    for found in (found for name in protect for found in PROTECTED[name].finditer(text)):
        protected[found.start() : found.end()] = b"\x01" * (found.end() - found.start())
    flaggable = torch.tensor(
        [
            bool(scored) and text[start:end].strip() not in ("", "\\") and not any(protected[start:end])
            for scored, (start, end) in zip(row["scored"], row["offsets"], strict=True)
        ],
        dtype=torch.bool,
    )
    for start, end in groups:
        flaggable[start:end] = flaggable[start:end].all()
    return flaggable


def _elsewhere(
    flags: torch.Tensor, flaggable: torch.Tensor, groups: Sequence[tuple[int, int]], rng: random.Random
) -> torch.Tensor:
    """As many spans, as long, at random flaggable places that neither overlap nor touch."""
    starts = torch.tensor([0, len(flags)], dtype=torch.int32)
    lengths = sorted((end - start for _, start, end in flagged_spans(flags, starts).to_list()), reverse=True)
    inside = {n for start, end in groups for n in range(start + 1, end)}  # no span starts or ends within a character
    for _ in range(100):
        free, result = flaggable.tolist(), torch.zeros_like(flags)
        for length in lengths:
            places = [
                n
                for n in range(len(free) - length + 1)
                if all(free[n : n + length]) and n not in inside and n + length not in inside
            ]
            if not places:
                break
            start = rng.choice(places)
            result[start : start + length] = True
            for n in range(max(start - 1, 0), min(start + length + 1, len(free))):
                free[n] = False
        else:
            return result
    return torch.zeros_like(
        flags
    )  # so many are flagged that they fit nowhere else: no control, counted as nothing flagged


def counterfactuals_from_flags(
    row: ScoreRow, flags: Sequence[bool] | torch.Tensor, mode: str = "span"
) -> list[dict[str, Any]] | Skip:
    """E5: the prompts of `row` without its flagged tokens, as rows of the counterfactuals table.

    Text is deleted, by character positions, and nothing else of the prompt changes. Spans whose deletion gives the same
    prompt count once. A skip says `nothing_flagged`, or `nothing_left` where no scored text would remain.
    """
    flags = torch.as_tensor(flags, dtype=torch.bool)
    if len(flags) != len(row["offsets"]) or flags[row["response_start"] :].any():
        raise ValueError(
            f"prune: row {row['id']!r} needs a flag per token and none in its response, got {len(flags)} flags "
            f"for {len(row['offsets'])} tokens of which {row['response_start']} are its prompt"
        )
    text, offsets = row["text"], row["offsets"]
    spans = [
        (min(a for a, _ in offsets[start:end]), max(b for _, b in offsets[start:end]))
        for _, start, end in flagged_spans(flags, torch.tensor([0, len(flags)], dtype=torch.int32)).to_list()
    ]
    if not spans:
        return Skip(row["id"], "nothing_flagged", "no token is flagged")
    prompt, response = text[: row["prompt_chars"]], text[row["prompt_chars"] :]
    kept_apart = [spans] if mode == "collective" else [[span] for span in spans]
    scored = {c for (a, b), s in zip(offsets, row["scored"]) if s for c in range(a, b) if not text[c].isspace()}
    pruned: dict[str, list[tuple[int, int]]] = {}
    for removed in kept_apart:
        if scored.difference(*(range(a, b) for a, b in removed)):
            pruned.setdefault(delete(prompt, removed), removed)
    if not pruned:
        return Skip(row["id"], "nothing_left", "deleting what is flagged would leave no scored text")
    return [
        {
            "id": f"{row['id']}:{row['level']}:{row['cut']}:{n}",
            "source_id": row["id"],
            "level": row["level"],
            "cut": row["cut"],
            "mode": mode,
            "removed": removed,
            "prompt": counterfactual,
            "response": response,
            "verified": None,
            "reason": None,
        }
        for n, (counterfactual, removed) in enumerate(pruned.items())
    ]


def delete(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """`text` without the character ranges `spans`."""
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + text[end:]
    return text
