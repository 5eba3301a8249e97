"""The stages of a run: each reads the table of the one before and writes its own. `leaf.run` calls them by name."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from . import __version__
from . import export as formats
from .card import add_evaluation
from .data import Row, Sample, Skip
from .distill import distill
from .evaluate import attention_to_flagged, summary
from .prune import prune_row
from .run import Produced, Run, grader_of, prune_options, read
from .score import score_pair, skipped_row
from .select import Answer, Selected, answer_rows, roles
from .select import decide as decide_row
from .sensitivity import Scorer, Sensitivity, batches
from .tables import Table, digest, model_key, open_table
from .teacher_build import cache
from .units import Pair, read_pairs
from .verify import ROLES, answered_rightly
from .verify import decide as decide_counterfactual

if TYPE_CHECKING:
    from rich.console import Console

_TEXT, _INT, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_SPANS, _NUMBERS = pa.list_(pa.list_(pa.int64())), pa.list_(pa.float32())
SELECT = pa.schema(
    [
        *((name, _TEXT) for name in ("id", "status", "reason", "detail", "messages", "answer", "record")),
        ("scored", _SPANS),
        *((f"{role}_response", _TEXT) for role in ("teacher", "student")),
        *((f"{role}_right", _BOOL) for role in ("teacher", "student")),
    ]
)
SENSITIVITY = pa.schema([("norm", _NUMBERS), ("loss", _FLOAT), ("nll", _NUMBERS), ("skip", _TEXT), ("detail", _TEXT)])
SCORES = pa.schema(
    [
        *(("id", _TEXT), ("level", _TEXT), ("cut", _INT), ("status", _TEXT), ("reason", _TEXT), ("detail", _TEXT)),
        ("text", _TEXT),
        *(("prompt_chars", _INT), ("input_ids", pa.list_(_INT)), ("offsets", _SPANS), ("response_start", _INT)),
        ("scored", pa.list_(_BOOL)),
        *((name, _NUMBERS) for name in ("teacher_norm", "student_norm", "score")),
        *((name, _FLOAT) for name in ("teacher_loss", "student_loss")),
        ("student_nll", _NUMBERS),
    ]
)
COUNTERFACTUALS = pa.schema(
    [
        *(("id", _TEXT), ("source_id", _TEXT), ("level", _TEXT), ("cut", _INT), ("mode", _TEXT), ("removed", _SPANS)),
        *(("prompt", _TEXT), ("response", _TEXT), ("verified", _BOOL), ("reason", _TEXT)),
    ]
)
ATTENTION = pa.schema([("attention", _FLOAT)])
EVALUATION = pa.schema(
    [
        *(("model", _TEXT), ("accuracy", _FLOAT), ("attention_to_flagged", _FLOAT)),
        *((name, _INT) for name in ("checked", "unchecked", "skipped")),
    ]
)


SCORE_REMEDY = "see --max-length and --protect"


def select(run: Run) -> Table:
    """The rows that are worth pruning, every other one with its reason."""
    units = list(read(run.config, run.config.data))
    rows = [unit for unit in units if isinstance(unit, Row)]
    asked = {role: run.name(role) for role in roles(run.config.select, run.config.responses)}
    if asked:
        run.models()
    unchecked = run.config.responses == "teacher"  # a response is wanted of rows without an answer too

    def produce(todo: Sequence[Row | Skip]) -> Produced:
        first = sum(isinstance(unit, Row) for unit in units[: len(units) - len(todo)])
        told = {role: _answers(run, f"select-{role}", name, rows, unchecked, first) for role, name in asked.items()}
        for unit in todo:
            if isinstance(unit, Row):
                each = {role: next(told[role]) if role in told else None for role in ("teacher", "student")}
                row = _stored(decide_row(unit, **each, select=run.config.select, responses=run.config.responses))
            else:
                row = {"id": unit.id, "status": "skipped", "reason": unit.reason, "detail": unit.detail}
            yield [row], _status(row)

    rows_read = digest([dataclasses.asdict(unit) for unit in units])
    key = run.key("select", rows=rows_read, **run.asked_key(asked))
    table = run.table("select", key, SELECT, units, produce, collective=bool(asked))
    left = sum(count for name, count in table.counts.items() if name.startswith("ok"))
    skipped = sum(count for name, count in table.counts.items() if name.startswith("skipped"))
    remedy = "try --select teacher_right or all, another --grader, or a larger --max-new-tokens"
    run.check("select", left, len(units), skipped=skipped, remedy=remedy)
    return table


def selected_rows(run: Run) -> list[Row]:
    """What the select stage left."""
    rows = (restore_row(row) for row in open_table(run.folder / "select") if row["status"] == "ok")
    return [row for row in rows if isinstance(row, Row)]


def encoded(run: Run, rows: Iterable[Row | Skip]) -> list[Pair | Skip]:
    """The samples of rows, at the levels that are scored, as each model reads them."""
    both = ("instruction", "response")
    levels = both if run.config.level == "both" else (run.config.level,)
    encode = functools.partial(run.encoder.encode, segments=run.config.segments)
    samples = (
        unit
        for row in rows
        for units in ([[row]] if isinstance(row, Skip) else (encode(row, level=level) for level in levels))
        for unit in units
    )
    return list(read_pairs(samples, run.reader))


def score(run: Run) -> Table:
    """Both sensitivities and the score of every sample (E1–E3)."""
    kept = selected_rows(run)
    models = run.models()
    units = encoded(run, kept)
    samples = {role: [getattr(unit, role) for unit in units if isinstance(unit, Pair)] for role in models}
    rendered = {
        role: digest([dataclasses.asdict(unit if isinstance(unit, Skip) else getattr(unit, role)) for unit in units])
        for role in models
    }

    def measure(role: str) -> Table:
        """In a table of its own, one model at a time: a new student does not measure the teacher again."""
        name = run.name(role)
        perplexity = role == "student" and run.config.signal == "perplexity"
        shard = role == "teacher" and run.config.shard_teacher
        packs = list(batches(samples[role], run.config.max_tokens))  # of all: whoever measures one, it is the same

        def produce(todo: Sequence[list[Sample]]) -> Produced:
            steps = run.most(len(todo)) if shard else len(todo)
            if not steps:
                return
            scorer = Scorer(run.load(name, shard=shard), perplexity=perplexity, in_step=shard)
            for pack in todo:
                rows = [_stored_sensitivity(one) for one in scorer(pack)]
                yield rows, collections.Counter(f"skipped:{row['skip']}" for row in rows if "skip" in row)
            for _ in range(steps - len(todo)):  # the ranks with more packs gather their layers from this one too
                scorer([_idle(samples[role][0])])

        key = {"samples": rendered[role], "model": models[role], "perplexity": perplexity, "dtype": run.dtype}
        key = {"leaf": __version__, "quantization": run.quantization(name), **key}
        return run.table(f"score-{role}", key, SENSITIVITY, packs, produce, tokens=_tokens, in_step=shard)

    def merge(todo: Sequence[Pair | Skip]) -> Produced:
        measured = zip(*(_from(table, units, todo, Pair) for table in (teacher, student)))
        for unit in todo:
            own = map(_sensitivity, next(measured)) if isinstance(unit, Pair) else ()
            row = skipped_row(unit) if isinstance(unit, Skip) else score_pair(unit, *own)
            yield [row], _status(row)

    teacher, student = measure("teacher"), measure("student")
    key = run.key("score", samples=rendered, teacher=teacher.fingerprint, student=student.fingerprint)
    table = run.table("score", key, SCORES, units, merge)
    usable = {row["id"] for row in table.arrow(["id", "status"]).to_pylist() if row["status"] == "ok"}
    run.check("score", len(usable), len(kept), skipped=len(kept) - len(usable), remedy=SCORE_REMEDY)
    for role, measured in (("teacher", teacher), ("student", student)):
        if count := measured.counts.get("skipped:oom"):
            again = f"to try them again elsewhere, remove {measured.path}"
            run.ui.say(f"score: {count} samples do not fit into memory with the {role} (skipped: oom); {again}")
    return table


def preview_score(run: Run, console: Console) -> None:
    """What `score` would do, and what it would take; writes nothing."""
    from .estimate import Workload, count, estimator_of, report

    kept = selected_rows(run)
    units = encoded(run, kept)
    usable = len({unit.student.id for unit in units if isinstance(unit, Pair)})
    count(units, run.config.max_tokens, console)
    counts = collections.Counter(f"skipped:{unit.reason}" if isinstance(unit, Skip) else "ok" for unit in units)
    run.check("score", usable, len(kept), skipped=len(kept) - usable, remedy=SCORE_REMEDY, counts=counts)
    estimators = {
        role: estimator_of(run.config, Workload.of(units, role, run.config.max_tokens))
        for role in ("teacher", "student")
    }
    scoring = [estimator.scoring(role) for role, estimator in estimators.items()]
    report(estimators["student"], scoring, console)


def prune(run: Run) -> Table:
    """Counterfactuals, not verified yet (E4, E5)."""
    scores = open_table(run.folder / "score")
    options = prune_options(run.config)

    def produce(todo: Sequence[int]) -> Produced:
        for row in itertools.islice(scores, todo[0], None):
            pruned = prune_row(row, options)
            if isinstance(pruned, Skip):
                yield [], {f"no_counterfactual:{pruned.reason}": 1}
            else:
                yield pruned, {"ok": 1, "counterfactuals": len(pruned)}

    key = run.key("prune", scores=scores.fingerprint)
    table = run.table("prune", key, COUNTERFACTUALS, range(len(scores)), produce)
    run.check("prune", table.counts.get("ok", 0), len(scores), remedy="flag more with a larger --q or --tau")
    return table


def verify(run: Run) -> Table:
    """Counterfactuals with the verdict of the models (E6)."""
    pruned, selected = open_table(run.folder / "prune"), open_table(run.folder / "select")
    references = {row["id"]: row["answer"] for row in selected.arrow(["id", "answer"]).to_pylist()}
    asked = {role: run.name(role) for role in ROLES[str(run.config.verify)]}

    def produce(todo: Sequence[int]) -> Produced:
        rows = pruned.rows()
        told = {}
        for role, name in asked.items():
            ask = functools.partial(run.ask, name, f"verify-{role}")
            told[role] = answered_rightly(ask, rows, references, grader=grader_of(run.config), first=todo[0])
        for n in todo:
            verdict = decide_counterfactual(rows[n], {role: next(right) for role, right in told.items()})
            label = {True: "verified", False: "dropped", None: "unverified"}[verdict["verified"]]
            yield [verdict], {":".join(filter(None, (label, verdict["reason"]))): 1}

    key = run.key("verify", counterfactuals=pruned.fingerprint, references=digest(references), **run.asked_key(asked))
    table = run.table("verify", key, COUNTERFACTUALS, range(len(pruned)), produce, collective=bool(asked))
    dropped = sum(count for name, count in table.counts.items() if name.startswith("dropped"))
    run.check("verify", len(pruned) - dropped, len(pruned), remedy="try --verify teacher or none")
    return table


def evaluate(run: Run) -> Table:
    """The student before and after: accuracy on the evaluation rows, attention on what is flagged in the scored rows."""
    open_table(run.folder / "distill")
    after = run.folder / "model"
    if not after.is_dir():
        raise ValueError(f"{after} is missing: remove {run.folder / 'distill'} and run `leaf distill` again")
    if run.config.eval_data is None:
        run.ui.say("eval: no --eval-data: accuracy is that on the rows of --data, which the student was trained on")
    units = list(read(run.config, run.config.eval_data or run.config.data, "eval_data"))
    rows = [unit for unit in units if isinstance(unit, Row)]
    for reason, count in collections.Counter(unit.reason for unit in units if isinstance(unit, Skip)).items():
        run.ui.say(f"eval: {count} of {len(units)} rows are left out: {reason}")
    scores = open_table(run.folder / "score")
    options = prune_options(run.config)
    models = {"before": run.name("student"), "after": str(after)}

    def attention(name: str, model: str) -> Table:
        def produce(todo: Sequence[int]) -> Produced:
            scored = list(itertools.islice(scores, todo[0], None))
            for share in attention_to_flagged(run.load(model), scored, options, max_tokens=run.config.max_tokens):
                yield [{"attention": share}], {}

        flagged = {"scores": scores.fingerprint, "flags": dataclasses.asdict(options)}
        key = {"leaf": __version__, "model": model_key(model), "dtype": run.dtype, **flagged}
        return run.table(name, key, ATTENTION, range(len(scores)), produce)

    attended = {label: attention(f"attention-{label}", model) for label, model in models.items()}

    def produce(labels: Sequence[str]) -> Produced:
        told = {label: _answers(run, f"eval-{label}", models[label], rows) for label in labels}
        for label, answered in told.items():
            yield [{"model": label, **summary(answered, (row["attention"] for row in attended[label]))}], {}

    key = run.key(
        "eval",
        rows=digest([dataclasses.asdict(row) for row in rows]),
        attention=[table.fingerprint for table in attended.values()],
        **run.asked_key(models),
    )
    table = run.table("eval", key, EVALUATION, list(models), produce, collective=True)
    for row in table:
        shown = [
            f"{name} {'none' if row[name] is None else format(row[name], '.3f')}" for name in EVALUATION.names[1:3]
        ]
        run.ui.say(f"eval: {row['model']}: {', '.join(shown)} ({row['checked']} rows checked)")
    if run.is_writer:
        unseen = run.config.eval_data is not None
        add_evaluation(after / "README.md", table, str(run.config.eval_data or run.config.data), unseen=unseen)
    return table


def report(run: Run) -> None:
    """report.html, plots/ and tokens.csv; accuracy and attention where the run was evaluated."""
    from .report import save_plots, write_csv, write_report  # matplotlib takes a second to import

    if not run.is_writer:
        return
    tables: dict[str, Any] = {
        "scores": open_table(run.folder / "score"),
        "counterfactuals": open_table(run.folder / "verify"),
    }
    named = {role: getattr(run.config, role) for role in ("teacher", "student")}
    results: dict[str, Any] = {"run": {role: name for role, name in named.items() if name}}
    results["counts"] = {name: open_table(run.folder / name).counts for name in ("select", "score", "prune", "verify")}
    attention = None
    if (run.folder / "eval").is_dir():
        evaluated = {row["model"]: row for row in open_table(run.folder / "eval")}
        results["accuracy"] = {model: row["accuracy"] for model, row in evaluated.items()}
        attention = {model: row["attention_to_flagged"] for model, row in evaluated.items()}
    path = write_report(run.folder / "report.html", **tables, results=results, attention=attention)
    save_plots(run.folder / "plots", **tables, results=results, attention=attention)
    write_csv(run.folder / "tokens.csv", **tables)
    run.ui.say(f"report: {path}")


def export(output: str, format: str, to: str | None) -> dict[str, int]:
    """The tables of a run directory in another format; returns the records in each file written."""
    folder = pathlib.Path(output)
    rows = [restore_row(row) for row in open_table(folder / "select")]
    scores, counterfactuals = open_table(folder / "score").rows(), open_table(folder / "verify").rows()
    return formats.export(to or folder / "export", format, rows, scores, counterfactuals)


FUNCTIONS: dict[str, Callable[[Run], Any]] = {
    "select": select,
    "score": score,
    "prune": prune,
    "verify": verify,
    "cache": cache,
    "distill": distill,
    "eval": evaluate,
    "report": report,
}


def restore_row(row: Mapping[str, Any]) -> Row | Skip:
    """What was read, from the select table."""
    if row["messages"] is None:
        return Skip(row["id"], row["reason"], row["detail"])
    scored = [(message, start, end) for message, start, end in row["scored"]]
    return Row(row["id"], json.loads(row["messages"]), scored, row["answer"], json.loads(row["record"]))


def _answers(
    run: Run, label: str, model: str, rows: Sequence[Row], unchecked: bool = False, first: int = 0
) -> Iterator[Answer | Skip]:
    """What a model answers each row from `first` on; it is asked at once, answers are graded as they are read."""
    ask = functools.partial(run.ask, model, label)
    grader = grader_of(run.config)
    return answer_rows(ask, run.encoder, rows, grader=grader, ask_unchecked=unchecked, first=first)


def _stored(chosen: Selected) -> dict[str, Any]:
    """A row of the select table."""
    row = chosen.row
    stored = {name: getattr(chosen, name) for name in ("id", "status", "reason", "detail")}
    for role in ("teacher", "student"):
        if answer := getattr(chosen, role):
            stored |= {f"{role}_response": answer.response, f"{role}_right": answer.right}
    if row is not None:
        texts = {"messages": row.messages, "record": row.record}
        stored |= {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in texts.items()}
        stored |= {"scored": row.scored, "answer": row.answer}
    return stored


def _from(table: Table, units: Sequence[Any], todo: Sequence[Any], kind: type) -> Iterator[dict[str, Any]]:
    """The rows of a table that has one for each unit of `kind`, from the first unit in `todo` on."""
    done = sum(isinstance(unit, kind) for unit in units[: len(units) - len(todo)])
    return itertools.islice(table, done, None)


def _tokens(pack: Sequence[Sample]) -> int:
    return sum(len(sample.input_ids) for sample in pack)


def _idle(sample: Sample) -> Sample:
    """The least that can be scored."""
    return dataclasses.replace(sample, input_ids=sample.input_ids[:2], response_start=1, scored=[False, False])


def _stored_sensitivity(one: Sensitivity | Skip) -> dict[str, Any]:
    if isinstance(one, Skip):
        return {"skip": one.reason, "detail": one.detail}
    return {"norm": one.norm.tolist(), "loss": one.loss, "nll": None if one.nll is None else one.nll.tolist()}


def _sensitivity(row: Mapping[str, Any]) -> Sensitivity | Skip:
    if row["skip"]:
        return Skip("", row["skip"], row["detail"])
    return Sensitivity(torch.tensor(row["norm"]), row["loss"], None if row["nll"] is None else torch.tensor(row["nll"]))


def _status(row: Mapping[str, Any]) -> dict[str, int]:
    return {":".join(filter(None, (row["status"], row["reason"]))): 1}
