"""DDP and FSDP2 on two gloo ranks: weights after training, checkpoints, resuming, adapters, evaluation."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import engine, launched_with, on_ranks
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from training import Gradients, arguments, assert_same, groups, model, train, whole
from transformers import AutoModelForCausalLM, Trainer

from leaf.checkpoint import damage
from leaf.loading import load_model, with_adapters
from leaf.trainer import LeafTrainer

EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
LEARNING: dict[str, Any] = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "train_sampling_strategy": "random",
    "counterfactuals_per_sample": "1",
    "save_strategy": "steps",
    "save_steps": 3,
    "max_steps": 6,
}


def trainer(output: str | Path, student: Any = None, **options: Any) -> LeafTrainer:
    student = model(0) if student is None else student
    return LeafTrainer(student, model(1, hidden=32), arguments(output, **options), groups(), groups())


def weights(trained: LeafTrainer) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in trained.model.named_parameters()}


def tied() -> Any:
    student = model(0)
    student.config.tie_word_embeddings = True
    student.tie_weights()
    return student


def lora() -> Any:
    torch.manual_seed(3)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model(0), adapter).double()


def frozen_head() -> Any:
    student = model(0)
    student.lm_head.requires_grad_(False)
    return student


def quantized(folder: Path, bits: str) -> Any:
    body = load_model(str(folder), torch.float32, torch.device("cpu"), print, quantization=bits)
    adapted: Any = with_adapters(body, 2, 4, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros have no gradient to their other half
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return adapted


HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
STUDENTS: dict[str, Callable[[], Any]] = {"tied": tied, "lora": lora, "frozen head": frozen_head}


def gradients(output: str | Path, student: Callable[[], Any], batch: int, **options: Any) -> Any:
    """Losses and gradients, as `training.train` gives them."""
    trained = trainer(output, student(), per_device_train_batch_size=batch, **options)
    trained.add_callback(seen := Gradients())
    trained.train()
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry], seen.steps


# -- what each rank does -----------------------------------------------------------------------------------------------


def on_each_rank(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in [name for name in globals() if name.startswith("rank_")]:
        with engine():
            found[name.removeprefix("rank_")] = globals()[name](f"{folder}/{name}")
    return found


def rank_twenty_steps(output: str) -> Any:
    trained = trainer(output, **{**LEARNING, "max_steps": 20, "save_strategy": "no"})
    trained.train()
    return weights(trained)


def rank_ddp_checkpoints(output: str) -> Any:
    """The second rank is late with its last file of a checkpoint."""
    save = Trainer._save_rng_state

    def late(self: Trainer, folder: str) -> None:
        while os.environ["RANK"] == "1" and not Path(folder, "rng_state_0.pth").exists():
            time.sleep(1)
        time.sleep(int(os.environ["RANK"]))
        save(self, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", late)
        trained = trainer(output, **LEARNING)
        trained.train()
    return weights(trained)


def rank_fsdp_resume(output: str) -> Any:
    interrupted = trainer(output, **LEARNING, **FSDP)
    interrupted.train()
    resumed = trainer(output, **LEARNING, **FSDP)
    resumed.train(resume_from_checkpoint=f"{output}/checkpoint-3")
    resumed.save_model(f"{output}/final")
    return weights(interrupted), weights(resumed), resumed.state.global_step


def rank_fsdp_adapters(output: str) -> Any:
    """On a body in bf16, as `leaf distill --lora-rank` makes them on GPUs."""

    def make() -> LeafTrainer:
        student = with_adapters(model(0).bfloat16(), 2, 4, seed=0)
        options = {**LEARNING, "bf16": True, **FSDP}
        return LeafTrainer(student, model(1, hidden=32).bfloat16(), arguments(output, **options), groups())

    interrupted, resumed = make(), make()
    interrupted.train()
    resumed.train(resume_from_checkpoint=f"{output}/checkpoint-3")
    resumed.save_model(f"{output}/final")
    return weights(interrupted), weights(resumed), resumed.state.global_step


def rank_fsdp_sharded_checkpoints(output: str) -> Any:
    """Accelerate's default. The Trainer alone saves no model then."""
    sharded = {**FSDP["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    trained = trainer(output, **{**LEARNING, "max_steps": 3}, fsdp=True, fsdp_config=sharded)
    trained.train()
    trained.save_model(f"{output}/final")
    return weights(trained), sorted(path.name for path in Path(output, "checkpoint-3").iterdir())


def rank_students(output: str) -> Any:
    found = {}
    for name, student in STUDENTS.items():
        for kind, options in (("ddp", {}), ("fsdp2", FSDP)):
            with engine():
                found[f"{name}, {kind}"] = gradients(output, student, 2, **options)
    return found


def rank_quantized(output: str) -> Any:
    found = {}
    for bits in ("8bit", "4bit") if HAS_BNB else ():
        with engine():
            found[bits] = gradients(output, lambda bits=bits: quantized(Path(output).parent / "body", bits), 2)
    return found


def rank_examples(output: str) -> Any:
    """The files for `accelerate launch`, in fp64; and one as it is, with fp32 models and the launcher's bf16."""
    found = {}
    with engine():
        os.environ.update(launched_with(EXAMPLES / "fsdp2.yaml"))
        pair = model(0).float(), model(1, hidden=32).float()
        trained = LeafTrainer(*pair, arguments(output, per_device_train_batch_size=2), groups())
        trained.train()
        found["as it is"] = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    for config in sorted(EXAMPLES.glob("fsdp*.yaml")):
        with engine():
            os.environ.update(launched_with(config) | {"ACCELERATE_MIXED_PRECISION": "no"})
            trained = trainer(output, per_device_train_batch_size=2)
            trained.add_callback(seen := Gradients())
            trained.train()
            plugin = trained.accelerator.state.fsdp_plugin
            losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
            found[config.stem] = losses, seen.steps, isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    return found


def rank_bf16(output: str) -> Any:
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "bf16": True, **FSDP}
    pair = model(0).float(), model(1, hidden=32).float()
    trained = LeafTrainer(*pair, arguments(output, **options), groups(), callbacks=[seen := Gradients()])
    trained.train()
    head = trained.model.lm_head.weight
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    return losses, seen.steps, isinstance(head, DTensor), head.dtype


def rank_evaluate(output: str) -> Any:
    """Evaluation of a model that is not trained yet, of a test set, and training afterwards."""
    found = {}
    for kind, options in (("ddp", {}), ("fsdp2", FSDP)):
        with engine():
            evaluated = trainer(output, per_device_eval_batch_size=2, per_device_train_batch_size=2, **options)
            metrics = evaluated.evaluate()
            tested = evaluated.predict(groups()).metrics
            evaluated.add_callback(seen := Gradients())
            evaluated.train()
            found[kind] = metrics, tested, seen.steps
    return found


# -- what they found ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    model(0).float().save_pretrained(folder / "body")  # on ranks, only the first one writes
    return folder, on_ranks(on_each_rank, str(folder))


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def test_ranks_agree_bitwise_after_twenty_steps(ranks):
    _, (first, second) = ranks
    assert_equal(first["twenty_steps"], second["twenty_steps"])
    assert not torch.equal(first["twenty_steps"]["lm_head.weight"], model(0).lm_head.weight), "nothing was trained"


def test_a_checkpoint_of_two_ranks_resumes_on_one(ranks, tmp_path):
    folder, (first, _) = ranks
    alone = trainer(tmp_path, **{**LEARNING, "per_device_train_batch_size": 4})
    alone.train(resume_from_checkpoint=str(folder / "rank_ddp_checkpoints" / "checkpoint-3"))
    assert alone.state.global_step == 6
    assert_equal(weights(alone), first["ddp_checkpoints"], rtol=1e-4, atol=1e-5)


def test_checkpoints_are_vouched_for_with_the_files_of_all_ranks(ranks):
    """The Trainer's own order: nothing waits for the other ranks before the last file is written."""
    folder, _ = ranks
    (ddp, fsdp) = (folder / f"rank_{name}" / "checkpoint-3" for name in ("ddp_checkpoints", "fsdp_sharded_checkpoints"))
    for checkpoint in (ddp, fsdp):
        assert damage(checkpoint) is None
        files = json.loads((checkpoint / "leaf_files.json").read_text())
        assert {"rng_state_0.pth", "rng_state_1.pth", "scheduler.pt"} <= files.keys()
    assert {"model.safetensors", "optimizer.pt"} <= json.loads((ddp / "leaf_files.json").read_text()).keys()
    assert "optimizer_0/__1_0.distcp" in json.loads((fsdp / "leaf_files.json").read_text())


def test_fsdp_resumes_as_if_it_had_not_been_interrupted_and_saves_a_plain_model(ranks):
    folder, (first, second) = ranks
    whole_run, resumed, steps = first["fsdp_resume"]
    assert steps == 6
    assert_equal(resumed, whole_run)
    assert_equal(second["fsdp_resume"][1], resumed)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "rank_fsdp_resume" / "final", dtype=torch.float64)
    assert_equal(dict(loaded.named_parameters()), resumed)
    assert_equal(resumed, first["ddp_checkpoints"], rtol=1e-4, atol=1e-5)


def test_fsdp_resumes_adapters_on_a_body_in_bf16_and_saves_them_alone(ranks):
    folder, (first, second) = ranks
    whole_run, resumed, steps = first["fsdp_adapters"]
    assert steps == 6
    assert_equal(resumed, whole_run)
    assert_equal(second["fsdp_adapters"][1], resumed)
    adapters = {name.replace(".default", ""): value for name, value in resumed.items() if ".lora_" in name}
    assert {value.dtype for value in adapters.values()} == {torch.float32}
    assert all(value.any() for value in adapters.values()), "nothing was trained"
    assert_equal(load_file(folder / "rank_fsdp_adapters" / "final" / "adapter_model.safetensors"), adapters)


def test_a_final_model_is_whole_where_checkpoints_are_sharded(ranks):
    folder, (first, _) = ranks
    trained, checkpoint = first["fsdp_sharded_checkpoints"]
    assert "pytorch_model_fsdp_0" in checkpoint, "the checkpoint was to be sharded"
    stored = load_file(folder / "rank_fsdp_sharded_checkpoints" / "final" / "model.safetensors")
    assert_equal(stored, trained)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", STUDENTS)
def test_students(name: str, kind: str, ranks, tmp_path):
    _, found = ranks
    expected = gradients(tmp_path, STUDENTS[name], 4)
    for each in found:
        losses, steps = each["students"][f"{name}, {kind}"]
        assert_same((losses or expected[0], steps), expected)
    if name == "frozen head":
        assert "lm_head.weight" not in expected[1][0]


@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_adapters_on_a_quantized_body(bits: str, ranks, tmp_path):
    folder, found = ranks
    expected = gradients(tmp_path, lambda: quantized(folder / "body", bits), 4)
    for each in found:
        losses, steps = each["quantized"][bits]
        assert losses == pytest.approx(expected[0], rel=1e-5)
        for step, reference in zip(steps, expected[1], strict=True):
            for name, gradient in reference.items():  # in fp32, not in fp64 as above
                assert (step[name] - gradient).norm() < 1e-4 * gradient.norm(), name
    plain = gradients(tmp_path, lambda: with_adapters(model(0).float(), 2, 4, seed=0), 4)
    assert plain[0] != pytest.approx(expected[0], rel=1e-4), "nothing was quantized"


def test_examples_for_accelerate(ranks, tmp_path):
    _, (first, _) = ranks
    expected = train(tmp_path)
    assert first["examples"].pop("as it is") == pytest.approx(expected[0], rel=2e-2)
    assert set(first["examples"]) == {"fsdp2", "fsdp2_offload"}
    for name, (*found, offloaded) in first["examples"].items():
        assert_same(found, expected)
        assert offloaded == ("offload" in name)


def test_bf16_trains_fp32_masters_and_logs_an_unrounded_loss(ranks, tmp_path):
    _, (first, _) = ranks
    losses, steps, sharded, dtype = first["bf16"]
    assert sharded
    assert dtype == torch.float32
    exact, expected = train(tmp_path)
    for loss, reference in zip(losses, exact):
        assert loss == pytest.approx(reference, rel=2e-2)
        assert torch.tensor(loss).bfloat16().item() != loss, "rounded to bfloat16"
    for step, reference in zip(steps, expected):
        ours, exact_gradient = (torch.cat([g[n].double().flatten() for n in reference]) for g in (step, reference))
        assert (ours - exact_gradient).norm() < 0.2 * exact_gradient.norm()  # of a model with peaked outputs


def test_evaluation(ranks, tmp_path):
    _, found = ranks
    alone = trainer(tmp_path).evaluate()
    _, expected = train(tmp_path)
    for each in found:
        for kind, (metrics, tested, steps) in each["evaluate"].items():
            assert_same(([], steps), ([], expected))
            for name in ("loss", "kl_original", "kl_counterfactual"):
                assert metrics[f"eval_{name}"] == pytest.approx(alone[f"eval_{name}"], rel=1e-6), kind
                assert tested[f"test_{name}"] == pytest.approx(alone[f"eval_{name}"], rel=1e-6), kind
