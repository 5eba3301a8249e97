"""What `LeafTrainer` refuses before its first step, and how it takes a teacher in."""

from __future__ import annotations

import os

import torch
from accelerate import ParallelismConfig
from accelerate.utils import str_to_bool
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer

from .objective import check_head
from .teacher import TeacherCache
from .training_arguments import LeafArguments


def check_arguments(args: LeafArguments, *, spread_teacher: bool = False) -> None:
    """What the arguments and the launcher's environment tell before a model is loaded: engines that would give another loss,
    no gradient, or no model in the end.

    spread_teacher: it takes the GPUs of this process that the student does not.

    Raises:
        ValueError: naming the remedy.
    """
    if args.n_gpu > 1 and not spread_teacher:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would start nn.DataParallel; launch with "
            "`accelerate launch --multi_gpu -m leaf ...`, or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    args._n_gpu = min(args.n_gpu, 1)
    if args.fsdp or _is_set("ACCELERATE_USE_FSDP"):
        version = (args.fsdp_plugin_args or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", 1))
        if int(version) != 2:
            raise ValueError(
                "FSDP1 shards weights that the losses read: use FSDP2 (fsdp_version: 2 in the accelerate config, or "
                "fsdp_config={'version': 2})"
            )
    parallel = args.parallelism_config
    if parallel is None and _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        parallel = ParallelismConfig()  # reads the environment
    sizes = {name: getattr(parallel, f"{name}_size", 1) for name in ("tp", "cp", "sp")}
    if over := {name: size for name, size in sizes.items() if size > 1}:
        raise ValueError(
            f"parallelism_config has {over}: packs are not cut along tokens or heads; use data parallelism (DDP, FSDP2, "
            "ZeRO), with activation checkpointing and a smaller max_tokens for memory"
        )
    if args.deepspeed_plugin is not None:
        config = args.deepspeed_plugin.hf_ds_config
        gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        if config.is_zero3() and not config.is_true(gathers):
            raise ValueError(f"ZeRO-3 saves no model that transformers can load without {gathers}: set it to true")


def _is_set(name: str) -> bool:
    return str_to_bool(os.environ.get(name) or "false") == 1


def check_shards(trainer: Trainer) -> None:
    """`fsdp` that accelerate leaves out, and a student that engines do not share.

    Raises:
        ValueError: naming the remedy.
    """
    args = trainer.args
    if (args.fsdp or _is_set("ACCELERATE_USE_FSDP")) and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"FSDP was asked for, but accelerate shards on GPUs only and would train whole copies on {args.device.type}: "
            "leave fsdp out, or launch without an FSDP configuration"
        )
    if getattr(trainer.model, "is_quantized", False) and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "a quantized student is not shared by the ranks (FSDP, DeepSpeed): train its adapters with DDP, or leave "
            "student_quantization out"
        )


def refuse_without_values(model: PreTrainedModel, role: str) -> None:
    """Weights that only another rank has loaded: FSDP would fill in a student's, and nobody a teacher's."""
    if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise ValueError(
            f"weights of the {role} have no values on this rank: load them on every rank (in the accelerate config, "
            "fsdp_cpu_ram_efficient_loading: false)"
        )


def settle(teacher: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The teacher frozen, on `device` unless it has a place of its own, and its head checked."""
    teacher.requires_grad_(False).eval()
    placed = hasattr(teacher, "hf_device_map") or getattr(teacher, "hf_quantizer", None) is not None
    sharded = any(isinstance(module, FSDPModule) for module in teacher.modules())
    if not placed and not sharded:
        teacher.to(device)  # type: ignore[arg-type]
    check_head(teacher)
    return teacher


def check_cache(cache: TeacherCache, divergence: str, temperature: float, vocab_size: int | None) -> None:
    """Of the K most probable tokens only the forward KL is known, at the temperature they were stored at."""
    if cache.kind != "topk":
        return
    if divergence != "forward_kl":
        raise ValueError(
            f"divergence={divergence!r} needs the teacher's whole distribution, and this cache has its most probable "
            "tokens: use divergence='forward_kl', or a cache of hidden states (--teacher-mode cached_hidden)"
        )
    if temperature != cache.temperature:
        raise ValueError(
            f"temperature={temperature:g}, but the cached log-probabilities are at {cache.temperature:g}: use that, or "
            "build the cache again with `leaf cache --temperature`"
        )
    if vocab_size is not None and vocab_size != cache.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}, but the cached probabilities are over the first {cache.vocab_size} tokens: use that"
        )


def refuse_attention_dropout(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        if value := getattr(config, name, None):
            raise ValueError(
                f"the student's config has {name}={value}, but packed attention has no dropout; load the student with "
                f"from_pretrained(..., {name}=0.0)"
            )
