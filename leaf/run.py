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
from .config import RunConfig, did_you_mean
from .data import Encoder, Row, Sample, Skip, read_rows
from .tables import Table, digest, is_current, model_key, open_table, write_table

if TYPE_CHECKING:
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
        self.config, self.ui = config, ui or Silent()
        self.folder = pathlib.Path(config.output)
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

    def models(self) -> dict[str, str]:
        """Keys of teacher and student."""
        return {role: model_key(_named(self.config, role)) for role in ("teacher", "student")}

    def table(
        self,
        name: str,
        schema: pa.Schema,
        units: Sequence[T],
        produce: Callable[[Sequence[T]], Produced],
        *,
        collective: bool = False,
        **inputs: Any,
    ) -> Table:
        """The table of a stage, keyed by the options that the stage reads and `inputs`; `collective` = all ranks work."""
        key = {"leaf": __version__, **self.config.stage_key(name.split("/")[0]), **inputs}
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

    def score(self) -> Table:
        """Both sensitivities and the score of every sample (E1–E3)."""
        from .score import Sensitivity, score_row, sensitivities, skipped_row

        kept = [restore_row(row) for row in open_table(self.folder / "select") if row["status"] == "ok"]
        units = [unit for row in kept for unit in self._encode(row)]
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

            key = {"samples": rendered, "model": models[role], "perplexity": perplexity}
            return self.table(f"score/{role}", SENSITIVITY, samples, produce, **key)

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
        key = {"samples": rendered, "teacher": teacher.fingerprint, "student": student.fingerprint}
        return self.table("score", SCORES, units, merge, **key)

    def distill(self) -> Table:
        """Trains the student; the model goes to `model/`, the log of the training into the table."""
        from .pack import build_groups
        from .trainer import LeafTrainer

        scores, counterfactuals = open_table(self.folder / "score"), open_table(self.folder / "verify")
        key = {"scores": scores.fingerprint, "counterfactuals": counterfactuals.fingerprint, **self.models()}
        # Named by what goes in: a checkpoint of other inputs must never be resumed from.
        checkpoints = self.folder / "checkpoints" / digest([self.config.stage_key("distill"), key])
        arguments = training_arguments(self.config, checkpoints)

        def train(_: Sequence[None]) -> Produced:
            encode = self.encoder.encode_text
            groups = build_groups(scores, counterfactuals, encode, originals=self.config.originals)
            trainer = LeafTrainer(
                self.load(_named(self.config, "student"), torch.float32),
                self.load(_named(self.config, "teacher")),
                arguments,
                train_dataset=groups,
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

        return self.table("distill", TRAINING_LOG, [None], train, collective=True, **key)


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
