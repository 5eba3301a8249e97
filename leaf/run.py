"""One run directory, and the stages over it: select → score → prune → verify → cache → distil → eval → report.

Unchanged tables are kept, a killed stage goes on after its last whole shard, and no model is asked a prompt twice. Under
`accelerate launch` all ranks generate, score, cache and train; rank 0 does the rest and the others wait. The stages
themselves are in `leaf.stages`.
"""

from __future__ import annotations

import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from . import __version__, graders
from .cache import Responses
from .checks import check_arguments
from .config import CACHED, STAGES, RunConfig, asked_of_the_hub
from .data import DifferentTokenizers, Encoder, Row, Skip, check_pair, read_rows
from .generate import check_vllm, free_memory, generate, load_vllm
from .loading import check_loading, load_model, most
from .tables import Table, current_table, digest, model_key, open_table, wait_until, write_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .prune import PruneConfig

logger = logging.getLogger(__name__)
T = TypeVar("T")
Produced = Iterator[tuple[list[dict[str, Any]], Mapping[str, int]]]  # rows and counts, unit by unit


class Ui(Protocol):
    """What a run tells its user."""

    def say(self, message: str) -> None: ...

    def show(self, renderable: RenderableType) -> None:
        """What is laid out by rich."""
        ...

    def track(
        self, items: Iterable[T], total: int, description: str, tokens: Sequence[int] | None = None
    ) -> Iterator[T]:
        """`items` with a progress bar; with `tokens` (of each item) that of tokens per second."""
        ...


class Silent:
    """Messages to the log, no progress bars."""

    def say(self, message: str) -> None:
        logger.info(message)

    def show(self, renderable: RenderableType) -> None: ...

    def track(
        self, items: Iterable[T], total: int, description: str, tokens: Sequence[int] | None = None
    ) -> Iterator[T]:
        return iter(items)


def read(config: RunConfig, data: str | None, option: str = "data") -> Iterator[Row | Skip]:
    """The rows of `data`, which `option` names, as the other options of `config` say."""
    if data is None:
        flag = "--" + option.replace("_", "-")
        raise ValueError(f"no rows: give {flag} FILE (or `{option}:` in the config file)")
    options = ("prompt_column", "response_column", "answer_column", "prompt_template", "protect", "system", "limit")
    return read_rows(data, responses=config.responses, **{name: getattr(config, name) for name in options})


def make_encoder(config: RunConfig) -> Encoder:
    """Renders and tokenizes with the student's tokenizer."""
    with asked_of_the_hub(name := config.named("student")):
        tokenizer = AutoTokenizer.from_pretrained(name)
    return Encoder(
        tokenizer,
        max_length=config.max_length,
        truncate=config.truncate,
        chat_template=config.chat_template,
        date=config.template_date,
    )


def different_tokenizers(encoder: Encoder) -> str:
    """What becomes of a pair with two tokenizers."""
    said = (
        "teacher and student have different tokenizers: they are compared on common text units, and cannot be distilled"
    )
    if encoder.template is None:
        return said
    remedy = "a --chat-template whose markers both know, or --chat-template none, may suit it better"
    return f"{said}; the student's chat template is plain text to the teacher: {remedy}"


def device_of(config: RunConfig) -> torch.device:
    """Where models run; under a launcher, each rank has its GPU."""
    if config.device != "auto":
        try:
            device = torch.device(config.device)
        except RuntimeError:
            raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {config.device!r}") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"--device {config.device}: torch {torch.__version__} sees no GPU; use --device cpu or auto"
            )
        return device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def grader_of(config: RunConfig) -> str | graders.Grader:
    """The grader's name; for "python" the function where it was allowed, because the name alone runs nothing."""
    return graders.python if config.grader == "python" and config.allow_code_execution else config.grader


class Run:
    """One run directory: what the stages share. `problems` collects what was skipped too often."""

    def __init__(self, config: RunConfig, ui: Ui | None = None):
        self.config, self.ui = config, Silent() if ui is None else ui
        self.folder = pathlib.Path(config.output)
        self.problems: list[str] = []
        self.rank, self.ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
        self.is_writer = self.rank == 0

    @functools.cached_property
    def encoder(self) -> Encoder:
        return make_encoder(self.config)

    def load(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        *,
        spread: bool = True,
        shard: bool = False,
        quantization: str | None = None,
        device: torch.device | None = None,
    ) -> PreTrainedModel:
        """A model, by default in `--dtype`; the teacher quantized, where that is asked for. See `load_model`.

        One model is resident at a time: the one before is freed.

        Args:
            spread: over the GPUs, where `--device-map` asks for it; a model to train, or to train with, is on one.
            shard: over the ranks, all of which call this.
            quantization: of the student, where adapters are trained on it.
            device: where it goes, if not to that of the run.
        """
        free_memory()
        return load_model(
            name,
            dtype or getattr(torch, self.dtype),
            device or device_of(self.config),
            self.ui.say,
            device_map=self.config.device_map if spread else None,
            quantization=quantization or self.quantization(name),
            shard=shard,
        )

    def quantization(self, name: str) -> str | None:
        """What a model that is asked or measured is quantized to: only the teacher ever is."""
        return self.config.teacher_quantization if name == self.config.teacher else None

    def most(self, n: int) -> int:
        """The largest of the ranks' numbers. Collective."""
        return most(n, device_of(self.config))

    @property
    def dtype(self) -> str:
        """Of frozen models."""
        if self.config.dtype != "auto":
            return self.config.dtype
        return "bfloat16" if device_of(self.config).type == "cuda" else "float32"

    def shared_vocabulary(self) -> int:
        """Columns of both heads that mean the same token; an error where the tokenizers differ."""
        names = self.name("teacher"), self.name("student")
        # A tokenizer may know more tokens than a head has columns
        heads = [AutoConfig.from_pretrained(name).get_text_config().vocab_size for name in names]
        try:
            return min(check_pair(self.encoder.tokenizer, AutoTokenizer.from_pretrained(names[0])), *heads)
        except DifferentTokenizers as error:
            raise ValueError(
                f"teacher {names[0]} cannot be distilled into student {names[1]}: {error}, or run `leaf select`, "
                "`leaf score`, `leaf prune` and `leaf report`, and train on what `leaf export` writes"
            ) from error

    @functools.cached_property
    def reader(self) -> Encoder | None:
        """How the teacher reads what the student's template writes; None where both have one tokenizer."""
        with asked_of_the_hub(name := self.name("teacher")):
            tokenizer = AutoTokenizer.from_pretrained(name)
        try:
            check_pair(self.encoder.tokenizer, tokenizer)
        except DifferentTokenizers:
            self.ui.say(different_tokenizers(self.encoder))
            return self.encoder.read_by(tokenizer)
        return None

    def encoder_of(self, model: str) -> Encoder:
        """How a model reads rows."""
        return (model == self.config.teacher and self.reader) or self.encoder

    def name(self, role: str) -> str:
        return self.config.named(role)

    def asked_key(self, models: Mapping[str, str]) -> dict[str, Any]:
        """What the answers of models (label: name) depend on, besides options and prompts."""
        keys = {label: model_key(name) for label, name in models.items()}
        readers = {label: self.encoder_of(name).fingerprint for label, name in models.items()}
        return {**keys, "rendering": readers, "dtype": self.dtype} if keys else {}

    def ask(self, model: str, label: str, prompts: Sequence[str]) -> Mapping[str, str]:
        """The greedy response of a model to each prompt; what it was asked before in this run directory is known.

        Collective: the prompts are dealt to the ranks, and every rank gets all responses.
        """
        reader = self.encoder_of(model)
        options: dict[str, Any] = {"max_new_tokens": self.config.max_new_tokens, "stop": reader.end_of_turn_id}
        key: dict[str, Any] = {"leaf": __version__, "model": model_key(model), "engine": self.config.engine}
        key |= {"dtype": self.dtype, "quantization": self.quantization(model)}
        key |= {name: reader.fingerprint.get(name) for name in ("tokenizer", "rendered_by")} | options
        known = Responses(self.folder / "responses" / digest(key), self.rank)
        # By length, so that every rank gets its share of the long ones; of all, as a rank may know more than another.
        distinct = sorted(dict.fromkeys(prompts), key=len)
        before = sum(prompt in known for prompt in distinct)
        self.ui.say(f"{label}: {before} of {len(distinct)} prompts answered before")
        todo = [prompt for prompt in distinct[self.rank :: self.ranks] if prompt not in known]
        if todo:
            options["max_tokens"] = self.config.max_tokens  # which changes no response
            written = {reader.as_read(prompt): prompt for prompt in todo}
            given = generate(self.engine(model), reader.tokenizer, written, **options)
            for prompt, response in self.ui.track(given, len(todo), label):
                known[written[prompt]] = reader.response_of(response)

        def all_known() -> bool:
            known.refresh()
            return all(prompt in known for prompt in distinct)

        wait_until(all_known, f"{label}: waiting for the answers of the other processes", logger.warning)
        return {prompt: known[prompt] for prompt in distinct}

    def engine(self, model: str) -> Any:
        """What `generate` takes for a model."""
        if self.config.engine == "transformers":
            return self.load(model)
        free_memory()
        longest = self.config.max_length + self.config.max_new_tokens
        return load_vllm(model, self.encoder_of(model).tokenizer, dtype=self.dtype, max_tokens=longest)

    def models(self) -> dict[str, str]:
        """Keys of teacher and student, which must be two models."""
        keys = {role: model_key(self.name(role)) for role in ("teacher", "student")}
        if keys["teacher"] == keys["student"]:
            raise ValueError(
                f"teacher and student are the same model ({self.config.student}): every difference between them is 0; "
                "give --teacher a stronger one"
            )
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
        tokens: Callable[[T], int] | None = None,
        in_step: bool = False,
    ) -> Table:
        """`write_table` on rank 0, whose result the other ranks wait for.

        collective: before its first unit, `produce` asks models together with the other ranks. tokens: of a unit; the ranks
        share the units, which do not depend on each other. in_step: with `tokens`, they produce their shares in step, see
        `write_table`.
        """
        folder = self.folder / name
        key = {**key, "columns": schema.names}

        def tracked(todo: Sequence[T]) -> Produced:
            if collective:
                return iter(produce(todo))
            return self.ui.track(produce(todo), len(todo), name, tokens and [tokens(unit) for unit in todo])

        def current() -> Table | None:
            return current_table(folder, key)

        # Rank 0 alone says whether there is anything to do: the others could look when it has finished the table
        table: Table | None = None
        if in_step and self.most(int(self.is_writer and current() is not None)):
            table = current()
        elif tokens is not None:
            sizes = [tokens(unit) for unit in units]
            shared: dict[str, Any] = {"sizes": sizes, "rank": self.rank, "ranks": self.ranks, "in_step": in_step}
            table = write_table(folder, key, schema, units, tracked, self.ui.say, **shared)
        elif self.is_writer:
            table = write_table(folder, key, schema, units, tracked, self.ui.say)
        elif collective and current() is None:
            next(iter(produce(units)), None)  # by then every model has been asked; the rest is rank 0's
        if table is None:  # not by a collective, which would time out: a stage can take hours
            wait_until(lambda: current() is not None, f"{name}: waiting for rank 0 to finish the table", logger.warning)
            table = current()
        return table or open_table(folder)  # which says what is wrong with it

    def check(
        self,
        stage: str,
        left: int,
        total: int,
        *,
        remedy: str,
        skipped: int = 0,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Says how many rows are left, notes when too many were skipped, refuses to go on without any.

        counts: of the rows by what became of them; default: those of the stage's table.
        """
        counts = open_table(self.folder / stage).counts if counts is None else counts
        reasons = ", ".join(f"{name} {count}" for name, count in counts.items() if name != "ok") or "none skipped"
        self.ui.say(f"{stage}: {left} of {total} left ({reasons})")
        if skipped > self.config.max_skip_fraction * total:
            limit = f"--max-skip-fraction {self.config.max_skip_fraction}"
            self.problems.append(f"{stage}: {skipped} of {total} rows were skipped, more than {limit} ({reasons})")
        if not left:
            raise ValueError(f"no row is left after {stage} ({reasons}); {remedy}")


def run_stages(config: RunConfig, stages: Sequence[str], ui: Ui | None = None) -> list[str]:
    """Run some of `STAGES` in order.

    Returns:
        What went beyond `max_skip_fraction`, one line per stage; everything was written all the same.

    Raises:
        ValueError: bad options or input, or no row left after a stage; names the remedy.
    """
    from .distill import training_arguments
    from .stages import FUNCTIONS
    from .teacher_build import teacher_key

    run = Run(config, ui)
    prune_options(config)  # what is misspelt is told now, not after hours
    device_of(config)
    if "distill" in stages:
        spread = config.teacher_mode == "device_map"
        check_arguments(training_arguments(config, run.folder), spread_teacher=spread)
    for note in check_loading(config, stages, run.ranks):
        run.ui.say(note)
    if {"select", "verify", "eval"} & set(stages):
        graders.resolve(grader_of(config))
        if config.engine == "vllm":
            check_vllm()
    if {"distill", "eval"} & set(stages) and config.teacher and config.student:
        run.shared_vocabulary()
        if "cache" in stages and config.teacher_mode in CACHED:
            teacher_key(run)
    for stage in stages:
        FUNCTIONS[stage](run)
    return run.problems


def run_all(config: RunConfig, ui: Ui | None = None) -> list[str]:
    """All stages; see `run_stages`."""
    return run_stages(config, STAGES, ui)


def prune_options(config: RunConfig) -> PruneConfig:
    from .prune import PruneConfig

    names = ("rule", "q", "tau", "tau_response", "cap", "mode", "signal", "seed")
    return PruneConfig(**{name: getattr(config, name) for name in names}, protect=config.keep)
