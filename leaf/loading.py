"""Loading a model: on one device, spread over the GPUs of a process, quantized, or sharded over the ranks."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from .config import CACHED, RunConfig

PATIENCE = datetime.timedelta(hours=1)  # of a rank with the others: one of them may read a large model from a slow disk


def check_loading(config: RunConfig, stages: Sequence[str], ranks: int) -> list[str]:
    """What a user should know before models are loaded as `config` says, a line each.

    Raises:
        ValueError: what is asked for does not go with the number of processes.
        ImportError: bitsandbytes or peft is missing.
    """
    notes = []
    cached = config.teacher_mode in CACHED
    if list(stages) == ["cache"] and not cached:
        raise ValueError(
            f"--teacher-mode {config.teacher_mode} has the teacher beside the student and needs no cache: give `leaf cache "
            "--teacher-mode cached_hidden` or `cached_topk`, and distil with the same"
        )
    asked = set(stages) if cached else set(stages) - {"cache"}
    if config.device_map and ranks > 1 and {"select", "score", "verify", "cache", "eval"} & asked:
        raise ValueError(
            f"--device-map {config.device_map}: each of the {ranks} processes would spread its models over all GPUs: run it "
            "in one process, without accelerate launch, or leave it out (--shard-teacher scores with a teacher that the "
            "processes share)"
        )
    if config.teacher_quantization and {"select", "score", "verify", "cache", "distill"} & asked:
        _check_installed("bitsandbytes", f"--teacher-quantization {config.teacher_quantization}", "quantization")
        notes.append(
            f"teacher: quantized to {config.teacher_quantization}; its answers and sensitivities are those of the quantized "
            "model, and its gradient passes through dequantized weights"
        )
    if config.shard_teacher and {"score", "cache"} & asked:
        if ranks == 1:
            raise ValueError(
                "--shard-teacher shares the teacher's layers among several processes, and this is a single one: run it "
                "under accelerate launch, or use --device-map auto"
            )
        whole = {"select", "verify"} | ({"distill"} if config.teacher_mode == "replicate" else set())
        if whole & asked:
            notes.append(
                "teacher: sharded for scoring and caching alone; where select and verify generate, and where distill "
                "trains with --teacher-mode replicate, each rank loads it whole. Where it does not fit, run `leaf select` "
                "and `leaf prune` with --device-map auto in one process, and distil with another --teacher-mode"
            )
    if {"cache", "distill"} & asked:
        _check_teacher_mode(config, ranks)
    return [*notes, *_check_student(config, stages)]


def _check_student(config: RunConfig, stages: Sequence[str]) -> list[str]:
    notes = []
    if "distill" in stages:
        if config.student and adapter_base(config.student):
            raise ValueError(
                f"--student {config.student} is an adapter, which is not trained further: merge it into its model (peft's "
                "merge_and_unload) and give what that saves"
            )
        if config.lora_rank:
            _check_installed("peft", f"--lora-rank {config.lora_rank}", "peft")
        if config.student_quantization:
            _check_installed("bitsandbytes", f"--student-quantization {config.student_quantization}", "quantization")
            notes.append(
                f"student: quantized to {config.student_quantization} while its adapters are trained; they are evaluated on "
                "the model that is not quantized, as they load"
            )
    trained = config.lora_rank if "distill" in stages else adapter_base(os.path.join(config.output, "model"))
    if "eval" in stages and config.engine == "vllm" and trained:
        raise ValueError(
            "--engine vllm does not load the adapter that --lora-rank leaves in model/: give --engine transformers"
        )
    return notes


def _check_installed(package: str, option: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{option} needs {package}: `pip install 'leaf-kernels[{extra}]'`")


def _check_teacher_mode(config: RunConfig, ranks: int) -> None:
    mode = f"--teacher-mode {config.teacher_mode}"
    if config.teacher_mode == "cached_topk" and config.divergence != "forward_kl":
        raise ValueError(
            f"{mode} knows the most probable tokens only, which is enough for --divergence forward_kl and not for "
            f"{config.divergence}: give --teacher-mode cached_hidden"
        )
    if config.teacher_mode == "fsdp2" and ranks == 1:
        raise ValueError(
            f"{mode} shares the teacher among several processes, and this is a single one: run it under accelerate "
            "launch, or give --teacher-mode device_map, cached_hidden or cached_topk"
        )
    if config.teacher_mode == "fsdp2" and config.teacher_quantization:
        raise ValueError(
            f"{mode} cannot shard a teacher with --teacher-quantization {config.teacher_quantization}: leave it out, or "
            "give --teacher-mode replicate, cached_hidden or cached_topk"
        )
    if config.teacher_mode == "device_map" and ranks > 1:
        raise ValueError(
            f"{mode}: each of the {ranks} processes would spread the teacher over all GPUs: run it in one process, without "
            "accelerate launch, or give --teacher-mode fsdp2, cached_hidden or cached_topk"
        )
    if config.teacher_mode == "device_map" and not config.device_map:
        raise ValueError(f"{mode} needs --device-map, which says how: add --device-map auto")


def load_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], None],
    *,
    device_map: str | None = None,
    quantization: str | None = None,
    shard: bool = False,
) -> PreTrainedModel:
    """A causal language model, or one with the adapter that peft has saved in a folder.

    Attention dropout is set to 0: packed attention has none.

    Args:
        device: where it goes.
        device_map: accelerate's rule for spreading it over the GPUs, instead of `device`.
        quantization: "8bit" or "4bit"; the head keeps `dtype`.
        shard: each decoder layer is divided among the ranks, all of which call this and then run the model in step.
    """
    base = adapter_base(name)
    if base is not None:
        _check_installed("peft", f"the adapter in {name}", "peft")
    config = AutoConfig.from_pretrained(base or name)
    for option in without_attention_dropout(config):
        say(f"{name}: {option} is set to 0")
    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if quantization == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if device_map or quantization:  # weights are quantized on the device where they stay
        return AutoModelForCausalLM.from_pretrained(name, device_map=device_map or {"": device}, **options)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(name, **options)

    return _load_sharded(load, device) if shard else load().to(device)


def with_adapters(model: PreTrainedModel, rank: int, alpha: int, seed: int) -> PreTrainedModel:
    """`model`, frozen, with trainable LoRA adapters in fp32 on every linear layer but the output head (peft).

    Nothing else of it is cast: norms compute in fp32 whatever their weights are in.
    """
    _check_installed("peft", f"--lora-rank {rank}", "peft")
    from peft import LoraConfig, get_peft_model

    set_seed(seed)  # adapters begin as random numbers, times 0
    options: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, **options))
    base = str(model.name_or_path)
    # It has to be found from wherever the adapter is loaded
    adapted.active_peft_config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    return adapted


def adapter_base(name: str) -> str | None:
    """What the adapter that peft has saved in folder `name` belongs to; None: there is none."""
    path = pathlib.Path(name, "adapter_config.json")
    return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else None


def without_attention_dropout(config: PreTrainedConfig) -> list[str]:
    """Sets attention dropout to 0: packed attention has none. Returns the names of the options that were not 0."""
    text = config.get_text_config()
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    changed = [name for name in names if getattr(text, name, None)]
    for name in changed:
        setattr(text, name, 0.0)
    return changed


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


# -- Over the ranks ----------------------------------------------------------------------------------------------------


def most(n: int, device: torch.device) -> int:
    """The largest of the ranks' numbers. Collective."""
    _join(device)
    largest = torch.tensor(n, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _join(device: torch.device) -> None:
    """Makes the process group that the launcher's variables describe, unless there is one."""
    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def _load_sharded(load: Callable[[], Any], device: torch.device) -> PreTrainedModel:
    """The ranks of a node load one after the other, so that its memory holds one whole model at a time."""
    from torch.distributed.device_mesh import init_device_mesh

    _join(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model: Any = None
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))):
        if turn == int(os.environ["LOCAL_RANK"]):
            model = _shard(load(), mesh, device)
        dist.barrier()
    return model


def _shard(model: Any, mesh: Any, device: torch.device) -> PreTrainedModel:
    """Divides the decoder layers; embeddings, last norm and head, whose weights are read from outside, stay whole."""
    from torch.distributed.fsdp import fully_shard

    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"--shard-teacher: {type(model).__name__} has no decoder layers that could be divided among the processes; use "
            "--device-map auto in one process"
        )
    model.requires_grad_(False)
    divided = {parameter for layer in layers for parameter in layer.parameters()}
    whole = set(model.base_model.parameters()) - divided
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)  # one root: a layer is gathered while one computes
    return model.to(device)
