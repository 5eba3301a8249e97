"""`RunConfig`: every option of the pipeline."""

from __future__ import annotations

import difflib
import functools
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

STAGES = ("select", "score", "prune", "verify", "cache", "distill", "eval", "report")
CACHED = {"cached_hidden": "hidden", "cached_topk": "topk"}  # teacher_mode -> kind of a teacher cache

TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
}

_MODELS = "select score verify cache distill eval doctor estimate"
_ROWS = "select eval doctor estimate"
_RENDER = "select score verify cache distill eval doctor estimate"
_ALL = " ".join(STAGES)

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "rule": "threshold",
        "tau": 0.05,  # of two of its three students; the 1B student has 0.10 and 0.15
        "tau_response": 0.10,
        "select": "student_wrong",
        "verify": "both",
        "counterfactuals_per_sample": "all",
    }
}

COMPATIBILITY: dict[str, dict[str, Any]] = {
    "released": {"rule": "quantile", "cap": 0.5, "loss": "concat", "counterfactuals_per_sample": "all"}
}


def _option(default: Any, help: str, stages: str, *, key: bool = True) -> Any:
    """A field: `stages` names the stages that read it; where `key`, a changed value reruns those stages."""
    return field(default=default, metadata={"help": help, "stages": tuple(stages.split()), "key": key})


@dataclass(frozen=True)
class RunConfig:
    """Options of a run, with the method's defaults. Build it with `RunConfig.from_mapping` to apply a preset.

    Raises:
        ValueError: an unknown value or options that contradict each other; the message names the remedy.
    """

    teacher: str | None = _option(None, "teacher: a model folder or hub id", _MODELS, key=False)
    student: str | None = _option(None, "student: a model folder or hub id", _MODELS, key=False)
    data: str | None = _option(
        None, "rows: a .json, .jsonl or .parquet file, or a data set name", "select doctor estimate", key=False
    )
    eval_data: str | None = _option(None, "rows to evaluate on (default: the rows of --data)", "eval", key=False)
    output: str = _option("leaf-run", "the run directory", _ALL, key=False)
    device: str = _option("auto", "device of scoring, generation and evaluation", _MODELS, key=False)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "dtype of frozen models: auto = bfloat16 on a GPU, float32 on a CPU",
        "select score verify cache distill eval estimate",
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = _option(
        None,
        "spread a model over the GPUs of one process (accelerate's device_map)",
        "select score verify cache distill eval",
        key=False,
    )
    teacher_quantization: Literal["8bit", "4bit"] | None = _option(
        None, "quantize the teacher when it is loaded (bitsandbytes)", "select score verify cache distill"
    )
    shard_teacher: bool = _option(
        False,
        "under accelerate launch: score and cache with a teacher whose layers are shared by the ranks",
        "score cache",
        key=False,
    )
    teacher_mode: Literal["replicate", "fsdp2", "device_map", "cached_hidden", "cached_topk"] = _option(
        "replicate",
        "how distill gets the teacher: whole on each GPU, sharded over the ranks, spread over the GPUs of one process, or "
        "from disk (its last hidden states, or its most probable tokens)",
        "cache distill estimate",
        key=False,
    )
    cache_topk: int = _option(64, "tokens that cached_topk keeps of each distribution", "cache estimate", key=False)
    lora_rank: int | None = _option(
        None, "train LoRA adapters of this rank on all linear layers of the body (peft)", "distill estimate"
    )
    lora_alpha: int | None = _option(
        None, "their output is multiplied by lora_alpha / lora_rank (default: 2 * lora_rank)", "distill"
    )
    student_quantization: Literal["8bit", "4bit"] | None = _option(
        None, "quantize what the adapters stand on while they are trained (bitsandbytes)", "distill"
    )
    seed: int = _option(0, "seed of controls, sampling order and training", "prune distill")

    limit: int | None = _option(None, "read only so many rows", _ROWS)
    prompt_column: str | None = _option(None, "field that holds the prompt (default: found by itself)", _ROWS)
    response_column: str | None = _option(None, "field that holds the response (default: found by itself)", _ROWS)
    answer_column: str | None = _option(None, "field that holds the checkable answer (default: found by itself)", _ROWS)
    system: str | None = _option(None, "system message of rows that have none", _ROWS)
    prompt_template: str | None = _option(
        None, 'template of the user turn, e.g. "{question}\\nReason step by step."', _ROWS
    )
    protect: tuple[str, ...] = _option((), "regular expressions of prompt text that is never scored", _ROWS)
    chat_template: str | None = _option(
        None, 'template or file with one, for both models; "none" = plain text (default: the student\'s)', _RENDER
    )
    template_date: str | None = _option(
        None, "the day that templates print, YYYY-MM-DD (default: a fixed day)", _RENDER
    )
    max_length: int = _option(4096, "tokens of a row; longer rows are skipped and counted", _RENDER)
    truncate: Literal["response"] | None = _option(
        None, "cut long responses at the end instead of skipping", "score doctor estimate"
    )
    max_tokens: int = _option(
        16384,
        "token budget of a pack or a generation batch",
        "select score verify cache distill eval estimate",
        key=False,
    )

    select: Literal["teacher_right", "student_wrong", "all"] = _option(
        "teacher_right", "rows to keep; student_wrong = student wrong and teacher right (the paper)", "select"
    )
    responses: Literal["dataset", "teacher"] = _option("dataset", "whose response is the target", "select")
    grader: str = _option(
        "math", "how answers are checked: exact, math, qa, python (runs them) or module:function", "select verify eval"
    )
    allow_code_execution: bool = _option(
        False,
        "let --grader python run generated code on this machine: with few rights, behind no security boundary",
        "select verify eval",
        key=False,
    )
    max_new_tokens: int = _option(512, "tokens that a model may generate", "select verify eval estimate")
    engine: Literal["transformers", "vllm"] = _option("transformers", "what generates", "select verify eval")

    level: Literal["instruction", "response", "both"] = _option(
        "instruction", "which tokens are scored", "score estimate"
    )
    segments: Literal[2, 3] = _option(2, "segments that a response is cut into at response level", "score estimate")
    rule: Literal["quantile", "threshold"] = _option(
        "quantile", "flag a share of the tokens, or scores up to tau", "prune eval"
    )
    q: float = _option(0.05, "share of the tokens that the quantile rule flags", "prune eval")
    tau: float | None = _option(None, "threshold of the threshold rule, at instruction level", "prune eval")
    tau_response: float | None = _option(None, "threshold at response level (default: tau)", "prune eval")
    cap: float = _option(0.5, "scores above the cap are never flagged by the quantile rule", "prune eval")
    signal: Literal["gradient", "student_gradient", "teacher_gradient", "perplexity", "random"] = _option(
        "gradient", "what tokens are flagged by; all but gradient are controls", "score prune eval"
    )
    keep: tuple[str, ...] = _option((), "text that is never deleted: digits, latex, code", "prune eval")
    mode: Literal["span", "collective"] = _option(
        "span", "one counterfactual per span, or one without any of them", "prune"
    )
    verify: Literal["both", "teacher", "none"] | None = _option(
        None,
        "who must answer a counterfactual rightly (default: both with select=student_wrong, else teacher)",
        "verify",
    )

    loss: Literal["pair", "concat"] = _option(
        "pair", "two means mixed by lambda, or one mean over everything", "distill"
    )
    lambda_: float = _option(0.5, "weight of the originals in the pair loss", "distill")
    temperature: float = _option(1.0, "temperature of the divergence", "cache distill")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = _option(
        "forward_kl", "divergence from the teacher", "distill"
    )
    beta: float | None = _option(None, "weight of the teacher in the jsd mixture", "distill")
    ce_weight: float = _option(0.0, "weight of the cross-entropy on the same rows", "distill")
    counterfactuals_per_sample: int | Literal["all"] = _option(
        1, "counterfactuals of a sample per epoch, or all", "distill"
    )
    originals: Literal["all", "paired"] = _option(
        "all", "train on all originals, or on those with counterfactuals", "cache distill"
    )
    training: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "fields of LeafArguments (YAML only)", "stages": ("distill",), "key": True},
    )

    max_skip_fraction: float = _option(
        0.01, "share of the rows of a stage that may be skipped before the exit code is non-zero", _ALL, key=False
    )
    preset: Literal["paper"] | None = _option(
        None,
        "paper: threshold rule with tau 0.05 / 0.10, student_wrong, verified by both, every counterfactual",
        _ALL,
        key=False,
    )
    compat: Literal["released"] | None = _option(
        None, "released: quantile rule, cap and one flat loss, as the authors' code", _ALL, key=False
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, convert(f.name, getattr(self, f.name)))
        object.__setattr__(self, "training", {k: _number(v) for k, v in {**TRAINING_DEFAULTS, **self.training}.items()})
        if self.verify is None:
            object.__setattr__(self, "verify", "both" if self.select == "student_wrong" else "teacher")
        if self.lora_alpha is None and self.lora_rank is not None:
            object.__setattr__(self, "lora_alpha", 2 * self.lora_rank)
        _check(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunConfig:
        """Defaults, `preset`, `compat`, `values`: each over the one before. "lambda" is accepted for `lambda_`."""
        values = {("lambda_" if name == "lambda" else name): value for name, value in values.items()}
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(
                    f"unknown option {name!r}{did_you_mean(name.replace('-', '_'), {k.rstrip('_') for k in known})}"
                )
        layers: dict[str, Any] = {}
        for name, table in (("preset", PRESETS), ("compat", COMPATIBILITY)):
            layers |= table.get(str(values.get(name)), {})
        merged = {**layers, **values}
        if merged.get("rule") != "threshold":  # the rule was overridden: the preset's thresholds go with it
            merged = {name: value for name, value in merged.items() if name in values or not name.startswith("tau")}
        return cls(**merged)

    def named(self, role: str) -> str:
        """The name of the "teacher" or the "student", which a stage cannot do without."""
        name = getattr(self, role)
        if name is None:
            raise ValueError(f"no {role}: give --{role} FOLDER_OR_HUB_ID (or `{role}:` in the config file)")
        if not os.path.isdir(name) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
            raise ValueError(f"{role}: there is no folder {name!r}, and a hub id is NAME or OWNER/NAME")
        return name

    def stage_key(self, stage: str) -> dict[str, Any]:
        """The options whose change makes `stage` run again."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.metadata["key"] and stage in f.metadata["stages"]
        }


@contextmanager
def asked_of_the_hub(name: str) -> Iterator[None]:
    """Inside, a model is read by its name. What the hub says may be about a mistyped folder: then both are said."""
    try:
        yield
    except OSError as error:
        if os.path.exists(name):
            raise
        raise OSError(f"there is no folder {name!r} here, and as a hub id: {error}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _check(c: RunConfig) -> None:
    def require(ok: bool, message: str) -> None:
        if not ok:
            raise ValueError(message)

    if c.rule == "threshold":
        require(c.tau is not None, "rule=threshold needs --tau, e.g. 0.05")
    else:
        given = [name for name in ("tau", "tau_response") if getattr(c, name) is not None]
        require(
            not given, f"{' and '.join(given)} has no effect with rule={c.rule}: add --rule threshold or leave it out"
        )
    for name in ("q", "cap", "lambda_", "max_skip_fraction", "tau", "tau_response"):
        value = getattr(c, name)
        require(value is None or 0 <= value <= 1, f"{name.rstrip('_')} must be between 0 and 1, got {value}")
    positive = ("limit", "max_length", "max_tokens", "max_new_tokens", "temperature", "cache_topk", "lora_rank")
    for name in (*positive, "lora_alpha"):
        value = getattr(c, name)
        require(value is None or value > 0, f"{name} must be positive, got {value}")
    require(c.ce_weight >= 0, f"ce_weight must not be negative, got {c.ce_weight}")
    n = c.counterfactuals_per_sample
    require(n == "all" or n >= 1, f'counterfactuals_per_sample must be "all" or at least 1, got {n}')
    if c.divergence == "jsd":
        require(c.beta is not None and 0 < c.beta < 1, f"divergence=jsd needs --beta between 0 and 1, got {c.beta}")
    else:
        require(
            c.beta is None, f"beta has no effect with divergence={c.divergence}: add --divergence jsd or leave it out"
        )
    require(
        c.prompt_column is None or c.prompt_template is None,
        "prompt_column and prompt_template both say where the prompt is: give one of them",
    )
    if c.template_date is not None:
        date = re.fullmatch(r"\d{4}-\d{2}-\d{2}", c.template_date)
        require(date is not None, f"template_date must be YYYY-MM-DD, got {c.template_date!r}")
    require(
        c.device_map is None or c.device == "auto",
        f"device_map={c.device_map} and device={c.device} both say where models go: give one of them",
    )
    if c.teacher_quantization is not None:
        q = f"teacher_quantization={c.teacher_quantization}"
        require(c.engine != "vllm", f"{q} has no effect with engine=vllm: give a quantized checkpoint as --teacher")
        require(not c.shard_teacher, f"{q} cannot be sharded: leave out one of teacher_quantization and shard_teacher")
    for name in ("lora_alpha", "student_quantization"):
        require(
            c.lora_rank is not None or getattr(c, name) is None,
            f"{name}={getattr(c, name)} is for adapters: add --lora-rank, e.g. 16, or leave it out",
        )
    for pattern in c.protect:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"protect: {pattern!r} is not a regular expression: {error}") from error


class OptionType(NamedTuple):
    """What a field accepts, from its annotation."""

    kind: type  # what a value is converted to
    words: tuple[Any, ...]  # the literal values among its types
    closed: bool  # nothing but `words` is allowed
    many: bool  # several values
    optional: bool  # None is allowed


@functools.cache
def option_types() -> dict[str, OptionType]:
    return {name: _read_annotation(hint) for name, hint in typing.get_type_hints(RunConfig).items()}


def _read_annotation(hint: Any) -> OptionType:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    members = [m for m in (typing.get_args(hint) if union else (hint,)) if m is not type(None)]
    words = tuple(word for m in members if typing.get_origin(m) is Literal for word in typing.get_args(m))
    plain = [typing.get_origin(m) or m for m in members if typing.get_origin(m) is not Literal]
    many = tuple in plain
    kind = str if many else plain[0] if plain else type(words[0])
    return OptionType(
        kind, words, closed=not plain, many=many, optional=union and len(members) < len(typing.get_args(hint))
    )


def convert(name: str, value: Any) -> Any:
    """`value` in the type of its field: YAML reads `1e-5` as a string and dates as dates; flags are always strings."""
    wanted = option_types()[name]
    if value in wanted.words or (value is None and wanted.optional):
        return value
    if wanted.many:
        return (value,) if isinstance(value, str) else tuple(str(v) for v in value)
    try:
        if (
            isinstance(value, bool) != (wanted.kind is bool)
            or isinstance(value, list)
            or (wanted.kind is int and int(value) != float(value))
        ):
            raise ValueError
        if wanted.kind is not Mapping:
            value = wanted.kind(value)
        elif not isinstance(value, Mapping):
            raise ValueError
        if wanted.closed and value not in wanted.words:
            raise ValueError
    except (TypeError, ValueError):
        names = [*(() if wanted.closed else (wanted.kind.__name__.lower(),)), *map(str, wanted.words)]
        raise ValueError(f"{name.rstrip('_')} must be {' | '.join(names)}, got {value!r}") from None
    return value


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as a string; a training option that looks like a number is one."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value
