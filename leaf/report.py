"""The report of a run: one self-contained HTML page, matplotlib figures, a token table, a heat map for the terminal.

Reads the tables of DESIGN.md ("Contracts inside leaf") and nothing else, so it can be pointed at the tables of a run that
is still going, or at tables that a script of the user's wrote.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.text import Text

from .plots import (
    BINS,
    VERMILLION,
    Span,
    deleted_tokens,
    draw_histogram,
    finite,
    flatten,
    listed,
    mean_sd,
    plot_arms,
    plot_attention,
    plot_score_histogram,
    plot_tokens,
    prompt_values,
    score_counts,
    token_texts,
    words,
)

__all__ = [
    "plot_arms",
    "plot_attention",
    "plot_score_histogram",
    "plot_tokens",
    "save_plots",
    "terminal_heatmap",
    "write_csv",
    "write_report",
]


def terminal_heatmap(row: Mapping[str, Any], removed: Iterable[Span] = ()) -> Text:
    """The prompt of a scores row for `rich`: the lower D, the stronger the colour; deleted tokens are struck through.

    A row that was not scored yet (no `score`) shows which tokens would be: coloured yes, dim no.
    """
    deleted, text = set(deleted_tokens(row, removed)), Text()
    values = finite(row["score"]) if row.get("score") else np.where(row["scored"], 0.5, np.nan)
    for i, piece in enumerate(token_texts(row)[: row["response_start"]]):
        style = "dim" if np.isnan(values[i]) else f"black on {_heat(values[i])}"
        text.append(piece.replace("\n", "⏎\n"), f"{style} strike bold" if i in deleted else style)
    if row.get("score"):
        text.append("\nD ")
        for step in range(5):
            text.append(f" {step / 4:.2f} ", f"black on {_heat(step / 4)}")
        text.append(" low: the student is sensitive where the teacher is not", "dim")
    return text


def _heat(score: float) -> str:
    """White (D = 1) to vermillion (D = 0)."""
    return "#" + "".join(f"{round(c + (255 - c) * score):02x}" for c in bytes.fromhex(VERMILLION[1:]))


# --- the page ---------------------------------------------------------------------------------------------------------


def _numbers(values: Iterable[float], digits: int) -> list[float | None]:
    return [None if math.isnan(v) else float(f"{v:.{digits}g}") for v in values]


def _sample(row: Mapping[str, Any], counterfactuals: list[dict]) -> dict[str, Any]:
    """What the page needs of one scores row: strings and rounded numbers."""
    sample = {key: row[key] for key in ("id", "level", "cut", "status", "reason")}
    if row["status"] != "ok":
        return sample | {"text": row.get("text")}
    n, values = row["response_start"], prompt_values(row)
    return sample | {
        "tokens": token_texts(row)[:n],
        "ids": row["input_ids"] and [int(i) for i in row["input_ids"][:n]],
        **{key: _numbers(value, 4) for key, value in values.items()},
        "loss": _numbers(finite([row.get("teacher_loss"), row.get("student_loss")]), 4),
        "response": row["text"][row["prompt_chars"] :],
        "counterfactuals": [
            {key: cf[key] for key in ("id", "mode", "verified", "reason")}
            | {"tokens": deleted_tokens(row, cf["removed"]), "removed": [row["text"][a:b] for a, b in cf["removed"]]}
            for cf in counterfactuals
        ],
    }


class _Tables:
    """One pass over the two tables: the samples to show and the totals over all rows."""

    def __init__(self, scores: Iterable[dict], counterfactuals: Iterable[dict], max_samples: int) -> None:
        by_sample: dict[tuple, list[dict]] = defaultdict(list)
        self.verified: Counter = Counter()
        for cf in counterfactuals:
            slim = {key: cf.get(key) for key in ("id", "mode", "removed", "verified", "reason")}
            by_sample[cf["source_id"], cf["level"], cf["cut"]].append(slim)
            self.verified[slim["verified"], slim["reason"] or ""] += 1
        self.samples: list[dict] = []
        self.status: Counter = Counter()
        self.histogram = np.zeros(len(BINS) - 1)
        self.thresholds: list[float] = []
        self.example: tuple[dict, list[Span]] | None = None
        for row in scores:
            own = by_sample[row["id"], row["level"], row["cut"]]
            self.status[row["status"], row["reason"] or ""] += 1
            self.histogram += score_counts(row)
            if len(self.samples) < max_samples:
                self.samples.append(_sample(row, own))
            if own and row["status"] == "ok":
                removed = [span for cf in own for span in cf["removed"]]
                values = finite(row["score"])[deleted_tokens(row, removed)]
                self.example = self.example or (row, removed)
                if not np.isnan(values).all():
                    self.thresholds.append(float(np.nanmax(values)))

    def figures(self, results: Mapping[str, Any], attention: Mapping[str, Any] | None) -> dict[str, Figure]:
        arms = results.get("arms") or {}
        attention = attention or {
            a: m["attention_to_confounder"] for a, m in arms.items() if m.get("attention_to_confounder")
        }
        figures = {}
        if arms or results.get("accuracy"):
            figures["arms"] = plot_arms(results)[0]
        if attention:
            figures["attention"] = plot_attention(attention)[0]
        if self.histogram.any():
            figures["scores"] = draw_histogram(self.histogram, self.thresholds)[0]
        return figures


def write_report(
    path: str | Path,
    *,
    scores: Iterable[dict],
    counterfactuals: Iterable[dict],
    results: Mapping[str, Any] | None = None,
    attention: Mapping[str, Any] | None = None,
    title: str = "LeaF report",
    max_samples: int = 200,
) -> Path:
    """Write one HTML file that needs nothing else: no network, no other file. Replaces `path` whole or not at all.

    scores, counterfactuals: the tables of DESIGN.md. Totals and the histogram cover every row; the first `max_samples`
        rows can be looked at token by token.
    results: `arms` {arm: {metric: [per seed]}}, `per_length` {name: {metric: {length: [per seed]}}}, `paired` and
        `detection` (lists per seed, nested at will) and `accuracy` {"before", "after"} become tables; every other entry
        (`counts`, `seconds`, a `run` of models and rule) is listed.
    attention: {label: mass or list of masses}; by default the arms' `attention_to_confounder`.
    """
    results = results or {}
    tables = _Tables(scores, counterfactuals, max_samples)
    data = {"samples": tables.samples}
    parts = {
        "title": html.escape(title),
        "style": _asset("report.css"),
        "script": _asset("report.js"),
        "summary": _summary(tables),
        "facts": _facts(results),
        "results": _results(results),
        "figures": "".join(
            _inline_svg(name, fig, _CAPTIONS[name]) for name, fig in tables.figures(results, attention).items()
        ),
        # "<" would end the script element where a token reads "</script>"; ASCII keeps lone surrogates legal.
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report.html"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, page.encode("utf-8", "xmlcharrefreplace"))
    return path


_CAPTIONS = {
    "arms": "Accuracy: mean, one standard deviation, and each seed where there are several.",
    "attention": "Attention mass on the confounding tokens.",
    "scores": "Difference score D of every scored token. The threshold is the highest D deleted, median over samples.",
}


def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def _cell(value: Any, sign: str = "") -> str:
    """A table cell: mean ± sd of a list (the single values on hover), a number, or the text; sign "+" shows it always."""
    if not (values := listed(value)):
        return f"<td>{html.escape(str(value)) if value else '–'}</td>"
    mean, sd = mean_sd(values)
    if len(values) == 1:
        return f"<td>{mean:{sign}.3f}</td>"
    return f'<td title="{", ".join(f"{v:{sign}.3f}" for v in values)}">{mean:{sign}.3f} <small>± {sd:.3f}</small></td>'


def _table(caption: str, head: Sequence[str], rows: Iterable[tuple[str, str]]) -> str:
    """`rows` are (label, cells as HTML)."""
    body = "".join(f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>' for label, cells in rows)
    heads = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in head)
    inner = f"<caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return f"<div class=table><table>{inner}</table></div>"


def _grid(caption: str, corner: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """{row: {column: value or list}} as a table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [(words(name), "".join(_cell(row.get(column)) for column in columns)) for name, row in rows.items()]
    return _table(html.escape(caption), [corner, *map(words, columns)], body)


def _results(results: Mapping[str, Any]) -> str:
    tables = []
    if arms := results.get("arms"):
        tables.append(_grid("Arms", "arm", arms))
    for name, metrics in (results.get("per_length") or {}).items():
        tables.append(_grid(words(name).capitalize(), "tokens of the prompt", metrics))
    if paired := results.get("paired"):
        rows = []
        for label, value in flatten(paired):
            values = listed(value)
            worst = f"{min(values):+.3f}" if len(values) > 1 else "–"
            rows.append((label, f"{_cell(value, '+')}<td>{worst}</td>"))
        tables.append(_table("Paired differences, seed by seed", ["comparison", "difference", "worst seed"], rows))
    for key, caption in (("accuracy", "Accuracy"), ("detection", "Detection of the confounder")):
        if results.get(key):
            rows = [(label, _cell(value)) for label, value in flatten(results[key])]
            tables.append(_table(caption, ["", "value"], rows))
    return "".join(tables)


def _facts(results: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return ", ".join(map(str, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    items = ""
    for key, value in results.items():
        if key not in ("arms", "per_length", "paired", "accuracy", "detection"):
            entries = (html.escape(f"{label} {shown(entry)}".strip()) for label, entry in flatten(value))
            items += (
                f"<dt>{html.escape(words(key))}</dt><dd>{''.join(f'<span>{entry}</span>' for entry in entries)}</dd>"
            )
    return f"<dl class=facts>{items}</dl>" if items else ""


def _summary(tables: _Tables) -> str:
    """Counts of samples and counterfactuals; whatever was lost is named with its reason."""

    def tile(label: str, counter: Counter, key: Any) -> str:
        reasons = sorted(((n, r) for (k, r), n in counter.items() if k == key and r), reverse=True)
        listed = "".join(f"<li>{html.escape(words(r))} <b>{n}</b></li>" for n, r in reasons)
        total = sum(n for (k, _), n in counter.items() if k == key)
        return f"<div class=tile><b>{total:,}</b> {label}<ul>{listed}</ul></div>"

    total, shown = sum(tables.status.values()), len(tables.samples)
    note = (
        f"<p class=quiet>The first {shown:,} of {total:,} samples can be looked at below.</p>" if shown < total else ""
    )
    return (
        "<div class=tiles>"
        + tile("samples scored", tables.status, "ok")
        + tile("samples skipped", tables.status, "skipped")
        + tile("counterfactuals kept", tables.verified, True)
        + tile("dropped by verification", tables.verified, False)
        + tile("kept unverified", tables.verified, None)
        + f"</div>{note}"
    )


def _inline_svg(name: str, fig: Figure, caption: str) -> str:
    """The figure as SVG inside the page: black becomes the page's text colour, ids get the figure's name."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg).replace("#000000", "currentColor")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def save_plots(
    folder: str | Path,
    *,
    scores: Iterable[dict] = (),
    counterfactuals: Iterable[dict] = (),
    results: Mapping[str, Any] | None = None,
    attention: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write `arms.png`, `attention.png`, `scores.png` and `tokens.png` (the first pruned sample), each if it has data."""
    tables = _Tables(scores, counterfactuals, max_samples=0)
    figures = tables.figures(results or {}, attention)
    if tables.example:
        figures["tokens"] = plot_tokens(*tables.example)[0]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, fig in figures.items():
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=160)
        _write(folder / f"{name}.png", buffer.getvalue())
    return [folder / f"{name}.png" for name in figures]


# --- the token table --------------------------------------------------------------------------------------------------


def write_csv(path: str | Path, *, scores: Iterable[dict], counterfactuals: Iterable[dict] = ()) -> Path:
    """One line per scored token of the prompts: raw norms, normalised norms (E2), D (E3), and whether it was deleted."""
    removed = defaultdict(list)
    for cf in counterfactuals:
        removed[cf["source_id"], cf["level"], cf["cut"]].extend(cf["removed"])
    names = ("teacher_norm", "student_norm", "teacher", "student", "score")
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(["id", "level", "cut", "position", "token", *names, "deleted"])
    for row in scores:
        if row["status"] != "ok":
            continue
        key = (row["id"], row["level"], row["cut"])
        deleted, values, texts = set(deleted_tokens(row, removed[key])), prompt_values(row), token_texts(row)
        for i in np.flatnonzero(~np.isnan(values["score"])):
            writer.writerow([*key, i, texts[i], *(values[name][i] for name in names), int(i in deleted)])
    path = Path(path)
    _write(path, buffer.getvalue().encode("utf-8", "surrogatepass"))
    return path
