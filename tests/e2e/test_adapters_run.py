"""`leaf distill --lora-rank`: from stored tables to an adapter that loads, is evaluated and goes on after a kill."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small import Said, word_problems, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from leaf import cli, distill
from leaf.config import RunConfig
from leaf.run import run_stages
from leaf.tables import open_table
from leaf.trainer import LeafTrainer

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
IDS = torch.tensor([[5, 9, 17, 33, 4, 60]])
QLORA = [
    pytest.param(bits, marks=pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed"))
    for bits in ("8bit", "4bit")
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, pair: dict[str, str]) -> RunConfig:
    """A run up to verify."""
    folder = tmp_path_factory.mktemp("scored")
    options = {**pair, "output": str(folder / "run"), "select": "all", "verify": "none", "max_new_tokens": 2}
    training = {"learning_rate": 3e-2, "max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 1}
    options |= {"data": write_rows(folder / "rows.jsonl", word_problems(5)), "device": "cpu", "training": training}
    (folder / "config.yaml").write_text(json.dumps(options))  # JSON is YAML
    config = RunConfig.from_mapping(options)
    run_stages(config, ("select", "score", "prune", "verify"))
    return config


@pytest.fixture
def run(tmp_path: pathlib.Path, scored: RunConfig) -> list[str]:
    """Flags of a copy of that run."""
    shutil.copytree(scored.output, tmp_path / "run")
    return ["--config", str(pathlib.Path(scored.output).parent / "config.yaml"), "--output", str(tmp_path / "run")]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were trained."""
    models: list[Any] = []
    write = distill.run_card

    def run_card(trainer: LeafTrainer, *args: Any, **options: Any) -> None:
        models.append(trainer.model)
        write(trainer, *args, **options)

    monkeypatch.setattr(distill, "run_card", run_card)
    return models


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.set_attn_implementation("eager")
    return model.eval()(input_ids=IDS).logits


def test_an_adapter_is_trained_saved_loaded_and_evaluated(
    tmp_path: pathlib.Path, run: list[str], scored: RunConfig, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = str(scored.student)
    assert cli.main(["distill", *run, "--lora-rank", "4"]) == 0
    model = tmp_path / "run" / "model"
    assert not (model / "model.safetensors").exists()
    adapter = json.loads((model / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["task_type"]) == (4, 8, "CAUSAL_LM")
    assert adapter["base_model_name_or_path"] == student
    stored = load_file(model / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    names = {name.split(".lora_")[0].split(".")[-1] for name in stored}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(tensor.any() for name, tensor in stored.items() if "lora_B" in name), "an adapter was not trained"

    monkeypatch.chdir(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(logits(plain), logits(trained[0]))
    assert not torch.allclose(logits(plain), logits(AutoModelForCausalLM.from_pretrained(student)), atol=1e-3)
    assert AutoTokenizer.from_pretrained(model).chat_template
    card = (model / "README.md").read_text()
    assert "library_name: peft" in card
    assert "LoRA, rank 4, alpha 8" in card

    assert cli.main(["eval", *run]) == 0
    before, after = open_table(tmp_path / "run" / "eval")
    assert (before["model"], after["model"]) == ("before", "after")
    assert before["attention_to_flagged"] != after["attention_to_flagged"], "the adapter was left out"
    assert cli.main(["report", *run]) == 0


def test_options_of_adapters_train_again_and_nothing_else(
    tmp_path: pathlib.Path, scored: RunConfig, run: list[str]
) -> None:
    def stages(**options: Any) -> Said:
        said = Said()
        known = {name: getattr(scored, name) for name in scored.__dataclass_fields__}
        config = RunConfig(**{**known, "output": run[-1], "lora_rank": 2, "lora_alpha": None, **options})
        run_stages(config, ("select", "score", "prune", "verify", "distill"), said)
        return said

    stages()
    again = stages(lora_alpha=4)
    assert "distill: unchanged" in again, "the default is 2 * lora_rank"
    for options, change in (
        ({"lora_rank": 3}, "lora_alpha (4 -> 6), lora_rank (2 -> 3)"),
        ({"lora_alpha": 7}, "(6 -> 7)"),
    ):
        said = stages(**{"lora_rank": 3, **options})
        assert any(m.startswith("distill: computed again") and change in m for m in said), list(said)
        assert {f"{name}: unchanged" for name in ("select", "score", "prune", "verify")} <= set(said)


@pytest.mark.slow
def test_a_killed_training_of_adapters_ends_where_an_uninterrupted_one_ends(
    tmp_path: pathlib.Path, run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    killed = [*run[:-1], str(tmp_path / "killed")]
    assert cli.main(["distill", *run, "--lora-rank", "2"]) == 0
    loss = LeafTrainer.compute_loss

    def dies(self: LeafTrainer, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 2:
            raise MemoryError("killed")
        return loss(self, *args, **options)

    monkeypatch.setattr(LeafTrainer, "compute_loss", dies)
    assert cli.main(["distill", *killed, "--lora-rank", "2"]) == 2
    monkeypatch.setattr(LeafTrainer, "compute_loss", loss)
    assert not (tmp_path / "killed" / "model").exists()
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*/checkpoint-2")
    assert not (checkpoint / "model.safetensors").exists(), "a checkpoint holds adapters only"
    assert cli.main(["distill", *killed, "--lora-rank", "2"]) == 0
    assert "distill: resumed from checkpoint-2" in capsys.readouterr().err
    whole, resumed = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("run", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("bits", QLORA)
def test_adapters_on_a_quantized_body(
    tmp_path: pathlib.Path, run: list[str], trained: list[Any], bits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["distill", *run, "--lora-rank", "4", "--student-quantization", bits]) == 0
    assert f"student: quantized to {bits} while its adapters are trained" in capsys.readouterr().err
    layer = trained[0].get_base_model().model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == (torch.int8 if bits == "8bit" else torch.uint8)
    assert {p.dtype for p in trained[0].parameters() if p.requires_grad} == {torch.float32}
    stored = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in stored.items() if "lora_B" in name)
    # As it loads, it stands on the model that is not quantized
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"))
    distance = (plain - logits(trained[0])).norm() / plain.norm()
    assert 1e-5 < distance < 0.2


def test_what_is_refused(
    tmp_path: pathlib.Path, run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*command: str) -> str:
        assert cli.main(list(command)) == 2
        return capsys.readouterr().err

    assert "student_quantization=4bit is for adapters: add --lora-rank, e.g. 16" in said(
        "distill", *run, "--student-quantization", "4bit"
    )
    assert "lora_alpha=8 is for adapters: add --lora-rank" in said("distill", *run, "--lora-alpha", "8")
    assert "lora_rank must be positive, got 0" in said("distill", *run, "--lora-rank", "0")
    vllm = ("--lora-rank", "2", "--engine", "vllm")
    assert "--engine vllm does not load the adapter" in said("run", *run, *vllm)

    assert cli.main(["distill", *run, "--lora-rank", "2"]) == 0
    capsys.readouterr()
    assert "--engine vllm does not load the adapter" in said("eval", *run, "--engine", "vllm")
    assert "is an adapter, which is not trained further: merge it" in said(
        "distill", *run, "--student", str(tmp_path / "run" / "model")
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "--lora-rank 2 needs peft: `pip install 'leaf-kernels[peft]'`" in said("distill", *run, "--lora-rank", "2")
    assert "the adapter in" in said("eval", *run)
