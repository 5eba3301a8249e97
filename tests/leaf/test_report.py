"""The report: one file that needs no other, holds what the tables say, and survives whatever a token reads."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from leaf.report import (
    plot_arms,
    plot_attention,
    plot_score_histogram,
    plot_tokens,
    save_plots,
    terminal_heatmap,
    write_csv,
    write_report,
)

WORDS = re.split(
    " ",
    "Tom has 2 books . the sign says 9 . the dog sleeps . Eva gives Tom 7 books . how many books does he have now ? "
    "naïve 数学 Ωmega doubles every day , then pays $ x coins for 3 kilos of apples",
)


def score_row(identifier: str, text: str, prompt_chars: int, seed: int = 0, **changes: object) -> dict:
    """A scores row as scoring writes it: words with their leading space as tokens, random but plausible values."""
    rng = random.Random(seed)
    offsets = [match.span() for match in re.finditer(r"<[|]\w+[|]>|\n| ?[^\s<]+|\s|<", text)]
    response_start = sum(start < prompt_chars for start, _ in offsets)
    scored = [
        i < response_start and text[a:b].strip() != "" and not text[a:b].startswith("<|")
        for i, (a, b) in enumerate(offsets)
    ]
    teacher, student = ([rng.lognormvariate(-6, 1.2) for _ in offsets] for _ in range(2))

    def scale(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(v - low) / (high - low) if high > low else 0.0 for v in values]

    kept = [i for i, flag in enumerate(scored) if flag]
    difference = [a - b for a, b in zip(scale([teacher[i] for i in kept]), scale([student[i] for i in kept]))]
    score = dict(zip(kept, scale(difference)))
    row = {
        "id": identifier,
        "level": "instruction",
        "cut": 0,
        "status": "ok",
        "reason": None,
        "text": text,
        "prompt_chars": prompt_chars,
        "input_ids": list(range(100, 100 + len(offsets))),
        "offsets": offsets,
        "response_start": response_start,
        "scored": scored,
        "teacher_norm": teacher,
        "student_norm": student,
        "score": [score.get(i) for i in range(len(offsets))],
        "teacher_loss": 0.3123,
        "student_loss": 1.734,
        "student_nll": None,
    }
    return row | changes


def counterfactuals_of(row: dict, q: float = 0.05, verified: tuple = (True, False, None)) -> list[dict]:
    """One counterfactual per span of the tokens with the lowest scores."""
    ranked = sorted(s for s in row["score"] if s is not None)
    threshold = ranked[int(q * len(ranked))]
    spans: list[list[int]] = []
    for i, ((start, end), score) in enumerate(zip(row["offsets"], row["score"])):
        if score is not None and score <= threshold:
            if spans and spans[-1][2] == i - 1:
                spans[-1][1:] = [end, i]
            else:
                spans.append([start, end, i])
    return [
        {
            "id": f"{row['id']}:{row['level']}:{row['cut']}:{n}",
            "source_id": row["id"],
            "level": row["level"],
            "cut": row["cut"],
            "mode": "span",
            "removed": [(a, b)],
            "prompt": row["text"][:a] + row["text"][b : row["prompt_chars"]],
            "response": row["text"][row["prompt_chars"] :],
            "verified": verified[n % len(verified)],
            "reason": {True: None, False: "teacher_wrong", None: "no_answer"}[verified[n % len(verified)]],
        }
        for n, (a, b, _) in enumerate(spans)
    ]


def skipped_row(identifier: str, reason: str = "too_long") -> dict:
    columns = score_row("", "a b", 2)
    return dict.fromkeys(columns) | {
        "id": identifier,
        "level": "instruction",
        "cut": 0,
        "status": "skipped",
        "reason": reason,
    }


def tables(rows: int, words: int = 34) -> tuple[list[dict], list[dict]]:
    scores, counterfactuals = [], []
    for seed in range(rows):
        rng = random.Random(seed)
        if seed % 23 == 7:
            scores.append(skipped_row(f"row-{seed}", rng.choice(["too_long", "empty_response", "non_finite"])))
            continue
        body = " ".join(rng.choice(WORDS) + ("\n" if rng.random() < 0.03 else "") for _ in range(words))
        prompt = f"<|user|>\n{body}\n<|assistant|>\n"
        row = score_row(f"row-{seed}", prompt + "2 plus 7 equals 9 . answer 9<|end|>", len(prompt), seed)
        scores.append(row)
        if seed % 5:
            counterfactuals += counterfactuals_of(row)
    return scores, counterfactuals


def arms(seeds: int = 5) -> dict:
    rng = random.Random(0)
    metrics = ("in_distribution", "adversarial", "clean", "attention_to_confounder")
    names = ["teacher", "student", "kd", "random", "perplexity", "student_gradient", "teacher_gradient", "leaf"]
    names += ["leaf_collective", "leaf_paper", "kd_student_wrong", "oracle"]
    means = {m: [0.2 + 0.75 * (k + 1) / 13 for k in range(12)] for m in metrics}
    return {
        "preset": "full",
        "seeds": list(range(seeds)),
        "run": {"teacher": "models/teacher", "student": "models/student", "rule": "quantile, q = 0.05, cap = 0.5"},
        "arms": {
            name: {m: [min(1.0, rng.gauss(means[m][k], 0.05)) for _ in range(seeds)] for m in metrics}
            for k, name in enumerate(names)
        },
        "paired": {
            f"leaf - {other}": {"adversarial": [rng.gauss(0.1, 0.05) for _ in range(seeds)]}
            for other in ("kd", "random")
        },
        "detection": {"auroc": [0.83, 0.8, 0.85], "precision": [0.4, 0.5, 0.45]},
        "counts": {"leaf": {"kept": 2345, "dropped": 120}},
        "seconds": {"score": 12.345, "distill": 40.0},
    }


class Page(HTMLParser):
    """Collects scripts and text, and fails on elements that are not closed or that load something."""

    void = frozenset({"meta", "br", "input", "link", "img"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    @property
    def samples(self) -> list[dict]:
        return json.loads(self.scripts[0])["samples"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert "src" not in given
        assert (given.get("href") or given.get("xlink:href") or "#").startswith("#")
        self.ids += [given["id"]] if given.get("id") else []
        if tag not in self.void:
            self.open.append(tag)
            self.scripts += [""] if tag == "script" else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def report(folder: Path, scores: list[dict], counterfactuals: list[dict], **options: object) -> Page:
    path = write_report(folder / "report.html", scores=iter(scores), counterfactuals=iter(counterfactuals), **options)
    assert [p.name for p in folder.iterdir()] == ["report.html"]  # whole, and nothing left over
    return Page(path)


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    page = report(tmp_path, *tables(30), results=arms())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.scripts) == 2
    assert text.count("<svg") == 3  # arms, attention, histogram


def test_samples_say_what_the_tables_say(tmp_path: Path) -> None:
    scores, counterfactuals = tables(12)
    page = report(tmp_path, scores, counterfactuals)
    for row, sample in zip(scores, page.samples, strict=True):
        assert (sample["id"], sample["status"], sample["reason"]) == (row["id"], row["status"], row["reason"])
        if row["status"] == "skipped":
            continue
        n = row["response_start"]
        assert "".join(sample["tokens"]) + sample["response"] == row["text"]
        assert [s is None for s in sample["score"]] == [not flag for flag in row["scored"][:n]]
        norms = [v for v, flag in zip(row["student_norm"], row["scored"]) if flag]
        for i in range(n):
            if row["scored"][i]:
                expected = (row["student_norm"][i] - min(norms)) / (max(norms) - min(norms))
                assert math.isclose(sample["student"][i], expected, rel_tol=1e-3, abs_tol=1e-6)
                assert math.isclose(sample["score"][i], row["score"][i], rel_tol=1e-3)
        own = [cf for cf in counterfactuals if cf["source_id"] == row["id"]]
        for given, told in zip(own, sample["counterfactuals"], strict=True):
            (a, b) = given["removed"][0]
            assert told["removed"] == [row["text"][a:b]] == ["".join(sample["tokens"][i] for i in told["tokens"])]
            assert told["verified"] is given["verified"]


def test_totals_cover_rows_beyond_those_shown(tmp_path: Path) -> None:
    scores, counterfactuals = tables(30)
    page = report(tmp_path, scores, counterfactuals, max_samples=5)
    assert len(page.samples) == 5
    assert "29 samples scored" in page.text
    assert "1 samples skipped" in page.text
    assert "first 5 of 30 samples" in page.text
    dropped = sum(cf["verified"] is False for cf in counterfactuals)
    assert f"{dropped} dropped by verificationteacher wrong {dropped}" in page.text


@pytest.mark.filterwarnings("ignore:Glyph .* missing", "ignore:constrained_layout not applied")
def test_text_is_data(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> {{style}} \u2028 " & $\\frac$ 👩‍🔬'
    row = score_row(evil, f"{evil} \ud800\nresponse", len(evil) + 3)
    results = {"run": {evil: evil}, "accuracy": {evil: evil}, "arms": {evil: {evil: [0.5]}}, "paired": {evil: evil}}
    page = report(
        tmp_path,
        [row, skipped_row(evil, evil)],
        counterfactuals_of(row),
        results=results,
        attention={evil: 1},
        title=evil,
    )
    assert len(page.scripts) == 2
    assert page.samples[0]["id"] == page.samples[1]["reason"] == evil
    assert "".join(page.samples[0]["tokens"]) == row["text"][: row["prompt_chars"]]


def test_characters_of_several_tokens(tmp_path: Path) -> None:
    """Byte-level BPE cuts one character into several tokens with equal offsets; special tokens may have none."""
    offsets = [(0, 0), (0, 1), (0, 1), (0, 1), (1, 4), (5, 6), (6, 7)]
    row = score_row("bytes", "👩 ab cd", 6) | {"offsets": offsets, "response_start": 6, "input_ids": [0] * 7}
    row |= {name: [0.1, 0.5, 0.2, 0.1, 0.3, 0.4, 0.0] for name in ("teacher_norm", "student_norm")}
    row["score"] = [None, 0.0, 0.5, 1.0, 0.7, 0.6, None]
    cut = {
        "source_id": "bytes",
        "level": "instruction",
        "cut": 0,
        "removed": [[0, 1]],
        "verified": None,
        "reason": None,
    }
    sample = report(tmp_path, [row], [cut]).samples[0]
    assert sample["tokens"] == ["", "👩", "", "", " ab", " c"]
    assert sample["counterfactuals"][0]["tokens"] == [1, 2, 3]


@pytest.mark.parametrize("rows", [[], [skipped_row("a"), skipped_row("b", "empty_response")]], ids=["empty", "skipped"])
def test_nothing_to_show(tmp_path: Path, rows: list[dict]) -> None:
    page = report(tmp_path, rows, [])
    assert len(page.samples) == len(rows)
    assert f"{len(rows)} samples skipped" in page.text
    assert save_plots(tmp_path / "plots", scores=rows) == []
    assert write_csv(tmp_path / "tokens.csv", scores=rows).read_text().count("\n") == 1


def test_constant_and_missing_values(tmp_path: Path) -> None:
    row = score_row("flat", "a b c d\nx", 8)
    row["teacher_norm"] = [0.25] * len(row["offsets"])  # a constant vector normalises to 0 (E2)
    row["student_norm"] = [math.nan] * len(row["offsets"])
    row["teacher_loss"] = None
    sample = report(tmp_path, [row], []).samples[0]
    assert [v for v in sample["teacher"] if v is not None] == [0.0] * 4
    assert set(sample["student"]) == {None}
    assert sample["loss"] == [None, 1.734]


def test_results_tables(tmp_path: Path) -> None:
    results = {
        "arms": {"kd": {"adversarial": [0.2, 0.4]}, "leaf": {"adversarial": [0.5, 0.7], "clean": [0.9]}},
        "paired": {"leaf - kd": {"adversarial": [0.3, -0.1]}},
        "accuracy": {"before": 0.25, "after": None},
        "counts": {"verify": {"dropped_rows": 7}},
        "seeds": [3, 4],
    }
    text = report(tmp_path, [], [], results=results).text
    assert "leaf0.600 ± 0.1410.900" in text
    assert "leaf - kd · adversarial+0.100 ± 0.283-0.100" in text
    assert "before0.250after–" in text
    assert "countsverify · dropped rows 7" in text
    assert "seeds3, 4" in text


@pytest.mark.filterwarnings("ignore:Glyph .* missing")
def test_figures(tmp_path: Path) -> None:
    scores, counterfactuals = tables(8)
    before = dict(matplotlib.rcParams)
    for fig, ax in (
        plot_arms(arms()),
        plot_arms({"accuracy": {"before": 0.2, "after": 0.5}}),
        plot_attention({"before": [0.2, 0.3], "after": 0.1}),
        plot_score_histogram(scores, 0.1),
        plot_score_histogram([]),
        plot_tokens(scores[0], [(9, 20)]),
    ):
        assert ax.figure is fig
    with pytest.raises(ValueError, match=r'"arms" or "accuracy".*seeds'):
        plot_arms({"seeds": [0]})
    paths = save_plots(tmp_path, scores=scores, counterfactuals=counterfactuals, results=arms())
    assert [p.name for p in paths] == ["arms.png", "attention.png", "scores.png", "tokens.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    assert dict(matplotlib.rcParams) == before


def test_histogram_counts_every_scored_token() -> None:
    scores, _ = tables(8)
    _, ax = plot_score_histogram(scores, 0.3)
    scored = sum(sum(row["scored"]) for row in scores if row["status"] == "ok")
    assert ax.patches[0].get_data().values.sum() == scored
    assert ax.lines[0].get_xdata()[0] == 0.3


def test_terminal_heatmap() -> None:
    row = score_row("a", "<|user|> one two\nthree four\nx", 28)
    text = terminal_heatmap(row, [(8, 12)])
    assert text.plain.startswith("<|user|> one two⏎\nthree four⏎\n\nD")
    styles = {text.plain[s.start : s.end]: str(s.style) for s in text.spans}
    assert styles["<|user|>"] == "dim"
    assert "strike" in styles[" one"]
    assert "strike" not in styles[" two"]
    lowest = min((i for i, s in enumerate(row["score"]) if s is not None), key=lambda i: row["score"][i])
    assert "#d55e00" in styles[row["text"][slice(*row["offsets"][lowest])]]
    unscored = {key: value for key, value in row.items() if "norm" not in key and key != "score"}
    assert "D" not in terminal_heatmap(unscored).plain


def test_csv(tmp_path: Path) -> None:
    scores, counterfactuals = tables(10)
    with write_csv(tmp_path / "tokens.csv", scores=scores, counterfactuals=counterfactuals).open(
        newline="", encoding="utf-8"
    ) as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(sum(row["scored"]) for row in scores if row["status"] == "ok")
    removed = {(cf["source_id"], cf["prompt"]) for cf in counterfactuals}
    assert sum(int(line["deleted"]) for line in lines) >= len(removed)
    first = next(i for i, flag in enumerate(scores[0]["scored"]) if flag)
    assert int(lines[0]["position"]) == first
    assert float(lines[0]["student_norm"]) == scores[0]["student_norm"][first]
