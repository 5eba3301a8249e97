"""The stages over one run directory: select → score → prune → verify → distil → eval → report.

Each stage reads the table of the one before and writes its own (`leaf.tables`): unchanged tables are kept, a killed stage
goes on after its last whole shard. Under `accelerate launch` rank 0 writes and the others wait; all of them train.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, Trainer, TrainerCallback

from . import __version__
from .config import STAGES, RunConfig, did_you_mean
from .data import Encoder, Row, Sample, Skip, check_pair, read_rows
from .tables import Table, digest, is_current, model_key, open_table, write_table

if TYPE_CHECKING:
    from .prune import PruneConfig
    from .trainer import LeafArguments

logger = logging.getLogger(__name__)
T = TypeVar("T")
Produced = Iterator[tuple[list[dict[str, Any]], Mapping[str, int]]]  # rows and counts, unit by unit

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


class Ui(Protocol):
    """What a run tells its user."""

    def say(self, message: str) -> None: ...

    def track(self, items: Iterable[T], total: int, description: str) -> Iterator[T]: ...


class Silent:
    """Messages to the log, no progress bars."""

    def say(self, message: str) -> None:
        logger.info(message)

    def track(self, items: Iterable[T], total: int, description: str) -> Iterator[T]:
        return iter(items)


def read(config: RunConfig, data: str | None) -> Iterator[Row | Skip]:
    """The rows of `data`, as the options of `config` say."""
    if data is None:
        raise ValueError("no rows: give --data FILE (or `data:` in the config file)")
    options = ("prompt_column", "response_column", "answer_column", "prompt_template", "protect", "system", "limit")
    return read_rows(data, responses=config.responses, **{name: getattr(config, name) for name in options})


def make_encoder(config: RunConfig) -> Encoder:
    """Renders and tokenizes with the student's tokenizer, for both models."""
    return Encoder(
        AutoTokenizer.from_pretrained(_named(config, "student")),
        max_length=config.max_length,
        truncate=config.truncate,
        chat_template=config.chat_template,
        date=config.template_date,
    )


def _named(config: RunConfig, role: str) -> str:
    name = getattr(config, role)
    if name is None:
        raise ValueError(f"no {role}: give --{role} FOLDER_OR_HUB_ID (or `{role}:` in the config file)")
    return name


def _device(config: RunConfig) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class Run:
    """One run directory; every stage is a method that returns its table."""

    def __init__(self, config: RunConfig, ui: Ui | None = None):
        self.config, self.ui = config, Silent() if ui is None else ui
        self.folder = pathlib.Path(config.output)
        self.problems: list[str] = []
        self.is_writer = os.environ.get("RANK", "0") == "0"

    @functools.cached_property
    def encoder(self) -> Encoder:
        return make_encoder(self.config)

    def load(self, name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A model on the device, by default in `--dtype`."""
        device = _device(self.config)
        if dtype is None:
            auto = torch.bfloat16 if device.type == "cuda" else torch.float32
            dtype = auto if self.config.dtype == "auto" else getattr(torch, self.config.dtype)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)

    @functools.cached_property
    def shared_vocabulary(self) -> int:
        return check_pair(self.encoder.tokenizer, AutoTokenizer.from_pretrained(_named(self.config, "teacher")))

    def models(self) -> dict[str, str]:
        """Keys of teacher and student, which must be two models of one vocabulary."""
        keys = {role: model_key(_named(self.config, role)) for role in ("teacher", "student")}
        if keys["teacher"] == keys["student"]:
            raise ValueError(
                f"teacher and student are the same model ({self.config.student}): every difference between them is 0; "
                "give --teacher a stronger one"
            )
        logger.debug("%d tokens are shared", self.shared_vocabulary)
        return keys

    def key(self, stage: str, **inputs: Any) -> dict[str, Any]:
        """What the table of a stage depends on: the options that the stage reads, and `inputs`."""
        return {"leaf": __version__, **self.config.stage_key(stage), **inputs}

    def table(
        self,
        name: str,
        key: Mapping[str, Any],
        schema: pa.Schema,
        units: Sequence[T],
        produce: Callable[[Sequence[T]], Produced],
        collective: bool = False,
    ) -> Table:
        """`write_table` on rank 0, whose result the other ranks wait for; `collective` = all ranks work."""
        folder = self.folder / name
        if self.is_writer:

            def tracked(todo: Sequence[T]) -> Produced:
                return produce(todo) if collective else self.ui.track(produce(todo), len(todo), name)

            return write_table(folder, key, schema, units, tracked, self.ui.say)
        if collective and not is_current(folder, key):
            collections.deque(produce(units), maxlen=0)
        while not is_current(folder, key):
            time.sleep(1)  # a collective would time out: a stage can take hours
        return open_table(folder)

    def check(self, stage: str, left: int, total: int, *, remedy: str, skipped: int = 0) -> None:
        """Says how many rows are left, notes when too many were skipped, refuses to go on without any."""
        self.ui.say(f"{stage}: {left} of {total} left" + (f", {skipped} skipped" if skipped else ""))
        reasons = _listed(open_table(self.folder / stage))
        if skipped > self.config.max_skip_fraction * total:
            limit = f"--max-skip-fraction {self.config.max_skip_fraction}"
            self.problems.append(f"{stage}: {skipped} of {total} rows were skipped, more than {limit} ({reasons})")
        if not left:
            raise ValueError(f"no row is left after {stage} ({reasons}); {remedy}")

    def select(self) -> Table:
        """The rows that are worth pruning, every other one with its reason."""
        units = list(read(self.config, self.config.data))

        def produce(todo: Sequence[Row | Skip]) -> Produced:
            for unit in todo:
                row = _stored(unit)
                yield [row], _status(row)

        key = self.key("select", rows=digest([dataclasses.asdict(unit) for unit in units]))
        table = self.table("select", key, SELECT, units, produce)
        skipped = sum(count for name, count in table.counts.items() if name.startswith("skipped:"))
        self.check(
            "select", table.counts.get("ok", 0), len(units), skipped=skipped, remedy="--select all keeps every row"
        )
        return table

    def score(self) -> Table:
        """Both sensitivities and the score of every sample (E1–E3)."""
        from .score import Sensitivity, score_row, sensitivities, skipped_row

        kept = [restore_row(row) for row in open_table(self.folder / "select") if row["status"] == "ok"]
        both = ("instruction", "response")
        levels = both if self.config.level == "both" else (self.config.level,)
        encode = functools.partial(self.encoder.encode, segments=self.config.segments)
        units = [unit for row in kept for level in levels for unit in encode(row, level=level)]
        samples = [unit for unit in units if isinstance(unit, Sample)]
        rendered = digest([dataclasses.asdict(unit) for unit in units])
        models = self.models()

        def measure(role: str) -> Table:
            """In a table of its own, one model at a time: a new student does not measure the teacher again."""
            perplexity = role == "student" and self.config.signal == "perplexity"

            def produce(todo: Sequence[Sample]) -> Produced:
                model = self.load(_named(self.config, role))
                for one in sensitivities(model, todo, max_tokens=self.config.max_tokens, perplexity=perplexity):
                    nll = None if one.nll is None else one.nll.tolist()
                    yield [{"norm": one.norm.tolist(), "loss": one.loss, "nll": nll}], {}

            key = {"samples": rendered, "model": models[role], "perplexity": perplexity, "dtype": self.config.dtype}
            return self.table(f"score-{role}", {"leaf": __version__, **key}, SENSITIVITY, samples, produce)

        def sensitivity(row: Mapping[str, Any]) -> Sensitivity:
            nll = None if row["nll"] is None else torch.tensor(row["nll"])
            return Sensitivity(torch.tensor(row["norm"]), row["loss"], nll)

        def merge(todo: Sequence[Sample | Skip]) -> Produced:
            done = len(samples) - sum(isinstance(unit, Sample) for unit in todo)
            measured = itertools.islice(zip(teacher, student), done, None)
            for unit in todo:
                skip = isinstance(unit, Skip)
                row = skipped_row(unit) if skip else score_row(unit, *map(sensitivity, next(measured)))
                yield [row], _status(row)

        teacher, student = measure("teacher"), measure("student")
        key = self.key("score", samples=rendered, teacher=teacher.fingerprint, student=student.fingerprint)
        table = self.table("score", key, SCORES, units, merge)
        usable = {row["id"] for row in table.arrow(["id", "status"]).to_pylist() if row["status"] == "ok"}
        self.check(
            "score", len(usable), len(kept), skipped=len(kept) - len(usable), remedy="see --max-length and --protect"
        )
        return table

    def prune(self) -> Table:
        """Counterfactuals, not verified yet (E4, E5)."""
        from .prune import prune_row

        scores = open_table(self.folder / "score")
        options = prune_options(self.config)

        def produce(todo: range) -> Produced:
            for row in itertools.islice(scores, todo.start, None):
                pruned = prune_row(row, options)
                if isinstance(pruned, Skip):
                    yield [], {f"no_counterfactual:{pruned.reason}": 1}
                else:
                    yield pruned, {"ok": 1, "counterfactuals": len(pruned)}

        key = self.key("prune", scores=scores.fingerprint)
        table = self.table("prune", key, COUNTERFACTUALS, range(len(scores)), produce)
        self.check("prune", table.counts.get("ok", 0), len(scores), remedy="flag more with a larger --q or --tau")
        return table

    def verify(self) -> Table:
        """Counterfactuals with the verdict of the models (E6)."""
        pruned = open_table(self.folder / "prune")

        def produce(todo: range) -> Produced:
            for row in itertools.islice(pruned, todo.start, None):
                yield [row], {"unverified": 1}

        key = self.key("verify", counterfactuals=pruned.fingerprint)
        table = self.table("verify", key, COUNTERFACTUALS, range(len(pruned)), produce)
        return table

    def distill(self) -> Table:
        """Trains the student; the model goes to `model/`, the log of the training into the table."""
        from .pack import build_groups
        from .trainer import LeafTrainer

        scores, counterfactuals = open_table(self.folder / "score"), open_table(self.folder / "verify")
        tables = {"scores": scores.fingerprint, "counterfactuals": counterfactuals.fingerprint}
        key = self.key("distill", **tables, **self.models())
        # Named by what goes in: a checkpoint of other inputs must never be resumed from.
        checkpoints = self.folder / "checkpoints" / digest(key)
        arguments = training_arguments(self.config, checkpoints)

        def train(_: Sequence[None]) -> Produced:
            encode = self.encoder.encode_text
            groups = build_groups(scores, counterfactuals, encode, originals=self.config.originals)
            trainer = LeafTrainer(
                self.load(_named(self.config, "student"), torch.float32),
                self.load(_named(self.config, "teacher")),
                arguments,
                train_dataset=groups,
                vocab_size=self.shared_vocabulary,
                processing_class=self.encoder.tokenizer,
            )
            _report_progress(trainer, self.ui)
            last = _last_checkpoint(checkpoints)
            if last:
                self.ui.say(f"distill: resumed from {last.name}")
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            unfinished = self.folder / "model.tmp"
            trainer.save_model(str(unfinished))  # every rank: a sharded model is gathered from all
            if self.is_writer:
                shutil.rmtree(self.folder / "model", ignore_errors=True)
                unfinished.rename(self.folder / "model")
            log = trainer.state.log_history
            counts = {"groups": len(groups), "steps": trainer.state.global_step}
            yield [{"step": entry["step"], "entry": json.dumps(entry)} for entry in log], counts

        return self.table("distill", key, TRAINING_LOG, [None], train, collective=True)


def run_stages(config: RunConfig, stages: Sequence[str], ui: Ui | None = None) -> list[str]:
    """Run some of `STAGES` in order.

    Returns:
        What went beyond `max_skip_fraction`, one line per stage; everything was written all the same.

    Raises:
        ValueError: bad options or input, or no row left after a stage; names the remedy.
    """
    run = Run(config, ui)
    prune_options(config)  # what is misspelt is told now, not after hours
    if "distill" in stages:
        training_arguments(config, run.folder)
    for stage in stages:
        getattr(run, stage)()
    return run.problems


def run_all(config: RunConfig, ui: Ui | None = None) -> list[str]:
    """All stages; see `run_stages`."""
    return run_stages(config, STAGES, ui)


def prune_options(config: RunConfig) -> PruneConfig:
    from .prune import PruneConfig

    names = ("rule", "q", "tau", "tau_response", "cap", "mode", "signal", "seed")
    return PruneConfig(**{name: getattr(config, name) for name in names}, protect=config.keep)


def training_arguments(config: RunConfig, folder: pathlib.Path) -> LeafArguments:
    """The `LeafArguments` of a run: the options of `config`, and its `training` mapping beside them."""
    from .trainer import LeafArguments

    known = {f.name for f in dataclasses.fields(LeafArguments)}
    own = {
        "output_dir": str(folder),
        "seed": config.seed,
        "use_cpu": _device(config).type == "cpu",
        "loss_mode": config.loss,
        "counterfactuals_per_sample": str(config.counterfactuals_per_sample),
        "disable_tqdm": True,
    }
    for name in ("lambda_", "temperature", "divergence", "beta", "ce_weight", "max_tokens"):
        own[name] = getattr(config, name)
    for name in config.training:
        if name in own:
            raise ValueError(f"training: {name} is set by the run: use the option beside `training`, not inside it")
        if name not in known:
            raise ValueError(f"training: LeafArguments has no field {name!r}{did_you_mean(name, known)}")
    return LeafArguments(**own, **config.training)


def restore_row(row: Mapping[str, Any]) -> Row:
    """A `Row` from the select table."""
    scored = [(message, start, end) for message, start, end in row["scored"]]
    return Row(row["id"], json.loads(row["messages"]), scored, row["answer"], json.loads(row["record"]))


def _stored(unit: Row | Skip) -> dict[str, Any]:
    if isinstance(unit, Skip):
        return {"id": unit.id, "status": "skipped", "reason": unit.reason, "detail": unit.detail}
    return {
        "id": unit.id,
        "status": "ok",
        "messages": json.dumps(unit.messages, ensure_ascii=False),
        "scored": unit.scored,
        "answer": unit.answer,
        "record": json.dumps(unit.record, ensure_ascii=False, default=str),
    }


def _listed(table: Table) -> str:
    return ", ".join(f"{name} {count}" for name, count in table.counts.items()) or "no rows"


def _status(row: Mapping[str, Any]) -> dict[str, int]:
    return {"ok" if row["status"] == "ok" else f"{row['status']}:{row['reason']}": 1}


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
