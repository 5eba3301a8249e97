"""The examples for other trainers: losses and gradients are those of plain formulas on full logits, however a step is cut."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import on_ranks
from torch.distributed.tensor.debug import CommDebugMode
from transformers import (
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from examples import fsdp2_linear_kl, padding_free
from leaf_kernels import linear_kl
from leaf_kernels.testing import record_allocations

Gradients = dict[str, torch.Tensor]
HAS_TRL = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="TRL is not installed")
OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


class Recorder(TrainerCallback):
    """What the optimizer would see."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }


def trained(trainer: Trainer) -> tuple[float, Gradients]:
    """Loss and gradients of one step at learning rate 0."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return loss, recorder.gradients


def assert_same(actual: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def gradients_of(model: PreTrainedModel, loss: torch.Tensor) -> tuple[float, Gradients]:
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_kl(
    student: PreTrainedModel, teacher: PreTrainedModel, pairs: Iterable[tuple[list[int], list[int]]], vocab_size: int
) -> tuple[float, Gradients]:
    """The mean over all response tokens, one forward per sequence, from the definition."""
    per_token = []
    for prompt, response in pairs:
        ids = torch.tensor([prompt + response])
        rows = slice(len(prompt) - 1, ids.shape[1] - 1)
        s, t = (F.log_softmax(m(ids).logits[0, rows, :vocab_size], -1) for m in (student, teacher))
        per_token.append((t.exp() * (t - s)).sum(-1))
    return gradients_of(student, torch.cat(per_token).mean())


# -- linear_kl in TRL's SFTTrainer ------------------------------------------------------------------------------------------


# Of different lengths: a mean of the micro-batches' means would not be the mean
ROWS = [
    {"prompt": "1 plus 2 is", "completion": " 3"},
    {"prompt": "4 plus 5 is", "completion": " 9 is 9 is 9 plus 0"},
    {"prompt": "7 is", "completion": " 7"},
    {"prompt": "10 plus 11 plus 12 plus 13 is", "completion": " 21 plus 25 is 46"},
]


def trl_models(arch: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    """Heads of 109 and 127 rows for 104 tokens: primes, so that a size says whose it is."""
    trl_linear_kl = importlib.import_module("examples.trl_linear_kl")
    if arch == "llama":
        pair = [trl_linear_kl.small_llama(*shape) for shape in ((0, 32, 109), (1, 64, 127))]
    else:
        pair = []
        for seed, vocab_size in ((0, 109), (1, 127)):
            torch.manual_seed(seed)
            sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
            more = dict(num_key_value_heads=1, head_dim=8, initializer_range=0.4, final_logit_softcapping=2.0)
            pair.append(Gemma2ForCausalLM(Gemma2Config(vocab_size=vocab_size, pad_token_id=0, **sizes, **more)))
    return pair[0].double(), pair[1].double()


def trl_trainer(output: Path | str, arch: str = "llama", layout: bool = False, lora: bool = False, **options: Any):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    trl_linear_kl = importlib.import_module("examples.trl_linear_kl")
    student, teacher = trl_models(arch)
    more = {}
    if layout:
        padding_free.register()
        for model in (student, teacher):
            model.set_attn_implementation("leaf")
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        more["data_collator"] = padding_free.with_layout(collator)
    if lora:
        more["peft_config"] = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    return trl_linear_kl.LinearKLTrainer(
        model=student,
        teacher=teacher,
        args=SFTConfig(str(output), **{**OPTIONS, **options}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=trl_linear_kl.tokenizer(),
        **more,
    )


def trl_expected(arch: str = "llama") -> tuple[float, Gradients]:
    tokenizer = importlib.import_module("examples.trl_linear_kl").tokenizer()
    pairs = [(tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"] + "<eos>").input_ids) for row in ROWS]
    return plain_kl(*trl_models(arch), pairs, vocab_size=104)


CUTS = {
    "one batch": {},
    "two micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "padding-free": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | {"padding_free": True},
    "packs, leaf attention": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "layout": True},
    "softcap": {"arch": "gemma2"},
}


@needs_trl
@pytest.mark.parametrize("cut", CUTS)
def test_trl_equals_the_definition(cut: str, tmp_path):
    options = {"max_length": None, **CUTS[cut]}
    assert_same(trained(trl_trainer(tmp_path, **options)), trl_expected(options.get("arch", "llama")))


@needs_trl
def test_trl_with_lora(tmp_path):
    trainer = trl_trainer(tmp_path, lora=True)
    loss, gradients = trained(trainer)
    student = trainer.model.merge_and_unload()
    tokenizer = trainer.processing_class
    pairs = [(tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"] + "<eos>").input_ids) for row in ROWS]
    with torch.no_grad():
        student.requires_grad_(False).model.embed_tokens.weight.requires_grad_()
    assert loss == pytest.approx(plain_kl(student, trl_models()[1], pairs, vocab_size=104)[0], rel=1e-6)
    assert len(gradients) == 4, "A and B of two layers"
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@needs_trl
def test_trl_evaluates_and_makes_no_logits(tmp_path):
    trainer = trl_trainer(tmp_path)
    expected = trl_expected()[0]
    evaluated = trainer.evaluate(trainer.train_dataset, metric_key_prefix="eval")
    assert evaluated["eval_loss"] == pytest.approx(expected, rel=1e-6)
    batch = trainer.data_collator(list(trainer.train_dataset))
    tokens, used = batch["input_ids"].numel(), int((batch["labels"] != -100).sum())
    chunks = mock.patch("leaf_kernels.ops.linear_kl.op.default_chunk_rows", lambda *_, **__: 3)
    with chunks, record_allocations() as sizes:
        trainer.compute_loss(trainer.model, batch).backward()
    assert 3 * 104 in sizes, "logits of a chunk"
    assert not {n * v for n in (tokens, tokens - 4, used) for v in (104, 109, 127)} & set(sizes)


@needs_trl
def test_trl_example_runs(capsys):
    importlib.import_module("examples.trl_linear_kl").main()
    words = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert words[:4] == ["KL", "per", "completion", "token:"]
    assert float(words[-4]) < 0.8 * float(words[4])


# -- linear_kl under FSDP2 --------------------------------------------------------------------------------------------------


def fsdp2_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    make, vocabulary = fsdp2_linear_kl.small_llama, fsdp2_linear_kl.VOCABULARY
    return make(0, 32, vocabulary).double(), make(1, 64, vocabulary + 24).double()


def fsdp2_step(size: int) -> tuple[float, Gradients]:
    """Of this rank's share of six examples, `size` to a micro-batch; gradients as a whole."""
    model = fsdp2_linear_kl.Distillation(*fsdp2_models())
    fsdp2_linear_kl.shard(model)
    share = fsdp2_linear_kl.random_examples(6)[dist.get_rank() :: dist.get_world_size()]
    batches = [fsdp2_linear_kl.collate(share[n : n + size]) for n in range(0, len(share), size)]
    loss = fsdp2_linear_kl.backward(model, batches).item()
    assert all(p.grad is None for p in model.teacher.parameters())
    return loss, {name: p.grad.full_tensor() for name, p in model.student.named_parameters()}


def collectives() -> dict[str, int]:
    """Of one micro-batch."""
    model = fsdp2_linear_kl.Distillation(*fsdp2_models())
    fsdp2_linear_kl.shard(model)
    batch = fsdp2_linear_kl.collate(fsdp2_linear_kl.random_examples(2))
    with CommDebugMode() as counted:
        model(**batch).backward()
    return {str(op).rpartition(".")[2]: n for op, n in counted.get_comm_counts().items()}


def refused() -> str:
    """The head read from outside."""
    model = fsdp2_linear_kl.Distillation(*fsdp2_models())
    fsdp2_linear_kl.shard(model)
    head, hidden = model.student.lm_head.weight, torch.zeros(3, 32, dtype=torch.float64)
    with pytest.raises(TypeError, match="DTensor") as raised:
        linear_kl(hidden, head, hidden, head.detach())
    return str(raised.value)


def _on_two_ranks(output: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        fsdp2_linear_kl.main()
    dist.init_process_group("gloo")
    result = {
        "printed": printed.getvalue(),
        "fsdp2": {size: fsdp2_step(size) for size in (3, 1)},
        "collectives": collectives(),
        "refused": refused(),
    }
    dist.destroy_process_group()
    if HAS_TRL:
        for name, cut in {"ddp": {"per_device_train_batch_size": 2}, "accumulated": {}}.items():
            if name == "accumulated":
                cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
            result[name] = trained(trl_trainer(output, **cut))
    return result


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(_on_two_ranks, str(tmp_path_factory.mktemp("ranks")))


def test_fsdp2_equals_one_process(two_ranks, capsys):
    expected = plain_kl(*fsdp2_models(), fsdp2_linear_kl.random_examples(6), vocab_size=fsdp2_linear_kl.VOCABULARY)
    for result in two_ranks:
        for step in result["fsdp2"].values():
            assert_same(step, expected)
    fsdp2_linear_kl.main()
    assert two_ranks[0]["printed"] == capsys.readouterr().out
    assert two_ranks[1]["printed"] == ""


def test_fsdp2_gathers_heads_once(two_ranks):
    for result in two_ranks:
        print(result["collectives"], result["refused"])


@needs_trl
def test_trl_under_ddp(two_ranks):
    for result in two_ranks:
        for name in ("ddp", "accumulated"):
            assert_same(result[name], trl_expected())
