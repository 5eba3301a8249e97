"""The training stage of a run."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .banner import Banner
from .card import run_card
from .checkpoint import full_disk, last_whole
from .config import CACHED, RunConfig, did_you_mean
from .loading import PATIENCE, with_adapters
from .pack import build_groups
from .run import Produced, Run, Ui, device_of
from .tables import Table, digest, open_table
from .teacher import TeacherCache
from .trainer import LeafArguments, LeafTrainer

FULL = (
    "make room (save_total_limit: 1 in `training` keeps one checkpoint) and run the same command again; what is whole "
    "stays, and training goes on from the last whole checkpoint"
)
TRAINING_LOG = pa.schema([("step", pa.int64()), ("entry", pa.string())])


def distill(run: Run) -> Table:
    """Trains the student; the model goes to `model/`, the log of the training into the table."""
    scores, counterfactuals = open_table(run.folder / "score"), open_table(run.folder / "verify")
    inputs = {"scores": scores.fingerprint, "counterfactuals": counterfactuals.fingerprint}
    if run.config.teacher_mode in CACHED:
        inputs["cache"] = open_table(run.folder / "cache").fingerprint
    key = run.key("distill", **inputs, **run.models())
    # Named by what goes in: a checkpoint of other inputs, or of steps of another size, must never be resumed from.
    checkpoints = run.folder / "checkpoints" / digest({**key, "ranks": run.ranks})

    def train(_: Sequence[None]) -> Produced:
        encode = run.encoder.encode_text
        groups = build_groups(scores, counterfactuals, encode, originals=run.config.originals)
        student, teacher = load_student(run), load_teacher(run)
        arguments = training_arguments(run.config, checkpoints)  # from then on ZeRO-3 would load shares of models
        trainer = LeafTrainer(
            student,
            teacher,
            arguments,
            train_dataset=groups,
            vocab_size=run.shared_vocabulary(),
            processing_class=run.encoder.tokenizer,
        )
        trainer.add_callback(Banner(trainer, run.ui.show))
        _report_progress(trainer, run.ui)
        unfinished = run.folder / "model.tmp"
        if run.is_writer:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        found = last_whole(checkpoints, run.ui.say) if run.is_writer else None
        (last,) = broadcast_object_list([found and str(found)])  # all ranks resume from what rank 0 finds whole
        others = [folder for folder in checkpoints.parent.glob("*/checkpoint-*") if folder.parent != checkpoints]
        if others and not last:
            run.ui.say(
                f"distill: begins anew; the checkpoints in {others[0].parent} are of other inputs, options or "
                "another number of processes"
            )
        if last:
            run.ui.say(f"distill: resumed from {pathlib.Path(last).name}")
        result = trainer.train(resume_from_checkpoint=last)
        # Of a resumed training the Trainer knows the steps since then only
        mean = "" if last else f", mean loss {result.training_loss:.4g}"
        run.ui.say(f"distill: {result.global_step} steps at learning rate {arguments.learning_rate:g}{mean}")
        trainer.save_model(str(unfinished))  # every rank: a sharded model is gathered from all
        unset_hf_deepspeed_config()  # or what is loaded next would be divided among the ranks
        if run.is_writer:
            (unfinished / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths of this machine
            named = {role: run.name(role) for role in ("student", "teacher")}
            run_card(trainer, unfinished, scores=scores, counterfactuals=counterfactuals, data=run.config.data, **named)
            _replace(run.folder / "model", unfinished)
        log = trainer.state.log_history
        counts = {"groups": len(groups), "steps": trainer.state.global_step}
        yield [{"step": entry["step"], "entry": json.dumps(entry)} for entry in log], counts

    with full_disk(run.folder, FULL):
        return run.table("distill", key, TRAINING_LOG, [None], train, collective=True)


def load_student(run: Run) -> PreTrainedModel:
    """In fp32, to be trained as a whole; with `--lora-rank` frozen, in `--dtype` or quantized, under adapters in fp32."""
    config, name = run.config, run.name("student")
    host = torch.device("cpu")  # from there the Trainer moves all of it, or the share of a rank
    if config.lora_rank is None or config.lora_alpha is None:
        return run.load(name, torch.float32, spread=False, device=host)
    quantization = config.student_quantization
    body = run.load(name, spread=False, quantization=quantization, device=None if quantization else host)
    return with_adapters(body, config.lora_rank, config.lora_alpha, config.seed)


def load_teacher(run: Run) -> PreTrainedModel | TeacherCache:
    """The teacher as `--teacher-mode` asks for it: a model, or what one said."""
    mode = run.config.teacher_mode
    if mode not in CACHED:
        return run.load(run.name("teacher"), spread=mode == "device_map", shard=mode == "fsdp2")
    found = TeacherCache(run.folder / "cache")
    wanted: dict[str, Any] = {"kind": CACHED[mode], "teacher": run.models()["teacher"]}
    if mode == "cached_topk":
        wanted |= {"temperature": run.config.temperature, "vocab_size": run.shared_vocabulary()}
    for name, value in wanted.items():
        if found.key.get(name) != value:
            raise ValueError(
                f"{found.folder} was built with {name} {found.key.get(name)}, and this run has {value}: run `leaf cache` "
                "with the options of this run"
            )
    return found


def training_arguments(config: RunConfig, folder: pathlib.Path) -> LeafArguments:
    """The `LeafArguments` of a run: the options of `config`, and its `training` mapping beside them."""
    known = {f.name for f in dataclasses.fields(LeafArguments)}
    own: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": config.seed,
        "use_cpu": device_of(config).type == "cpu",
        "loss_mode": config.loss,
        "counterfactuals_per_sample": str(config.counterfactuals_per_sample),
        "disable_tqdm": True,
        "ddp_timeout": int(PATIENCE.total_seconds()),
    }
    for name in ("lambda_", "temperature", "divergence", "beta", "ce_weight", "max_tokens"):
        own[name] = getattr(config, name)
    if not own["use_cpu"] and not {"bf16", "fp16"} & set(config.training):
        own["bf16"] = True  # fp32 weights under autocast
    for name in config.training:
        if name in own:
            raise ValueError(f"training: {name} is set by the run: use the option beside `training`, not inside it")
        if name not in known:
            raise ValueError(f"training: LeafArguments has no field {name!r}{did_you_mean(name, known)}")
    arguments = LeafArguments(**own, **config.training)
    if config.training.get("eval_strategy", "no") != "no":
        raise ValueError(
            f"training: eval_strategy={config.training['eval_strategy']}, but a run evaluates before and after: leave it out"
        )
    if arguments.fsdp and (own["use_cpu"] or arguments.world_size == 1):
        raise ValueError(
            "training: fsdp divides the student among several GPUs, one for each process: leave it out, or use accelerate "
            "launch --config_file with fsdp_version: 2"
        )
    return arguments


def _replace(folder: pathlib.Path, new: pathlib.Path) -> None:
    """`new` becomes `folder`, which is whole whenever it is there."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
