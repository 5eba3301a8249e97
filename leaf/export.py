"""The tables in formats that other tools read: those of the authors' released code, and TRL's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .data import Row, Skip
from .prune import characters, delete
from .tables import write_text

Record = dict[str, Any]
FORMATS = ("released", "trl")


def export(
    folder: str | Path,
    format: str,
    rows: Sequence[Row | Skip],
    scores: Sequence[Mapping[str, Any]],
    counterfactuals: Sequence[Mapping[str, Any]],
) -> dict[str, int]:
    """Writes the tables into `folder` and returns how many records each file holds.

    "released": scores.json, pruned.jsonl and train.json as the authors' code reads them. "trl": train.jsonl with texts
    `prompt` and `completion`. Originals and counterfactuals stand side by side; dropped counterfactuals are left out.

    Args:
        rows: the input rows in order, skips included: released sample ids are their 1-based positions.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    kept = [row for row in counterfactuals if row["verified"] is not False]
    files: dict[str, list[Record]]
    if format == "trl":
        files = {"train.jsonl": list(trl_rows(scores, kept))}
    else:
        files = {
            "scores.json": list(released_scores(rows, scores)),
            "pruned.jsonl": list(released_pruned(rows, scores, kept)),
            "train.json": list(released_training(rows, scores, kept)),
        }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        if name.endswith(".jsonl"):
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        else:
            text = json.dumps(records, ensure_ascii=False, indent=1) + "\n"
        write_text(Path(folder) / name, text)
    return {name: len(records) for name, records in files.items()}


def trl_rows(scores: Iterable[Mapping[str, Any]], counterfactuals: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """Rendered prompt and completion of every scored original (instruction level) and every counterfactual."""
    for row in scores:
        if row["status"] == "ok" and row["level"] == "instruction":
            text, cut = row["text"], row["prompt_chars"]
            yield {"prompt": text[:cut], "completion": text[cut:]}
    for row in counterfactuals:
        yield {"prompt": row["prompt"], "completion": row["response"]}


def released_scores(rows: Iterable[Row | Skip], scores: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """One record per scored row at instruction level. Tokens that share a character are one entry (the lowest score)."""
    sample_ids = _sample_ids(rows)
    for row in scores:
        if row["status"] != "ok" or row["level"] != "instruction":
            continue
        student, teacher = (_normalised(row[f"{role}_norm"]) for role in ("student", "teacher"))
        entries = []
        for start, end in characters(row["offsets"]):
            if not row["scored"][start]:
                continue
            lowest = min(range(start, end), key=lambda n: row["score"][n])
            first, last = row["offsets"][start][0], max(b for _, b in row["offsets"][start:end])
            entries.append(
                {
                    "token": row["text"][first:last].strip(),
                    "grad_diff": row["score"][lowest],
                    "grad_norm_1": student[lowest],
                    "grad_norm_2": teacher[lowest],
                }
            )
        yield {
            "sample_id": sample_ids[row["id"]],
            "loss_1": row["student_loss"],
            "loss_2": row["teacher_loss"],
            "grad_diff": entries,
        }


def released_pruned(
    rows: Iterable[Row | Skip], scores: Iterable[Mapping[str, Any]], counterfactuals: Iterable[Mapping[str, Any]]
) -> Iterator[Record]:
    """One record per counterfactual at instruction level whose deletions lie in the last user turn (the `instruction`)."""
    rows = list(rows)
    sample_ids = _sample_ids(rows)
    by_id = {row.id: row for row in rows if isinstance(row, Row)}
    scored = {row["id"]: row for row in scores if row["level"] == "instruction" and row["status"] == "ok"}
    for pruned in counterfactuals:
        if pruned["level"] != "instruction":
            continue
        row, source = by_id[pruned["source_id"]], scored[pruned["source_id"]]
        fields = _user_fields(row, source["text"], source["prompt_chars"], pruned["removed"])
        if fields is None:
            continue
        tokens = [
            source["text"][a:b] for a, b in source["offsets"] if any(s <= a < b <= e for s, e in pruned["removed"])
        ]
        yield {
            "sample_id": sample_ids[row.id],
            **fields,
            "masked_tokens": tokens,
            "original_instruction": _instruction(row)[0],
            "output": row.messages[-1]["content"],
            "answer": row.answer,
            "mask_run_index": int(pruned["id"].rpartition(":")[2]),
            **{name: row.record.get(name) for name in ("source", "type", "filepath")},
        }


def released_training(
    rows: Iterable[Row | Skip], scores: Iterable[Mapping[str, Any]], counterfactuals: Iterable[Mapping[str, Any]]
) -> Iterator[Record]:
    """Originals, then counterfactuals of both levels; `step_response` is the pruned part of the response before a cut."""
    by_id = {row.id: row for row in rows if isinstance(row, Row)}
    scored = {(row["id"], row["level"], row["cut"]): row for row in scores if row["status"] == "ok"}
    seen = set()
    for row_id, _, _ in scored:
        if row_id not in seen:
            seen.add(row_id)
            row = by_id[row_id]
            instruction, extra = _instruction(row)
            yield {"instruction": instruction, "input": extra, "output": row.messages[-1]["content"]}
    for pruned in counterfactuals:
        row, source = by_id[pruned["source_id"]], scored[pruned["source_id"], pruned["level"], pruned["cut"]]
        text, cut = source["text"], source["prompt_chars"]
        response = row.messages[-1]["content"]
        if pruned["level"] == "instruction":
            fields = _user_fields(row, text, cut, pruned["removed"])
            if fields is not None:
                yield {"input": "", **fields, "output": response}
            continue
        kept = response.strip()
        start = text.rfind(kept)
        step = delete(text[start:cut], [(a - start, b - start) for a, b in pruned["removed"]])
        instruction, extra = _instruction(row)
        yield {
            "instruction": instruction,
            "input": extra,
            "step_response": step,
            "output": text[cut : start + len(kept)],
        }


def read_released_scores(scores: str | Path, rows: Iterable[Row | Skip]) -> Iterator[Record]:
    """The authors' scores as rows of a scores table, to be pruned by any rule without scoring again.

    Their files hold no ids and no template: `text` is the bare instruction and response, and a token starts with the
    whitespace before it. Norms are the normalised ones. A sample whose tokens are not those of its instruction is an error.
    """
    by_number = dict(enumerate(rows, start=1))
    for entry in json.loads(Path(scores).read_text(encoding="utf-8")):
        row = by_number.get(entry["sample_id"])
        if not isinstance(row, Row):
            raise ValueError(f"{scores}: sample_id {entry['sample_id']} is none of the {len(by_number)} rows")
        instruction, response = row.messages[-2]["content"], row.messages[-1]["content"]
        offsets: list[tuple[int, int]] = []
        for each in entry["grad_diff"]:
            start = offsets[-1][1] if offsets else 0
            found = re.compile(r"\s*" + re.escape(each["token"])).match(instruction, start)
            if found is None:
                raise ValueError(
                    f"{scores}: sample_id {entry['sample_id']}: token {each['token']!r} is not next in its instruction, "
                    f"{instruction[start : start + 40]!r}: the scores belong to other rows"
                )
            offsets.append(found.span())
        count = len(offsets)
        rest = (offsets[-1][1] if offsets else 0, len(instruction))  # one unscored token for what was not scored
        yield {
            "id": row.id,
            "level": "instruction",
            "cut": 0,
            "status": "ok",
            "reason": None,
            "text": instruction + response,
            "prompt_chars": len(instruction),
            "input_ids": None,
            "offsets": [*offsets, rest, (len(instruction), len(instruction) + len(response))],
            "response_start": count + 1,
            "scored": [True] * count + [False, False],
            "teacher_norm": [e["grad_norm_2"] for e in entry["grad_diff"]] + [None, None],
            "student_norm": [e["grad_norm_1"] for e in entry["grad_diff"]] + [None, None],
            "score": [e["grad_diff"] for e in entry["grad_diff"]] + [None, None],
            "teacher_loss": entry["loss_2"],
            "student_loss": entry["loss_1"],
            "student_nll": None,
        }


def _sample_ids(rows: Iterable[Row | Skip]) -> dict[str, int]:
    return {row.id: number for number, row in enumerate(rows, start=1)}


def _normalised(norms: Sequence[float | None]) -> list[float]:
    """E2; 0 where not scored."""
    scored = [norm for norm in norms if norm is not None]
    low, spread = min(scored), max(scored) - min(scored)
    return [0.0 if norm is None or not spread else (norm - low) / spread for norm in norms]


def _content(row: Row) -> str:
    """The last user turn: what the authors call the instruction."""
    return next(m["content"] for m in reversed(row.messages) if m["role"] == "user")


def _instruction(row: Row) -> tuple[str, str]:
    """`instruction` and `input` if the last user turn is made of these fields, else the whole turn and nothing."""
    content, instruction, extra = _content(row), str(row.record.get("instruction")), row.record.get("input")
    return (instruction, str(extra)) if extra and content == f"{instruction}\n{extra}" else (content, "")


def _user_fields(row: Row, text: str, prompt_chars: int, removed: Sequence[Sequence[int]]) -> Record | None:
    """`instruction` and `input` without what was removed from the rendered text; None if that lies elsewhere."""
    instruction, extra = _instruction(row)
    content = _content(row)
    start = text.rfind(content, 0, prompt_chars)
    if start < 0:  # the template trims
        start = text.rfind(content.strip(), 0, prompt_chars) - (len(content) - len(content.lstrip()))
    spans = [(a - start, b - start) for a, b in removed]
    if any(b <= 0 or a >= len(content) for a, b in spans):
        return None

    def pruned(field: str, begin: int) -> str:
        ends = [(max(a - begin, 0), min(b - begin, len(field))) for a, b in spans]
        return delete(field, [(a, b) for a, b in ends if a < b])

    fields = {"instruction": pruned(instruction, 0)}
    return fields | {"input": pruned(extra, len(instruction) + 1)} if extra else fields
