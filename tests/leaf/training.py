"""A tiny pair, groups, and what LeafTrainer makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from leaf.config import RunConfig
from leaf.run import Run
from leaf.teacher import TeacherCache
from leaf.teacher_build import build_cache
from leaf.trainer import LeafArguments, LeafTrainer

VOCAB = 24


def model(seed: int, hidden: int = 16, vocab: int = VOCAB) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,  # peaked outputs: a wrong weight shows
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()


def groups(n: int = 7) -> list[dict[str, Any]]:
    """Of different sizes, with 0 to 3 counterfactuals; the third and fourth have none (a whole rank's share below)."""
    g = torch.Generator().manual_seed(0)
    result = []
    for i in range(n):
        prompt = torch.randint(1, VOCAB, (6 + i % 4,), generator=g).tolist()
        response = torch.randint(1, VOCAB, (2 + i % 3,), generator=g).tolist()
        counterfactuals = [
            {"input_ids": prompt[:c] + prompt[c + 2 :] + response, "response_start": len(prompt) - 2}
            for c in range(1, 1 + (0 if i in (2, 3) else 1 + i % 3))
        ]
        original = {"input_ids": prompt + response, "response_start": len(prompt)}
        result.append({"id": str(i), "original": original, "counterfactuals": counterfactuals})
    return result


class Stream(IterableDataset):
    def __iter__(self):
        return iter(groups())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded over the ranks. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Gradients(TrainerCallback):
    """What the optimizer would see at every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wrapper = re.compile(r"module\.|_checkpoint_wrapped_|_orig_mod\.")
        self.steps.append({wrapper.sub("", name): whole(p.grad).clone() for name, p in trained.items()})


def arguments(output: Path | str, **overrides: Any) -> LeafArguments:
    options = {
        "output_dir": str(output),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "counterfactuals_per_sample": "all",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        **overrides,
    }
    return LeafArguments(**options)


def train(
    output: Path | str, data: Any = None, teacher: Any = None, **overrides: Any
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses and gradients of every step at learning rate 0."""
    gradients = Gradients()
    trainer = LeafTrainer(
        model(0),
        teacher or model(1, hidden=32),
        arguments(output, **overrides),
        data or groups(),
        callbacks=[gradients],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], gradients.steps


def cached(folder: Path, data: list[dict[str, Any]], mode: str = "cached_hidden") -> TeacherCache:
    """The answers of `train`'s teacher, as `leaf cache` stores them."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    for role, each in {"teacher": model(1, hidden=32), "student": model(0)}.items():
        each.save_pretrained(folder / role)
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder / role)
    options = {name: str(folder / name) for name in ("teacher", "student", "output")}
    options |= {"teacher_mode": mode, "device": "cpu", "cache_topk": VOCAB, "chat_template": "none"}
    build_cache(Run(RunConfig.from_mapping(options)), data)
    return TeacherCache(folder / "output" / "cache")


def plain_e7(batch: list[dict[str, Any]], lambda_: float = 0.5) -> tuple[float, dict[str, torch.Tensor]]:
    """E7 from its definition: one forward per sequence, full logits, no packs."""
    student, teacher = model(0), model(1, hidden=32)

    def kl(member: dict[str, Any]) -> torch.Tensor:
        ids = torch.tensor(member["input_ids"])
        rows = slice(member["response_start"] - 1, len(ids) - 1)
        p, q = (F.log_softmax(m(input_ids=ids[None]).logits[0, rows], -1) for m in (teacher, student))
        return F.kl_div(q, p.detach(), reduction="none", log_target=True).sum(-1)

    original = torch.cat([kl(g["original"]) for g in batch])
    counterfactual = [kl(c) / len(g["counterfactuals"]) for g in batch for c in g["counterfactuals"]]
    n_c = sum(
        (len(g["original"]["input_ids"]) - g["original"]["response_start"]) for g in batch if g["counterfactuals"]
    )
    loss = original.mean() if not counterfactual else lambda_ * original.mean()
    if counterfactual:
        loss = loss + (1 - lambda_) * torch.cat(counterfactual).sum() / n_c
    names, params = zip(*student.named_parameters())
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, params)))


def assert_same(actual, expected):
    # transformers computes RMSNorm and softmax in fp32 even in fp64 models
    torch.testing.assert_close(torch.tensor(actual[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-7)
    assert len(actual[1]) == len(expected[1])
    for a, b in zip(actual[1], expected[1]):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
