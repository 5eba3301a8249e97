"""What cannot work together is refused before the first stage, and the message says what can."""

from __future__ import annotations

import importlib.util
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from training import arguments, groups, model

from leaf import stages
from leaf.checks import check_arguments
from leaf.config import STAGES, RunConfig
from leaf.run import Run, run_stages
from leaf.trainer import LeafTrainer

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PARALLEL = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}


# Options, processes, environment of the launcher, and the remedy
REFUSED: dict[str, tuple[dict[str, Any], int, dict[str, str], str]] = {
    "device map": ({"device_map": "auto"}, 2, {}, "run it in one process, without accelerate launch, or leave it out"),
    "one rank": ({"shard_teacher": True}, 1, {}, "run it under accelerate launch, or use --device-map auto"),
    "no bitsandbytes": (
        {"teacher_quantization": "8bit"},
        1,
        {},
        r"`pip install 'leaf-kernels\[quantization\]'`",
    ),
    "reverse KL of the top": (
        {"teacher_mode": "cached_topk", "divergence": "reverse_kl"},
        1,
        {},
        "give --teacher-mode cached_hidden",
    ),
    "more than all": ({"teacher_mode": "cached_topk", "cache_topk": 10**6}, 1, {}, r"cache_topk must be at most \d+"),
    "sharded on one rank": ({"teacher_mode": "fsdp2"}, 1, {}, "run it under accelerate launch, or give --teacher-mode"),
    "sharded, quantized": (
        {"teacher_mode": "fsdp2", "teacher_quantization": "8bit"},
        2,
        {"bitsandbytes": "installed"},
        "leave it out, or give --teacher-mode replicate",
    ),
    "no device map": ({"teacher_mode": "device_map"}, 1, {}, "add --device-map auto"),
    "device map on ranks": ({"teacher_mode": "device_map"}, 2, {}, "give --teacher-mode fsdp2, cached_hidden or"),
    "FSDP1": ({}, 1, {**FSDP, "FSDP_VERSION": "1"}, r"use FSDP2 \(fsdp_version: 2 in the accelerate config"),
    "context parallel": ({}, 1, PARALLEL, r"\{'cp': 2\}: .* use data parallelism \(DDP, FSDP2, ZeRO\)"),
    "FSDP of one": ({"training": {"fsdp": True}}, 1, {}, "leave it out, or use accelerate launch --config_file"),
    "no rows": ({"training": {"eval_strategy": "epoch"}}, 1, {}, "evaluates before and after: leave it out"),
    "set by the run": ({"training": {"temperature": 2}}, 1, {}, "use the option beside `training`"),
    "misspelt": ({"training": {"learning_rat": 1}}, 1, {}, "did you mean 'learning_rate'"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, tokenizer = tmp_path_factory.mktemp("pair"), tiny.tokenizer()
    for role, seed in (("teacher", 1), ("student", 0)):
        tiny.model(tokenizer, seed=seed).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return {role: str(folder / role) for role in ("teacher", "student")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_a_run(
    case: str, tmp_path: pathlib.Path, pair: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, ranks, environment, remedy = REFUSED[case]
    config = RunConfig.from_mapping({**pair, "output": str(tmp_path / "run"), **options})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: environment.get(name))
    begin = Run.__init__

    def of_ranks(self: Run, *args: Any) -> None:
        begin(self, *args)
        self.ranks = ranks

    monkeypatch.setattr(Run, "__init__", of_ranks)
    for stage in STAGES:
        monkeypatch.setitem(stages.FUNCTIONS, stage, lambda run: pytest.fail("a stage ran"))
    with pytest.raises((ValueError, ImportError), match=remedy):
        run_stages(config, STAGES)
    assert not (tmp_path / "run").exists()


def test_zero_3_that_saves_no_model(tmp_path: pathlib.Path) -> None:
    args = arguments(tmp_path)
    for gathers in (False, True):
        zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": gathers}
        args.deepspeed_plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig({"zero_optimization": zero}))
        if gathers:
            check_arguments(args)
        else:
            with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save: set it to true"):
                check_arguments(args)


def test_several_gpus_in_one_process(tmp_path: pathlib.Path) -> None:
    """Refused, but for a teacher that is spread over them."""
    args = arguments(tmp_path, max_steps=1)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="choose one with CUDA_VISIBLE_DEVICES=0"):
        LeafTrainer(model(0), model(1, hidden=32), args, groups())
    teacher = model(1, hidden=32)
    teacher.hf_device_map = {"": "cpu"}
    trainer = LeafTrainer(model(0), teacher, args, groups())
    assert (args.n_gpu, args.train_batch_size) == (1, args.per_device_train_batch_size), "no nn.DataParallel"
    trainer.train()
    assert trainer.state.global_step == 1


def test_weights_without_values(tmp_path: pathlib.Path) -> None:
    for role, pair in (("student", (model(0).to("meta"), model(1))), ("teacher", (model(0), model(1).to("meta")))):
        with pytest.raises(
            ValueError, match=f"weights of the {role} have no values on this rank: load them on every rank"
        ):
            LeafTrainer(*pair, arguments(tmp_path), groups())
