"""Adapters on a frozen body: what gets one, in which dtypes, with which gradients, and what that takes."""

from __future__ import annotations

import logging
import pathlib
import types
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import arguments, groups, model
from training import Gradients, assert_same

from leaf.checks import check_shards
from leaf.loading import adapter_base, load_model, with_adapters
from leaf.trainer import LeafTrainer
from leaf_kernels.testing import record_peak_bytes


def student(**options: Any) -> Any:
    return with_adapters(tiny.model(tiny.tokenizer(), **options).bfloat16(), 4, 8, seed=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_every_linear_layer_of_the_body_gets_one_and_the_head_none(arch: str, tied: bool) -> None:
    adapted = student(arch=arch, tie_word_embeddings=tied)
    inner = adapted.get_base_model()
    assert type(inner.get_output_embeddings()) is torch.nn.Linear
    assert (inner.get_output_embeddings().weight is inner.get_input_embeddings().weight) == tied
    bare = tiny.model(tiny.tokenizer(), arch=arch)
    linear = {name for name, m in bare.named_modules() if type(m).__name__ in ("Linear", "Conv1D")} - {"lm_head"}
    assert linear
    assert {name for name, m in inner.named_modules() if hasattr(m, "lora_A")} == linear
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_seed_makes_the_adapters() -> None:
    def first(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)
        adapted = with_adapters(tiny.model(tiny.tokenizer()), 4, 8, seed)
        return next(p for name, p in adapted.named_parameters() if "lora_A" in name)

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_a_folder_is_found_from_anywhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model(tiny.tokenizer()).save_pretrained(tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    adapted: Any = with_adapters(load_model("student", torch.float32, torch.device("cpu"), print), 2, 4, seed=0)
    adapted.save_pretrained("adapter")
    assert adapter_base(str(tmp_path / "adapter")) == str(tmp_path / "student")
    assert adapter_base(str(tmp_path / "student")) is None


def gradients(folder: pathlib.Path, dtype: torch.dtype, **options: Any) -> tuple[list[float], list[Any]]:
    adapted = with_adapters(model(0).to(dtype), 2, 4, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros have no gradient to their other half
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    trainer = LeafTrainer(adapted, model(1, hidden=32).to(dtype), arguments(folder, **options), groups())
    trainer.add_callback(seen := Gradients())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], seen.steps


def test_checkpointing_changes_no_gradient(tmp_path: pathlib.Path) -> None:
    """The embedding is frozen, so nothing that enters the first layer needs a gradient."""
    plain, recomputed = (gradients(tmp_path, torch.float32, gradient_checkpointing=on) for on in (False, True))
    assert_same(recomputed, plain)
    assert all(g.abs().sum() > 0 for g in plain[1][0].values())


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["plain", "autocast"])
def test_a_body_in_16_bits_trains_fp32_adapters(tmp_path: pathlib.Path, options: dict[str, Any]) -> None:
    (losses, exact), (rounded, steps) = (
        gradients(tmp_path, d, **o) for d, o in ((torch.float32, {}), (torch.bfloat16, options))
    )
    for loss, reference in zip(rounded, losses, strict=True):
        assert loss == pytest.approx(reference, rel=5e-2)
    for step, reference in zip(steps, exact, strict=True):
        assert {g.dtype for g in step.values()} == {torch.float32}
        ours, theirs = (torch.cat([g[name].flatten() for name in reference]) for g in (step, reference))
        assert (ours - theirs).norm() < 0.3 * theirs.norm()  # of a model with peaked outputs


@pytest.mark.parametrize("autocast", [True, False])
def test_only_trained_weights_in_16_bits_are_warned_about(
    tmp_path: pathlib.Path, autocast: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model(0).bfloat16(), lora, autocast_adapter_dtype=autocast)
    with caplog.at_level(logging.WARNING):
        trainer = LeafTrainer(adapted, model(1, hidden=32).bfloat16(), arguments(tmp_path), groups())
    assert ("trained weights of the student are torch.bfloat16" in caplog.text) != autocast
    assert trainer.teacher_head is not None
    assert trainer.teacher_head.weight.dtype == torch.bfloat16


def test_a_frozen_head_has_no_gradient_in_memory(tmp_path: pathlib.Path) -> None:
    """Nothing as large as the head is made, neither a copy nor dW."""
    vocab, hidden = 16000, 64

    def peak(adapters: bool) -> int:
        pair = [tiny.model(tiny.tokenizer(), seed=seed, hidden=hidden, vocab_size=vocab) for seed in (0, 1)]
        trained = with_adapters(pair[0], 2, 4, seed=0) if adapters else pair[0]
        options = {"max_steps": 1, "optim": "sgd", "per_device_train_batch_size": 2}
        trainer = LeafTrainer(trained, pair[1], arguments(tmp_path, **options), groups())
        with record_peak_bytes() as found:
            trainer.train()
        return found[0]

    assert peak(True) < vocab * hidden * 4 < peak(False)


def test_a_quantized_student_is_not_sharded() -> None:
    quantized = types.SimpleNamespace(is_quantized=True)
    accelerator = types.SimpleNamespace(is_fsdp2=True)
    trainer: Any = types.SimpleNamespace(
        args=types.SimpleNamespace(fsdp=True), accelerator=accelerator, model=quantized, is_fsdp_enabled=True
    )
    with pytest.raises(ValueError, match="train its adapters with DDP"):
        check_shards(trainer)
