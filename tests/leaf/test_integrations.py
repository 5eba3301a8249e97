"""The examples for other trainers: losses and gradients are those of plain formulas, however a step is cut."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import on_ranks
from test_export import tables
from torch.utils._python_dispatch import TorchDispatchMode
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
from leaf.export import export
from leaf_kernels import SharedPrefixLayout, linear_kl
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


def run_block(word: str, folder: Path, **names: Any) -> dict[str, Any]:
    """Runs the block of docs/integrations.md that has this word in it, in `folder`, and returns its names.

    On CPUs TRL must be told that it has no GPU; it keeps its default, bf16 by autocast.
    """
    page = Path(__file__).parents[2] / "docs" / "integrations.md"
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if word in code]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if HAS_TRL:
            trl = importlib.import_module("trl")
            patch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, use_cpu=True))
        exec(compile(block, page.name, "exec"), names)
    return names


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


# -- linear_kl in TRL's SFTTrainer -------------------------------------------------------------------------------------


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
    chunks = mock.patch("leaf_kernels.ops.linear_kl.op.default_chunk_rows", return_value=3)
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


@needs_trl
def test_trl_block_of_the_page_runs(tmp_path):
    trl_linear_kl = importlib.import_module("examples.trl_linear_kl")
    student, teacher = (model.float() for model in trl_models())
    tokenizer, dataset = trl_linear_kl.tokenizer(), trl_linear_kl.rows()
    run_block("LinearKLTrainer", tmp_path, student=student, teacher=teacher, tokenizer=tokenizer, dataset=dataset)


# -- linear_kl under FSDP2 ---------------------------------------------------------------------------------------------


def fsdp2_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    make, vocabulary = fsdp2_linear_kl.small_llama, fsdp2_linear_kl.VOCABULARY
    return make(0, 32, vocabulary).double(), make(1, 64, vocabulary + 24).double()


def fsdp2_step(size: int) -> tuple[float, Gradients]:
    """Of this rank's share of six examples, `size` of them to a micro-batch; whole gradients."""
    model = fsdp2_linear_kl.Distillation(*fsdp2_models())
    fsdp2_linear_kl.shard(model)
    share = fsdp2_linear_kl.random_examples(6)[dist.get_rank() :: dist.get_world_size()]
    batches = [fsdp2_linear_kl.collate(share[n : n + size]) for n in range(0, len(share), size)]
    loss = fsdp2_linear_kl.backward(model, batches).item()
    assert all(p.grad is None for p in model.teacher.parameters())
    return loss, {name: p.grad.full_tensor() for name, p in model.student.named_parameters()}


class Gathered(TorchDispatchMode):
    """Elements of everything that was gathered."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._allgather_base_.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def fsdp2_gathers() -> list[int]:
    """Of one micro-batch, forward and backward; and a head that is read from outside is refused."""
    model = fsdp2_linear_kl.Distillation(*fsdp2_models())
    fsdp2_linear_kl.shard(model)
    head, hidden = model.student.lm_head.weight, torch.zeros(3, 32, dtype=torch.float64)
    with pytest.raises(TypeError, match="student_weight is a DTensor"):
        linear_kl(hidden, head, hidden, head.detach())
    with Gathered() as gathered:
        model(**fsdp2_linear_kl.collate(fsdp2_linear_kl.random_examples(2))).backward()
    return gathered.sizes


def _on_two_ranks(output: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        fsdp2_linear_kl.train("cpu")
    result = {
        "printed": printed.getvalue(),
        "fsdp2": [fsdp2_step(micro_batch) for micro_batch in (3, 1)],
        "gathers": fsdp2_gathers(),
    }
    if HAS_TRL:
        cuts = (
            {"per_device_train_batch_size": 2},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        )
        result["ddp"] = [trained(trl_trainer(output, **cut)) for cut in cuts]
    dist.destroy_process_group()
    return result


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(_on_two_ranks, str(tmp_path_factory.mktemp("ranks")))


def test_fsdp2_equals_one_process(two_ranks, capsys):
    expected = plain_kl(*fsdp2_models(), fsdp2_linear_kl.random_examples(6), vocab_size=fsdp2_linear_kl.VOCABULARY)
    for result in two_ranks:
        for step in result["fsdp2"]:
            assert_same(step, expected)
    fsdp2_linear_kl.main()
    alone, together = (
        [float(line.split()[-1]) for line in printed.splitlines()]
        for printed in (capsys.readouterr().out, two_ranks[0]["printed"])
    )
    assert together == pytest.approx(alone, abs=2e-4)
    assert alone[4] < 0.8 * alone[0]


def test_fsdp2_gathers_heads_once(two_ranks):
    """And embeddings, in forward and backward together; a student's layer twice."""
    for result in two_ranks:
        heads, layer = max(result["gathers"]), min(result["gathers"])
        assert result["gathers"].count(heads) == 1
        assert result["gathers"].count(layer) == 4


@needs_trl
def test_trl_under_ddp(two_ranks):
    for result in two_ranks:
        for step in result["ddp"]:
            assert_same(step, trl_expected())


# -- padding-free batches on leaf's attention --------------------------------------------------------------------------


def masked_prompts() -> list[dict[str, list[int]]]:
    """A third of each sequence is a prompt; the first one is a single token, which has nothing to predict."""
    sequences = [[7], *padding_free.random_sequences(3)]
    return [{"input_ids": s, "labels": [-100] * (len(s) // 3) + s[len(s) // 3 :]} for s in sequences]


def padding_free_expected(data: list[dict[str, list[int]]]) -> tuple[float, Gradients]:
    """One forward per sequence, its own attention, labels shifted here."""
    model = padding_free.small_llama().double()
    losses = []
    for row in data:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row.get("labels", row["input_ids"]))[1:]
        losses.append(F.cross_entropy(logits, labels, reduction="none")[labels != -100])
    return gradients_of(model, torch.cat(losses).mean())


@pytest.mark.parametrize("data", [masked_prompts(), [{"input_ids": s} for s in padding_free.random_sequences(4)]])
@pytest.mark.parametrize("cut", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}])
def test_padding_free_equals_separate_sequences(data, cut, tmp_path):
    args = TrainingArguments(str(tmp_path), **{**OPTIONS, **cut})
    model = padding_free.small_llama().double()
    assert_same(
        trained(padding_free.PaddingFreeTrainer(model, args=args, train_dataset=data)), padding_free_expected(data)
    )


def test_padding_free_in_a_plain_trainer(tmp_path):
    model = padding_free.small_llama().double()
    padding_free.register()
    model.set_attn_implementation("leaf")
    collator = padding_free.with_layout(DataCollatorWithFlattening())
    args = TrainingArguments(str(tmp_path), **OPTIONS)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=masked_prompts())
    assert_same(trained(trainer), padding_free_expected(masked_prompts()))


def test_padding_free_example_notices_a_wrong_layout(capsys, monkeypatch):
    padding_free.main()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "236 tokens in the pack, 432 in a padded batch"
    assert last.startswith("cross-entropy per token: ")
    one_sequence = SharedPrefixLayout.from_lengths([236])
    monkeypatch.setattr(padding_free.SharedPrefixLayout, "from_lengths", lambda lengths: one_sequence)
    with pytest.raises(SystemExit, match="the pack and the sequences alone differ"):
        padding_free.main()


def test_padding_free_blocks_of_the_page_run(tmp_path):
    model = padding_free.small_llama()
    alone = [model.base_model(torch.tensor([s])).last_hidden_state[0] for s in ([1, 5, 6, 2], [1, 7, 2])]
    names = run_block("from_lengths", tmp_path, model=model)
    for packed, hidden in zip(names["hidden"], alone):
        torch.testing.assert_close(packed, hidden, rtol=1e-4, atol=1e-5)
    run_block("DataCollatorWithFlattening", tmp_path, model=model, sequences=names["sequences"])


# -- counterfactual rows in TRL ----------------------------------------------------------------------------------------


@needs_trl
@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_exported_rows_train_in_trl(template: str, tmp_path):
    """As docs/integrations.md does it. The ids are LeaF's own, the labels are the completion's and nothing else."""
    rows, scores, counterfactuals = tables(template)
    (tmp_path / "run").mkdir()
    export(tmp_path / "run" / "export", "trl", rows, scores, counterfactuals)
    tokenizer = tiny.tokenizer(template)
    add_bos = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    tokenizer._tokenizer.post_processor = (
        add_bos  # as Llama 3's: text that has a beginning already would get a second one
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    student = tiny.model(tokenizer)
    before = student.lm_head.weight.clone()
    names = run_block("load_dataset(", tmp_path, student=student, tokenizer=tokenizer)

    originals = [s for s in scores if s["level"] == "instruction"]
    dataset = names["trainer"].train_dataset
    assert len(dataset) == len(originals) + len(counterfactuals)
    for row, sample in zip(dataset, originals):
        assert row["input_ids"] == sample["input_ids"]
    for row, counterfactual in zip(list(dataset)[len(originals) :], counterfactuals):
        cut = row["labels"].count(-100)
        assert row["labels"] == [-100] * cut + row["input_ids"][cut:]
        assert tokenizer.decode(row["input_ids"][:cut]) == counterfactual["prompt"]
        assert tokenizer.decode(row["input_ids"][cut:]) == counterfactual["response"]
        assert row["input_ids"][-1] == tokenizer.eos_token_id != row["input_ids"][-2]
    assert names["trainer"].state.global_step == 2
    assert not torch.equal(student.lm_head.weight, before)
