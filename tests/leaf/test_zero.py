"""DeepSpeed ZeRO on two gloo ranks: a step is that of one process. Needs DeepSpeed, installed with DS_ACCELERATOR=cpu."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import engine, launched_with, on_ranks
from training import arguments, groups, model
from transformers import AutoModelForCausalLM

from leaf.trainer import LeafTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first run compiles DeepSpeed's communication for CPUs
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"
OPTIONS: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
CUTS = [dict(zip(("accumulation", "max_tokens"), values)) for values in itertools.product((1, 2), (10**6, 1))]


def zero(stage: int, gathers: bool = True) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gathers},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",  # DeepSpeed's own default clips at a norm of 1
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    }


def trainer(output: str, **options: Any) -> LeafTrainer:
    # Made before the arguments: a model that is loaded after them is divided among the ranks at once
    pair = model(0).float(), model(1, hidden=32).float()
    return LeafTrainer(*pair, arguments(output, **OPTIONS, **options), groups())


def on_each_rank(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        for cut in CUTS:
            name = f"stage {stage}, {cut}"
            with engine():
                trained = trainer(
                    f"{folder}/{name}",
                    deepspeed=zero(stage),
                    per_device_train_batch_size=2 // cut["accumulation"],
                    gradient_accumulation_steps=cut["accumulation"],
                    max_tokens=cut["max_tokens"],
                )
                trained.train()
                trained.save_model(f"{folder}/{name}/final")
                found[name] = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    for config in sorted(EXAMPLES.glob("zero*.yaml")):
        with engine():
            os.environ.update(launched_with(config) | {"ACCELERATE_MIXED_PRECISION": "no"})
            trained = trainer(f"{folder}/{config.stem}", per_device_train_batch_size=2, max_grad_norm=1.0)
            trained.train()
            trained.save_model(f"{folder}/{config.stem}/final")
            stage = trained.accelerator.state.deepspeed_plugin.zero_stage
            found[config.stem] = [entry["loss"] for entry in trained.state.log_history if "loss" in entry], stage
    with engine(), pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save: set it to true"):
        trainer(folder, deepspeed=zero(3, gathers=False))
    return found


def test_zero_equals_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    alone = trainer(str(tmp_path))
    alone.train()
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    clipped = trainer(str(tmp_path), max_grad_norm=1.0)
    clipped.train()
    first, _ = on_ranks(on_each_rank, str(tmp_path))
    examples = {name: first.pop(name) for name in ("zero2", "zero3")}
    assert [stage for _, stage in examples.values()] == [2, 3]
    for found, _ in examples.values():
        assert found == pytest.approx([e["loss"] for e in clipped.state.log_history if "loss" in e], rel=1e-5)
    assert len(first) == 3 * len(CUTS)
    for name, found in first.items():
        assert found == pytest.approx(losses, rel=1e-5), name
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name / "final", dtype=torch.float32)
        for (weight, expected), actual in zip(alone.model.named_parameters(), saved.parameters()):
            assert not torch.equal(expected, model(0).float().get_parameter(weight)), "nothing was trained"
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
