"""What is about to be trained, on one screen: the models, the data, the memory, and one sample with its masks."""

from __future__ import annotations

import copy
import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from .devices import GIB, Device
from .estimate import Estimator, Workload
from .metrics import peak_memory
from .pack import Collator, Group, choose, sequences
from .trace import weight_bytes
from .trainer import LeafTrainer

TRACED_LAYERS = 8  # of both models: more would take seconds, `leaf estimate` has them
SHOWN = 100  # tokens of a run of a sample; of a longer one, its ends
STYLES = {"prompt": "dim", "deleted": "red strike", "response": "bold green"}


class Banner(TrainerCallback):
    """Shows `banner` when training begins, and what memory the first step took. On rank 0 only.

    show: prints a rich renderable; default: a console on stderr. Without colours nothing is lost.
    """

    def __init__(self, trainer: LeafTrainer, show: Callable[[RenderableType], Any] | None = None):
        self.trainer, self.show = trainer, show or Console(stderr=True, highlight=False).print
        self.waiting = False  # for the first step
        self.predicted: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.waiting = state.is_world_process_zero
        if self.waiting:
            memory, self.predicted = predict(self.trainer)
            self.show(banner(self.trainer, memory))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.waiting:
            whole = "" if args.device.type == "cuda" else " of the process, with imports and what ran before"
            beside = "" if self.predicted is None else f"; predicted: {_size(self.predicted)}"
            self.show(Text(f"memory after the first step: peak {_size(peak_memory(args.device))}{whole}{beside}"))
            self.waiting = False


def banner(trainer: LeafTrainer, memory: str) -> RenderableType:
    """Of a trainer with training data; reads a micro-batch of them. memory: what `predict` says."""
    groups = _micro_batch(trainer)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for label, value in {
        "models": _models(trainer),
        "vocabulary": _vocabulary(trainer),
        "objective": objective(trainer.args),
        "data": _data(trainer),
        "a step": _step(trainer, groups),
        "memory": memory,
    }.items():
        facts.add_row(label, Text(value))
    chosen = next((group for group in groups if group["counterfactuals"]), groups[0])
    return Lines(facts, Text(), sample(chosen, trainer.processing_class))


# -- the sample --------------------------------------------------------------------------------------------------------


def sample(group: Group, tokenizer: Any = None) -> Text:
    """An original as text, or ids without a tokenizer: [-what a counterfactual leaves out-], and ▶ what the loss is on."""
    member = group["original"] or group["counterfactuals"][0]
    ids, start = member["input_ids"], member["response_start"]
    other = group["counterfactuals"][0]["input_ids"] if group["original"] and group["counterfactuals"] else ids
    text = Text(f"sample {group['id']}: ", "bold")
    if other is not ids:
        text.append("[-deleted-]", STYLES["deleted"])
        text.append(" in its first counterfactual, ")
    text.append("▶ response = loss tokens", STYLES["response"])
    text.append("\n")
    deleted = missing(ids, other)
    kinds = ["deleted" if i in deleted else "prompt" if i < start else "response" for i in range(len(ids))]
    begun = False
    for kind, run in itertools.groupby(range(len(ids)), kinds.__getitem__):
        indices = list(run)
        if not begun and indices[0] >= start:
            text.append("\n▶ ", STYLES["response"])
            begun = True
        words = _decoded(ids, indices[0], indices[-1] + 1, tokenizer)
        text.append(f"[-{words}-]" if kind == "deleted" else words, STYLES[kind])
    return text


def missing(ids: Sequence[int], other: Sequence[int]) -> set[int]:
    """Positions of `ids` that `other` does not have."""
    first = _alike(ids, other)
    a, b = ids[first:], other[first:]
    same = _alike(a[::-1], b[::-1])
    between = difflib.SequenceMatcher(None, a[: len(a) - same], b[: len(b) - same], autojunk=False)
    return {first + i for tag, start, end, *_ in between.get_opcodes() if tag != "equal" for i in range(start, end)}


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _decoded(ids: Sequence[int], start: int, end: int, tokenizer: Any) -> str:
    """The text of a part of `ids`; of a long one its ends."""
    if end - start > SHOWN:
        first, last = start + SHOWN // 2, end - SHOWN // 2
        ends = (_decoded(ids, start, first, tokenizer), _decoded(ids, last, end, tokenizer))
        return f" … {last - first} tokens … ".join(ends)
    if tokenizer is None:
        return " ".join(map(str, ids[start:end]))
    # Not the part alone: many tokenizers leave out a space in front of what they decode.
    return str(tokenizer.decode(ids[:end]))[len(tokenizer.decode(ids[:start])) :]


# -- the facts ---------------------------------------------------------------------------------------------------------


def _models(trainer: LeafTrainer) -> str:
    def size(parameters: Iterable[Any]) -> str:
        # ZeRO-3 keeps a share of each, and 4 bits two in a byte
        each = (getattr(p, "ds_numel", p.numel()) * (2 if hasattr(p, "quant_state") else 1) for p in parameters)
        return f"{sum(each) / 1e6:,.1f}M"

    def named(role: str, model: Any) -> str:
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        name = type(inner).__name__.removeprefix("FSDP")
        trained = [p for p in model.parameters() if p.requires_grad]
        part = f", {size(trained)} of them trained" if 0 < len(trained) < len(list(model.parameters())) else ""
        return f"{role} {name} {size(model.parameters())} {str(model.dtype).removeprefix('torch.')}{part}"

    student, cache = named("student", trainer.model), trainer.answers
    if cache is not None:
        return f"{student}, teacher in a cache of {len(cache):,} sequences ({cache.says})"
    return f"{student}, {named('teacher', trainer.teacher)}"


def _vocabulary(trainer: LeafTrainer) -> str:
    student, teacher = trainer.head_sizes
    heads = f"the student's head has {student:,} columns, the teacher's {teacher:,}"
    columns = trainer.vocab_size or student
    if columns == student == teacher:
        return f"{heads}; all are compared"
    why = "all of the smaller head" if columns == min(student, teacher) else "the tokens that the tokenizers have"
    return f"{heads}; the first {columns:,} are compared: {why}, the rest is padding"


def objective(args: Any) -> str:
    """What is minimised, in words."""
    mix = f"λ {args.lambda_:g} on originals" if args.loss_mode == "pair" else "one mean over all response tokens"
    parts = [args.divergence + (f" (β {args.beta:g})" if args.beta is not None else ""), args.loss_mode, mix]
    parts.append(f"temperature {args.temperature:g}")
    return ", ".join([*parts, *([f"cross-entropy weight {args.ce_weight:g}"] if args.ce_weight else [])])


def _data(trainer: LeafTrainer) -> str:
    data: Any = trainer.train_dataset
    used = f"{trainer.args.counterfactuals_per_sample} of each group in an epoch"
    if not hasattr(data, "__len__"):
        return f"a stream of groups; counterfactuals: {used}"
    counts = [len(data[n]["counterfactuals"]) for n in range(len(data))]
    return (
        f"{len(counts):,} groups, {counts.count(0):,} without counterfactuals; {sum(counts):,} counterfactuals, {used}"
    )


def _micro_batch(trainer: LeafTrainer) -> list[Group]:
    """Groups from everywhere in the data, of a stream the first, as an epoch uses them."""
    args = trainer.args
    data: Any = trainer.train_dataset
    size, seed = args.per_device_train_batch_size, args.seed if args.data_seed is None else args.data_seed
    groups: Any = itertools.islice(data, size)
    if hasattr(data, "__len__"):
        size = min(size, len(data))
        groups = (data[n * len(data) // size] for n in range(size))
    return [choose(group, n, 0, seed, args.counterfactuals_per_sample) for n, group in enumerate(groups)]


def _step(trainer: LeafTrainer, groups: Sequence[Group]) -> str:
    """What the first step holds, in proportion to a micro-batch."""
    args = trainer.args
    data: Any = trainer.train_dataset
    of = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    whole = min(math.prod(of), len(data) if hasattr(data, "__len__") else math.prod(of))
    packs = Collator(args.max_tokens)(groups)["packs"]
    packed = sum(pack["layout"].num_tokens for pack in packs)
    single = sum(len(ids) for group in groups for ids in sequences(group))
    cut = "" if of[1:] == (1, 1) else " ({} × {} accumulated × {} ranks)".format(*of)
    return (
        f"{whole} groups{cut}, about {packed * whole // len(groups):,} tokens ({1 - packed / single:.0%} saved by shared "
        f"prefixes); packs of up to {args.max_tokens:,}, about {math.ceil(len(packs) * whole / len(groups))}"
    )


def predict(trainer: LeafTrainer) -> tuple[str, int | None]:
    """Peak memory of a step, in words and in bytes (None: not known), by `leaf.estimate` where that takes two seconds."""
    student: Any = trainer.model
    teacher, args = trainer.teacher, trainer.args
    trained = [p for p in student.parameters() if p.requires_grad]
    if OptimizerNames(args.optim).value not in ("adamw_torch", "adamw_torch_fused"):
        return f"not predicted: known for AdamW, not for optim={OptimizerNames(args.optim).value}", None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "not predicted: the ranks share weights or state", None
    if teacher is None:
        return "not predicted: the teacher is in a cache; see `leaf estimate --teacher-mode`", None
    weights = weight_bytes(student) + weight_bytes(teacher)  # type: ignore[arg-type]
    state = 3 * sum(p.nbytes for p in trained)
    held = f"weights {_size(weights)}, gradients and AdamW {_size(state)}"
    layers = sum(model.config.get_text_config().num_hidden_layers for model in (student, teacher))
    plain = len(trained) == len(list(student.parameters())) and not getattr(teacher, "is_quantized", False)
    if layers > TRACED_LAYERS or not plain or student.dtype.itemsize != 4:
        return f"{held}; activations, which come on top, are not predicted here: see `leaf estimate`", None
    packs = Collator(args.max_tokens)(_micro_batch(trainer))["packs"]
    largest = max(packs, key=lambda pack: pack["layout"].num_tokens)
    estimator = Estimator(
        copy.deepcopy(teacher.config),
        copy.deepcopy(student.config),
        Workload([1]),
        Device(args.device.type, 0, {2: 1.0, 4: 1.0}, 1.0, (1.0, 1.0)),
        teacher.dtype,
    )
    try:
        stage = estimator.distillation(bool(args.activation_checkpointing), largest)
    except (ValueError, RuntimeError) as error:  # of a model that transformers cannot make from its config, for one
        return f"{held}; activations, which come on top, are not predicted: {error}", None
    work = stage.activations + stage.scratch
    total = weights + state + work
    return f"{_size(total)} of tensors predicted: {held}, activations and scratch {_size(work)}", total


def _size(n: int) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.1f} MiB"
