"""`leaf estimate`: memory and time of every stage, from two configs, before any weights are loaded.

Memory is not a formula: the code of the stages runs on fake tensors, which have shapes and no values, and the bytes that
are alive at one time are counted. Time is rough: products of matrices over the device's throughput.
"""

from __future__ import annotations

import collections
import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid
from transformers import AutoConfig, DynamicCache, PreTrainedConfig

from leaf_kernels import SharedPrefixLayout
from leaf_kernels.integrations.transformers import MassRecorder, check_model, packed_inputs, register

from .config import CACHED, RunConfig, asked_of_the_hub
from .data import Skip
from .devices import GIB, MIB, USABLE, Device, device_named
from .loading import without_attention_dropout
from .objective import distillation, head_of, hidden_states
from .pack import Collator, Pack
from .sensitivity import Scorer, batches
from .teacher_build import topk, widths
from .trace import (
    Trace,
    counterfactual_groups,
    fake_model,
    half_response,
    planned,
    put_adapters,
    shapes_only,
    weight_bytes,
)
from .units import Pair

PLAIN_ROWS = 1000  # that times are given for, where no data says how many there are


@dataclass(frozen=True)
class Stage:
    """The peak of one model in one stage, in bytes, and its time for all rows, in seconds."""

    name: str
    weights: int
    activations: int  # or checkpoints; for generation the KV cache
    scratch: int  # of the op that runs at the peak
    seconds: tuple[float, float]
    state: int = 0  # gradients and AdamW

    @property
    def peak(self) -> int:
        return self.weights + self.state + self.activations + self.scratch


@dataclass(frozen=True)
class Workload:
    """The rows of a run: tokens of each in a stage's largest pack, and how many rows there are."""

    lengths: list[int]
    rows: int = PLAIN_ROWS
    mean: float = field(default=0.0)  # tokens of a row

    @classmethod
    def plain(cls, length: int, max_tokens: int) -> Workload:
        return cls([length] * max(1, max_tokens // length), mean=length)

    @classmethod
    def of(cls, units: Sequence[Pair | Skip], role: str, max_tokens: int) -> Workload:
        samples = [getattr(unit, role) for unit in units if isinstance(unit, Pair)]
        packs = [[len(sample.input_ids) for sample in pack] for pack in batches(samples, max_tokens)]
        tokens = sum(map(sum, packs))
        return cls(max(packs, key=lambda pack: (sum(pack), max(pack))), len(samples), tokens / len(samples))


def read_config(name: str) -> PreTrainedConfig:
    """The config of a model folder, a hub id or a config.json; weights are not looked at.

    Raises:
        ValueError: none is there, transformers does not know its architecture, or LeaF cannot pack it.
    """
    try:
        with asked_of_the_hub(name):
            config = AutoConfig.from_pretrained(name)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{name}: no config that transformers knows: give a folder with a config.json, that file, or a hub id ({error})"
        ) from error
    check_model(config)
    without_attention_dropout(config)
    return config


# -- the stages --------------------------------------------------------------------------------------------------------


class Estimator:
    """The stages of a pair on a device; `stage(...)` of each returns a `Stage`.

    Args:
        teacher, student: configs.
        dtype: of frozen models.
        teacher_mode, cache_topk: options of a run: what distil holds of the teacher.
        lora_rank: of the adapters that are trained; None: the whole student is.
    """

    def __init__(
        self,
        teacher: PreTrainedConfig,
        student: PreTrainedConfig,
        workload: Workload,
        device: Device,
        dtype: torch.dtype,
        *,
        max_tokens: int = 16384,
        max_new_tokens: int = 512,
        epochs: float = 3,
        teacher_mode: str = "replicate",
        cache_topk: int = 64,
        lora_rank: int | None = None,
    ):
        register()
        self.configs = {"teacher": teacher, "student": student}
        self.vocab_size = min(config.get_text_config().vocab_size for config in self.configs.values())
        self.workload, self.device, self.dtype = workload, device, dtype
        self.max_tokens, self.max_new_tokens, self.epochs = max_tokens, max_new_tokens, epochs
        self.teacher_mode, self.cache_topk, self.lora_rank = teacher_mode, cache_topk, lora_rank
        self.shares_teacher = teacher_mode in ("fsdp2", "device_map")  # what of it a device holds is not known here

    def all(self) -> list[Stage]:
        return [
            *(self.generation(role) for role in self.configs),
            *(self.scoring(role) for role in self.configs),
            *([self.caching()] if self.teacher_mode in CACHED else []),
            *([] if self.shares_teacher else [self.distillation(checkpointing=on) for on in (False, True)]),
            self.attention(),
        ]

    def _seconds(self, flops: float, dtype: torch.dtype, moved: float = 0) -> tuple[float, float]:
        """At best and at worst; moved: bytes that are read without much computing."""
        worst, best = self.device.shares
        ideal = flops / self.device.flops[2 if dtype.itemsize == 2 else 4] + moved / self.device.bandwidth
        return ideal / best, ideal / worst

    def _per_row(self, pack_tokens: int) -> float:
        """Packs of this size for all rows."""
        return self.workload.rows * self.workload.mean / pack_tokens

    def generation(self, role: str) -> Stage:
        """select, verify, eval: a batch of the longest prompts, with its KV cache grown to the full width."""
        longest = max(self.workload.lengths)
        width, new = longest + self.max_new_tokens, self.max_new_tokens
        batch = max(1, self.max_tokens // width)
        with shapes_only(self.device.is_gpu), torch.no_grad():
            model: Any = fake_model(self.configs[role], self.dtype)
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
            weights, cache = weight_bytes(model), DynamicCache(config=model.config)

            def step(tokens: int, past: int) -> None:
                # Left-padded prompts need a mask; a lone one needs none
                mask = torch.ones(batch, 1, tokens, past + tokens, dtype=torch.bool) if batch > 1 else None
                ids = torch.zeros(batch, tokens, dtype=torch.long)
                positions = torch.arange(past, past + tokens)[None]
                options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # transformers is renaming past_key_values
                    model(ids, use_cache=True, logits_to_keep=1, **options).logits[:, -1].float()

            with Trace(longest / 2) as trace:
                step(longest, 0)
                peak, prefill = trace.peak, trace.flops
                if new > 2:
                    step(new - 2, longest)
                trace.peak = before = trace.live
                decode = trace.flops
                step(1, width - 2)
            decode = trace.flops - decode
        moved = (weights + before / 2) * new
        seconds = [x * self.workload.rows / batch for x in self._seconds(prefill + decode * new, self.dtype, moved)]
        peak = max(peak, trace.peak)
        return Stage(f"generate, {role}", weights, peak, 0, (seconds[0], seconds[1]))

    def scoring(self, role: str) -> Stage:
        """A pack through `leaf.sensitivity`, with checkpoints where it would choose them."""
        lengths = self.workload.lengths
        with shapes_only(self.device.is_gpu):
            model = fake_model(self.configs[role], self.dtype)
            vocab = self.configs[role].get_text_config().vocab_size
            batch = [half_response(n, vocab, i) for i, n in enumerate(lengths)]
            scorer = Scorer(model)
            checkpoints = sum(lengths) > scorer.keeps
            with scorer.saving(checkpoints), Trace(max(lengths) / 2) as trace:
                scorer.gradient(batch)
            weights = weight_bytes(model)
        low, high = self._seconds(trace.flops * self._per_row(sum(lengths)), self.dtype)
        name = f"score, {role}{', checkpoints' if checkpoints else ''}"
        return Stage(name, weights, trace.peak - trace.scratch, trace.scratch, (low, high))

    def _pack(self) -> tuple[Pack, float]:
        """Of originals, each with a counterfactual that shares half of it; and how many such packs all rows are."""
        length = max(max(self.workload.lengths), 4)
        count = max(1, self.max_tokens // (length + length // 2))
        groups = counterfactual_groups(length, self.vocab_size, count)
        return Collator(10**12)(groups)["packs"][0], self._per_row(count * length)

    def caching(self) -> Stage:
        """A pack through the teacher, and what a cache keeps of it; the time with one counterfactual of each row."""
        pack, packs = self._pack()
        planned(pack["layout"])
        inputs = {name: pack[name] for name in ("input_ids", "position_ids", "layout")}
        with shapes_only(self.device.is_gpu), torch.no_grad():
            teacher = fake_model(self.configs["teacher"], self.dtype)
            with Trace(max(self.workload.lengths) / 2) as trace:
                hidden = hidden_states(teacher, inputs).index_select(0, pack["rows"])
                if self.teacher_mode == "cached_topk":
                    topk(hidden, head_of(teacher), self.cache_topk, self.vocab_size, temperature=1.0)
            weights = weight_bytes(teacher)
        return Stage("cache", weights, trace.peak, 0, self._seconds(trace.flops * packs, self.dtype))

    def _cached(self, rows: int) -> dict[str, torch.Tensor]:
        """What a pack brings of the teacher for its rows."""
        if self.teacher_mode == "cached_hidden":
            size = self.configs["teacher"].get_text_config().hidden_size
            return {"teacher_hidden": torch.zeros(rows, size, dtype=self.dtype)}
        ids = torch.zeros(rows, self.cache_topk, dtype=torch.long)
        return {"topk_ids": ids, "topk_logprobs": torch.zeros(ids.shape)}

    def distillation(self, checkpointing: bool, pack: Pack | None = None) -> Stage:
        """A step with one pack, by default that of `_pack`, without which no time is said; gradients and AdamW exist
        already."""
        pack, packs = self._pack() if pack is None else (pack, 0.0)
        cached = self.teacher_mode in CACHED
        planned(pack["layout"])
        inputs = {name: pack[name] for name in ("input_ids", "position_ids", "layout")}
        autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=self.device.is_gpu)
        with shapes_only(self.device.is_gpu):
            teacher = fake_model(self.configs["teacher"], self.dtype)
            head = None if self.teacher_mode == "cached_topk" else head_of(teacher)
            student: Any = fake_model(self.configs["student"], torch.float32 if self.lora_rank is None else self.dtype)
            student.requires_grad_(self.lora_rank is None).train()
            if self.lora_rank is not None:
                put_adapters(student, self.lora_rank)
            if checkpointing:
                student.activation_checkpointing_enable()
            trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            with Trace(max(self.workload.lengths) / 2) as trace:
                hidden = None
                if cached:
                    pack = {**pack, **self._cached(len(pack["rows"]))}
                else:
                    with torch.no_grad(), autocast():
                        hidden = hidden_states(teacher, inputs)
                if head is not None and not self.device.is_gpu:
                    head = head._replace(weight=head.weight.to(head_of(student).weight.dtype))
                options: dict[str, Any] = {"temperature": 1.0, "divergence": "forward_kl", "beta": None}
                options |= {"ce_weight": 0, "vocab_size": self.vocab_size}
                one = torch.ones(())
                objective = distillation(pack, hidden, head, (one, one), **options)
                with autocast():
                    loss = objective(hidden_states(student, inputs), head_of(student)).loss
                loss.backward()
            said = weight_bytes(teacher) if not cached else 0 if head is None else head.weight.nbytes
            weights = said + weight_bytes(student)
            state = 3 * sum(parameter.nbytes for parameter in trained)
        dtype = torch.bfloat16 if self.device.is_gpu else torch.float32
        seconds = self._seconds(trace.flops * packs * self.epochs, dtype)
        name = f"distil{', gradient_checkpointing' if checkpointing else ''}"
        return Stage(name, weights, trace.peak - trace.scratch, trace.scratch, seconds, state=state)

    def attention(self) -> Stage:
        """eval: the attention of every layer on the flagged tokens. On a CPU as on a GPU: the specification, which runs
        there, reads values, and its scratch is small."""
        lengths = self.workload.lengths
        with shapes_only(gpu=True), torch.no_grad():
            model = fake_model(self.configs["student"], self.dtype)
            layout = SharedPrefixLayout.from_lengths(lengths)
            with Trace(max(lengths) / 2) as trace:
                recorder = MassRecorder(torch.ones(sum(lengths), dtype=torch.bool))
                ids = torch.zeros(sum(lengths), dtype=torch.long)
                model.base_model(**packed_inputs(layout, ids), mass=recorder)
                torch.stack([layer.mean(0) for layer in recorder.layers]).mean(0)
            weights = weight_bytes(model)
        seconds = self._seconds(2 * trace.flops * self._per_row(sum(lengths)), self.dtype)
        return Stage("eval, attention", weights, trace.peak - trace.scratch, trace.scratch, seconds)


# -- the command -------------------------------------------------------------------------------------------------------


def estimator_of(config: RunConfig, workload: Workload | None = None) -> Estimator:
    """Of the pair that `config` names, on its device. Default workload: packs of rows of `max_length` tokens.

    Raises:
        ValueError: no pair, a config that is not there or whose architecture is not known, an unknown device.
    """
    names = {role: getattr(config, role) for role in ("teacher", "student")}
    configs = {
        role: read_config(name if name and os.path.isfile(name) else config.named(role)) for role, name in names.items()
    }
    wanted = None if config.dtype == "auto" else getattr(torch, config.dtype)
    device = device_named(config.device, wanted)
    return Estimator(
        **configs,
        workload=workload or Workload.plain(config.max_length, config.max_tokens),
        device=device,
        dtype=wanted or (torch.bfloat16 if device.is_gpu else torch.float32),
        max_tokens=config.max_tokens,
        max_new_tokens=config.max_new_tokens,
        epochs=float(config.training["num_train_epochs"]),
        teacher_mode=config.teacher_mode,
        cache_topk=config.cache_topk,
        lora_rank=config.lora_rank,
    )


def report(estimator: Estimator, stages: Sequence[Stage], console: Console) -> None:
    """Prints a table of the stages, and what to change where one does not fit."""
    device, work = estimator.device, estimator.workload
    unit, digits, name = (GIB, 2, "GiB") if max(stage.peak for stage in stages) >= GIB / 10 else (MIB, 1, "MiB")
    kinds = [f"frozen models in {str(estimator.dtype).removeprefix('torch.')}"]
    kinds += [] if estimator.lora_rank is None else [f"LoRA of rank {estimator.lora_rank}"]
    kinds += [] if estimator.teacher_mode == "replicate" else [f"--teacher-mode {estimator.teacher_mode}"]
    title = (
        f"{device.name}, {device.memory / GIB:.0f} GiB; {'; '.join(kinds)}; {len(work.lengths)} rows of "
        f"{max(work.lengths)} tokens in a pack; memory in {name}, time for {work.rows} rows"
    )
    sizes = ("weights", "state", "activations", "scratch", "peak")
    # Fits into 80 columns: there names and times take more lines, and nothing is cut
    style: dict[str, Any] = {"box": box.SIMPLE, "title_justify": "left", "title_style": "bold"}
    names = Column("stage", overflow="fold", min_width=13)
    grid = Grid(names, *sizes, "time", "fits", title=title, collapse_padding=True, **style)
    for stage in stages:
        shown = [f"{getattr(stage, size) / unit:.{digits}f}" for size in sizes]
        grid.add_row(stage.name, *shown, _range(stage.seconds), "yes" if device.holds(stage.peak) else "no")
    console.print(grid)
    console.print(
        "state: gradients and AdamW. activations: checkpoints and KV cache too. Memory is what tensors take; the rest of a "
        f"process (imports, contexts) is {1 - USABLE:.0%} of the device here. Times are rough"
        + (": no GPU has confirmed them." if device.name != "cpu" else ".")
    )
    if estimator.shares_teacher:
        console.print(
            f"distil is not estimated with --teacher-mode {estimator.teacher_mode}, where devices share the teacher."
        )
    for stage in stages:
        if not device.holds(stage.peak):
            console.print(f"{stage.name} does not fit: {_remedy(stage, device)}")


def cache_size(estimator: Estimator, units: Sequence[Pair | Skip]) -> str:
    """What a teacher cache of rows takes on disk, in words; how many counterfactuals there will be is not known yet."""
    rows: dict[str, int] = {}
    for sample in (unit.student for unit in units if isinstance(unit, Pair)):
        start = sample.scored.index(True) if sample.cut else sample.response_start
        rows[sample.id] = max(rows.get(sample.id, 0), len(sample.input_ids) - start)
    teacher, kind = estimator.configs["teacher"], CACHED[estimator.teacher_mode]
    each = widths(teacher, estimator.dtype, estimator.cache_topk)[kind]
    head = each * teacher.get_text_config().vocab_size if kind == "hidden" else 0
    total = sum(rows.values())
    return (
        f"cache on disk: {total * each / GIB:.3g} GiB for {total:,} response tokens of the originals, and about as much "
        f"again for one counterfactual of each{f'; {head / GIB:.3g} GiB for the head' if head else ''}"
    )


def _range(seconds: tuple[float, float]) -> str:
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if seconds[0] >= s), (1, "s"))
    return " to ".join(f"{x / size:.2g}" if x < 100 * size else f"{x / size:.0f}" for x in seconds) + f" {unit}"


def _remedy(stage: Stage, device: Device) -> str:
    if not device.holds(stage.weights + stage.state):
        held = "weights, gradients and AdamW" if stage.state else "weights"
        return f"{held} alone do not; take a larger device, smaller models" + (
            ", or see --lora-rank and --teacher-mode" if stage.state else " or --dtype bfloat16"
        )
    if stage.name == "distil":
        return "set gradient_checkpointing: true under `training:`, or lower --max-tokens"
    return "lower --max-tokens, then --max-length" + (" or --max-new-tokens" if stage.name.startswith("gen") else "")


def count(units: Sequence[Pair | Skip], max_tokens: int, console: Console) -> None:
    """Prints what rows became, as each model reads them."""
    pairs = [unit for unit in units if isinstance(unit, Pair)]
    grid = Grid("", "teacher", "student", box=box.SIMPLE)
    grid.add_row("samples", *[str(len(pairs))] * 2)
    for reason, n in collections.Counter(unit.reason for unit in units if isinstance(unit, Skip)).items():
        grid.add_row(f"skipped: {reason}", *[str(n)] * 2)
    both = [[getattr(pair, role) for pair in pairs] for role in ("teacher", "student")]
    lengths = [[len(sample.input_ids) for sample in samples] for samples in both]
    grid.add_row("tokens", *(str(sum(each)) for each in lengths))
    grid.add_row("longest sample", *(str(max(each, default=0)) for each in lengths))
    grid.add_row(f"packs of up to {max_tokens}", *(str(len(list(batches(samples, max_tokens)))) for samples in both))
    console.print(grid)
