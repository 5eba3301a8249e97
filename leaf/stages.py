"""The stages of a run: each reads the table of the one before and writes its own. `leaf.run` calls them by name."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from . import __version__
from .data import Row, Sample, Skip
from .run import Produced, Run, Ui, prune_options, read, training_arguments
from .tables import Table, digest, open_table

if TYPE_CHECKING:
    from .select import Selected

logger = logging.getLogger(__name__)

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
ANSWERS = pa.schema([("response", _TEXT), ("right", _BOOL), ("skip", _TEXT), ("detail", _TEXT)])
SENSITIVITY = pa.schema([("norm", _NUMBERS), ("loss", _FLOAT), ("nll", _NUMBERS)])
SCORES = pa.schema(
    [
        *(("id", _TEXT), ("level", _TEXT), ("cut", _INT), ("status", _TEXT), ("reason", _TEXT), ("text", _TEXT)),
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
TRAINING_LOG = pa.schema([("step", _INT), ("entry", _TEXT)])


def answers(run: Run, stage: str, role: str, units: Sequence[Row]) -> Table:
    """What a model answers each row, in a table of its own: the other model or the selection may change meanwhile."""
    from .select import Answer, answer_rows

    def produce(todo: Sequence[Row]) -> Produced:
        for answer in answer_rows(run.load(run.name(role)), run.encoder, todo, **run.generation()):
            if isinstance(answer, Answer):
                yield [dataclasses.asdict(answer)], {"right" if answer.right else "not_right": 1}
            else:
                yield [{"skip": answer.reason, "detail": answer.detail}], {f"skipped:{answer.reason}": 1}

    asked = digest([dataclasses.asdict(row) for row in units])
    return run.table(f"{stage}-{role}", run.generation_key(role, rows=asked), ANSWERS, units, produce)


def select(run: Run) -> Table:
    """The rows that are worth pruning, every other one with its reason."""
    from .select import Answer, decide, roles

    units = list(read(run.config, run.config.data))
    rows = [unit for unit in units if isinstance(unit, Row)]
    told = {role: answers(run, "select", role, rows) for role in roles(run.config.select, run.config.responses)}

    def answer(row: Mapping[str, Any]) -> Answer | Skip:
        return Skip("", row["skip"], row["detail"]) if row["skip"] else Answer(row["response"], row["right"])

    def produce(todo: Sequence[Row | Skip]) -> Produced:
        given = {role: _from(table, units, todo, Row) for role, table in told.items()}
        for unit in todo:
            if isinstance(unit, Row):
                each = {role: answer(next(given[role])) if role in given else None for role in ("teacher", "student")}
                chosen = decide(unit, **each, select=run.config.select, responses=run.config.responses)
                row = _stored(chosen)
            else:
                row = {"id": unit.id, "status": "skipped", "reason": unit.reason, "detail": unit.detail}
            yield [row], _status(row)

    rows_read = digest([dataclasses.asdict(unit) for unit in units])
    key = run.key("select", rows=rows_read, **{role: table.fingerprint for role, table in told.items()})
    table = run.table("select", key, SELECT, units, produce)
    left = sum(count for name, count in table.counts.items() if name.startswith("ok"))
    skipped = sum(count for name, count in table.counts.items() if name.startswith("skipped"))
    remedy = "try --select teacher_right or all, another --grader, or a larger --max-new-tokens"
    run.check("select", left, len(units), skipped=skipped, remedy=remedy)
    return table


def score(run: Run) -> Table:
    """Both sensitivities and the score of every sample (E1–E3)."""
    from .score import Sensitivity, score_row, sensitivities, skipped_row

    kept = [restore_row(row) for row in open_table(run.folder / "select") if row["status"] == "ok"]
    both = ("instruction", "response")
    levels = both if run.config.level == "both" else (run.config.level,)
    encode = functools.partial(run.encoder.encode, segments=run.config.segments)
    units = [unit for row in kept for level in levels for unit in encode(row, level=level)]
    samples = [unit for unit in units if isinstance(unit, Sample)]
    rendered = digest([dataclasses.asdict(unit) for unit in units])
    models = run.models()

    def measure(role: str) -> Table:
        """In a table of its own, one model at a time: a new student does not measure the teacher again."""
        perplexity = role == "student" and run.config.signal == "perplexity"

        def produce(todo: Sequence[Sample]) -> Produced:
            model = run.load(run.name(role))
            for one in sensitivities(model, todo, max_tokens=run.config.max_tokens, perplexity=perplexity):
                nll = None if one.nll is None else one.nll.tolist()
                yield [{"norm": one.norm.tolist(), "loss": one.loss, "nll": nll}], {}

        key = {"samples": rendered, "model": models[role], "perplexity": perplexity, "dtype": run.config.dtype}
        return run.table(f"score-{role}", {"leaf": __version__, **key}, SENSITIVITY, samples, produce)

    def sensitivity(row: Mapping[str, Any]) -> Sensitivity:
        nll = None if row["nll"] is None else torch.tensor(row["nll"])
        return Sensitivity(torch.tensor(row["norm"]), row["loss"], nll)

    def merge(todo: Sequence[Sample | Skip]) -> Produced:
        measured = zip(*(_from(table, units, todo, Sample) for table in (teacher, student)))
        for unit in todo:
            skip = isinstance(unit, Skip)
            row = skipped_row(unit) if skip else score_row(unit, *map(sensitivity, next(measured)))
            yield [row], _status(row)

    teacher, student = measure("teacher"), measure("student")
    key = run.key("score", samples=rendered, teacher=teacher.fingerprint, student=student.fingerprint)
    table = run.table("score", key, SCORES, units, merge)
    usable = {row["id"] for row in table.arrow(["id", "status"]).to_pylist() if row["status"] == "ok"}
    run.check("score", len(usable), len(kept), skipped=len(kept) - len(usable), remedy="see --max-length and --protect")
    return table


def prune(run: Run) -> Table:
    """Counterfactuals, not verified yet (E4, E5)."""
    from .prune import prune_row

    scores = open_table(run.folder / "score")
    options = prune_options(run.config)

    def produce(todo: range) -> Produced:
        for row in itertools.islice(scores, todo.start, None):
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
    from .verify import ROLES, answered_rightly, decide

    pruned, selected = open_table(run.folder / "prune"), open_table(run.folder / "select")
    answers = {row["id"]: row["answer"] for row in selected.arrow(["id", "answer"]).to_pylist()}
    units = range(len(pruned))

    def ask(role: str) -> Table:
        def produce(todo: range) -> Produced:
            rows = list(itertools.islice(pruned, todo.start, None))
            model = run.load(run.name(role))
            for right in answered_rightly(model, run.encoder, rows, answers, **run.generation()):
                yield [{"right": right}], {}

        key = run.generation_key(role, counterfactuals=pruned.fingerprint, answers=digest(answers))
        return run.table(f"verify-{role}", key, ANSWERS, units, produce)

    told = {role: ask(role) for role in ROLES[str(run.config.verify)]}

    def produce(todo: range) -> Produced:
        rights = {role: itertools.islice(table, todo.start, None) for role, table in told.items()}
        for row in itertools.islice(pruned, todo.start, None):
            verdict = decide(row, {role: next(right)["right"] for role, right in rights.items()})
            yield [verdict], {"kept" if verdict["verified"] is not False else f"dropped:{verdict['reason']}": 1}

    fingerprints = {role: table.fingerprint for role, table in told.items()}
    table = run.table(
        "verify",
        run.key("verify", counterfactuals=pruned.fingerprint, **fingerprints),
        COUNTERFACTUALS,
        units,
        produce,
    )
    run.check("verify", table.counts.get("kept", 0), len(pruned), remedy="try --verify teacher or none")
    return table


def distill(run: Run) -> Table:
    """Trains the student; the model goes to `model/`, the log of the training into the table."""
    from .pack import build_groups
    from .trainer import LeafTrainer

    scores, counterfactuals = open_table(run.folder / "score"), open_table(run.folder / "verify")
    tables = {"scores": scores.fingerprint, "counterfactuals": counterfactuals.fingerprint}
    key = run.key("distill", **tables, **run.models())
    # Named by what goes in: a checkpoint of other inputs must never be resumed from.
    checkpoints = run.folder / "checkpoints" / digest(key)
    arguments = training_arguments(run.config, checkpoints)

    def train(_: Sequence[None]) -> Produced:
        encode = run.encoder.encode_text
        groups = build_groups(scores, counterfactuals, encode, originals=run.config.originals)
        trainer = LeafTrainer(
            run.load(run.name("student"), torch.float32),
            run.load(run.name("teacher")),
            arguments,
            train_dataset=groups,
            vocab_size=run.shared_vocabulary,
            processing_class=run.encoder.tokenizer,
        )
        _report_progress(trainer, run.ui)
        last = _last_checkpoint(checkpoints)
        if last:
            run.ui.say(f"distill: resumed from {last.name}")
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        unfinished = run.folder / "model.tmp"
        trainer.save_model(str(unfinished))  # every rank: a sharded model is gathered from all
        if run.is_writer:
            shutil.rmtree(run.folder / "model", ignore_errors=True)
            unfinished.rename(run.folder / "model")
        log = trainer.state.log_history
        counts = {"groups": len(groups), "steps": trainer.state.global_step}
        yield [{"step": entry["step"], "entry": json.dumps(entry)} for entry in log], counts

    return run.table("distill", key, TRAINING_LOG, [None], train, collective=True)


FUNCTIONS: dict[str, Callable[[Run], Any]] = {
    "select": select,
    "score": score,
    "prune": prune,
    "verify": verify,
    "distill": distill,
}


def restore_row(row: Mapping[str, Any]) -> Row:
    """A `Row` from the select table."""
    scored = [(message, start, end) for message, start, end in row["scored"]]
    return Row(row["id"], json.loads(row["messages"]), scored, row["answer"], json.loads(row["record"]))


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


def _status(row: Mapping[str, Any]) -> dict[str, int]:
    return {":".join(filter(None, (row["status"], row["reason"]))): 1}


def _last_checkpoint(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest checkpoint that is whole: its trainer_state.json is written last."""
    steps = {}
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            steps[json.loads(path.read_text())["global_step"]] = path.parent
        except json.JSONDecodeError:
            logger.warning("%s is cut off; an older checkpoint is used", path.parent)
    return steps[max(steps)] if steps else None


def _report_progress(trainer: Trainer, ui: Ui) -> None:
    """The run's own messages and bar instead of the Trainer's."""

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            todo = state.max_steps - state.global_step
            self.bar = iter(ui.track(range(todo), todo, "distill"))
            next(self.bar, None)  # the bar counts an item when the next one is asked for

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            next(self.bar, None)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                ui.say(f"distill: step {state.global_step}, loss {float(logs['loss']):.4g}")

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
