"""What LeafTrainer logs: exact means over the logging interval, whatever the packs, the accumulation and the ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from test_trainer import arguments, groups, model
from transformers import TrainerCallback

from leaf import metrics
from leaf.pack import Collator, deletions
from leaf.trainer import LeafTrainer
from leaf_kernels import SharedPrefixLayout

MEANS = ("kl/original", "kl/counterfactual", "pruned_fraction")


class Logs(TrainerCallback):
    """What a tracker is given at every log of the training loss."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.entries.append({**logs, "step": state.global_step})


def logs_of(output: Any, data: Any = None, callbacks: Any = (), **overrides: Any) -> list[dict[str, Any]]:
    seen = Logs()
    options = {"logging_steps": 2, **overrides}
    LeafTrainer(
        model(0), model(1, hidden=32), arguments(output, **options), data or groups(), callbacks=[seen, *callbacks]
    ).train()
    return seen.entries


def plain_means(data: list[dict[str, Any]]) -> dict[str, float]:
    """By the definitions, one forward per sequence."""
    student, teacher = model(0), model(1, hidden=32)

    @torch.no_grad()
    def kl(member: dict[str, Any]) -> tuple[float, int]:
        ids = torch.tensor(member["input_ids"])
        rows = slice(member["response_start"] - 1, len(ids) - 1)
        p, q = (F.log_softmax(m(input_ids=ids[None]).logits[0, rows], -1) for m in (teacher, student))
        return F.kl_div(q, p, reduction="sum", log_target=True).item(), len(ids) - member["response_start"]

    original = [kl(g["original"]) for g in data]
    shares = [(kl(c), 1 / len(g["counterfactuals"])) for g in data for c in g["counterfactuals"]]
    prompts = [(g["original"]["response_start"], c["response_start"]) for g in data for c in g["counterfactuals"]]
    return {
        "kl/original": sum(s for s, _ in original) / sum(n for _, n in original),
        "kl/counterfactual": sum(u * s for (s, _), u in shares) / sum(u * n for (_, n), u in shares),
        "pruned_fraction": sum(a - b for a, b in prompts) / sum(a for a, _ in prompts),
    }


CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "small packs": {"max_tokens": 20},
}


@pytest.mark.parametrize("cut", CUTS)
def test_means_are_those_of_the_definition(cut: str, tmp_path):
    """Two steps, of 4 and of 3 groups, in one log; the learning rate is 0."""
    (entry,) = logs_of(tmp_path, **CUTS[cut])
    expected = plain_means(groups())
    assert {name: entry[name] for name in MEANS} == pytest.approx({name: expected[name] for name in MEANS}, rel=1e-5)


def test_every_log_is_of_its_own_steps(tmp_path):
    first, second = logs_of(tmp_path, logging_steps=1)
    for entry, data in ((first, groups()[:4]), (second, groups()[4:])):
        assert {name: entry[name] for name in MEANS} == pytest.approx(plain_means(data), rel=1e-5)
        assert entry["loss"] == pytest.approx((entry["kl/original"] + entry["kl/counterfactual"]) / 2, rel=1e-5)


def test_a_mean_over_nothing_is_left_out(tmp_path):
    (entry,) = logs_of(tmp_path, [{**g, "counterfactuals": []} for g in groups(4)], logging_steps=1)
    assert {"kl/original", "tokens_per_second", "peak_memory_gib"} < entry.keys()
    assert not {"kl/counterfactual", "pruned_fraction"} & entry.keys()


def test_a_resumed_run_logs_what_the_whole_run_logged(tmp_path):
    """Stopped at step 3, between two logs: its first log has step 4 alone, as that of the loss has."""
    options: dict[str, Any] = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "num_train_epochs": 2}
    whole = logs_of(tmp_path, save_strategy="steps", save_steps=3, **options)
    single = logs_of(tmp_path / "single", **{**options, "logging_steps": 1})
    seen = Logs()
    args = arguments(tmp_path, logging_steps=2, **options)
    trainer = LeafTrainer(model(0), model(1, hidden=32), args, groups(), callbacks=[seen])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [entry["step"] for entry in seen.entries] == [4, 6, 8]
    for entry, expected in zip(seen.entries, [single[3], *whole[2:]]):
        assert entry["step"] == expected["step"]
        assert {n: entry[n] for n in MEANS} == pytest.approx({n: expected[n] for n in MEANS}, rel=1e-9)


class Clock(TrainerCallback):
    """A step takes 2 seconds, an evaluation 100, a checkpoint 1000."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_step_end(self, *_, **__):
        self.now += 2

    def on_evaluate(self, *_, **__):
        self.now += 100


def test_tokens_per_second_are_of_the_training(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    slow_save = LeafTrainer._save

    def save(self, *args, **kwargs):
        clock.now += 1000
        return slow_save(self, *args, **kwargs)

    monkeypatch.setattr(LeafTrainer, "_save", save)
    seen = Logs()
    often = {"logging_steps": 2, "eval_steps": 1, "save_steps": 1, "eval_strategy": "steps", "save_strategy": "steps"}
    args = arguments(tmp_path, num_train_epochs=2, **often)
    trainer = LeafTrainer(model(0), model(1, hidden=32), args, groups(), groups(2), callbacks=[seen, clock])
    trainer.train()
    sequences = [[g["original"]["input_ids"], *(c["input_ids"] for c in g["counterfactuals"])] for g in groups()]
    tokens = SharedPrefixLayout.from_groups(sequences)[0].num_tokens
    assert [entry["tokens_per_second"] for entry in seen.entries] == pytest.approx([tokens / 4] * 2)
    assert clock.now > 4000


def test_pauses_nest(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    interval = metrics.Interval(Accelerator(cpu=True))
    with interval.paused():
        clock.now += 1
        with interval.paused():
            clock.now += 10
    clock.now += 3
    assert clock.now - interval.since == 3


def test_peak_memory_of_a_process_is_what_the_kernel_says():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc here to compare with")
    peak = metrics.peak_memory(torch.device("cpu"))
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert peak == pytest.approx(int(kib) * 1024, rel=0.01)


def test_deletions_are_counted_in_front_of_the_target_at_both_levels():
    """Prompt 1 2 3 4, response 5 6 7: one deletes 2 of the prompt, one, cut before 7, two of 1 2 3 4 5 6."""
    group = {
        "id": "0",
        "original": {"input_ids": [1, 2, 3, 4, 5, 6, 7], "response_start": 4},
        "counterfactuals": [
            {"input_ids": [1, 3, 4, 5, 6, 7], "response_start": 3},
            {"input_ids": [1, 2, 3, 6, 7], "response_start": 4},
        ],
    }
    alone = {**group, "original": None}
    assert deletions([group, alone]) == {"deleted": 3, "deletable": 10}
    (pack,) = Collator(100)([group])["packs"]
    assert (pack["deleted"], pack["deletable"]) == (3, 10)
