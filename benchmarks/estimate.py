"""`leaf.estimate` against measured peaks, on a CPU: every case in a process of its own, with random weights in fp32.

    python -m benchmarks.estimate               # a few minutes: results/estimate_cpu.json

Measured: the high-water mark of the process (VmHWM), from its models on, above what it held after its imports. The
prediction must be within 15 % of it. glibc is told to give blocks back that are freed, as `leaf` tells it; weights are made
in memory, not mapped from a file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from benchmarks.timing import RESULTS, environment, write_json
from leaf.devices import device_named
from leaf.estimate import Estimator, Stage, Workload, counterfactual_groups, half_response
from leaf.generate import _batch
from leaf.sensitivity import Scorer
from leaf.trainer import LeafArguments, LeafTrainer

WITHIN = 0.15
VOCABULARY = 32000


class Case(NamedTuple):
    stage: str  # a method of Estimator
    teacher: PreTrainedConfig
    student: PreTrainedConfig
    length: int
    max_tokens: int
    max_new_tokens: int = 8
    checkpointing: bool = False


def llama(hidden: int, layers: int, heads: int, key_heads: int, vocabulary: int = VOCABULARY) -> LlamaConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    kinds = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "max_position_embeddings": 16384}
    return LlamaConfig(vocab_size=vocabulary, **sizes, **kinds)


def qwen(hidden: int, layers: int, heads: int, vocabulary: int) -> Qwen2Config:
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 4, "num_hidden_layers": layers}
    kinds = {"num_attention_heads": heads, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return Qwen2Config(vocab_size=vocabulary, **sizes, **kinds)


SMALL = llama(512, 2, 8, 8, 64000)
CASES = {
    "distil, Llama 1024 x 2 to 512 x 2, a group of 512": Case(
        "distillation", llama(1024, 2, 16, 8, 64000), SMALL, 512, 768
    ),
    "distil with checkpoints, Qwen2 768 x 2 to Llama 512 x 2": Case(
        "distillation", qwen(768, 2, 12, 64000), SMALL, 512, 768, checkpointing=True
    ),
    "generate, Llama 2048 x 2, 2 prompts of 1016": Case("generation", llama(2048, 2, 16, 16), SMALL, 1016, 2048),
    "generate, Qwen2 1024 x 2, 4 prompts of 504": Case("generation", qwen(1024, 2, 16, 151936), SMALL, 504, 2048),
    "score, Llama 2048 x 4, a row of 1024": Case("scoring", llama(2048, 4, 16, 16), SMALL, 1024, 1024),
    "score, Llama 1024 x 2, 2 rows of 1024": Case("scoring", llama(1024, 2, 16, 4, 128000), SMALL, 1024, 2048),
    "score, Qwen2 1024 x 4, 4 rows of 512": Case("scoring", qwen(1024, 4, 16, 151936), SMALL, 512, 2048),
    "score, Llama 1024 x 2, a row of 8192": Case("scoring", llama(1024, 2, 16, 4), SMALL, 8192, 8192),
}


def predict(case: Case) -> Stage:
    workload = Workload.plain(case.length, case.max_tokens)
    sizes = {"max_tokens": case.max_tokens, "max_new_tokens": case.max_new_tokens}
    estimator = Estimator(case.teacher, case.student, workload, device_named("cpu"), torch.float32, **sizes)
    return getattr(estimator, case.stage)(case.checkpointing if case.stage == "distillation" else "teacher")


def made(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model. The high-water mark starts again: a tied head exists twice until it is tied, which loading avoids."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    Path("/proc/self/clear_refs").write_text("5")
    return model


def scoring(case: Case) -> None:
    count = max(1, case.max_tokens // case.length)
    scorer = Scorer(made(case.teacher))
    scorer([half_response(case.length, VOCABULARY, n) for n in range(count)])


def generation(case: Case) -> None:
    model = made(case.teacher).eval()
    count = max(1, case.max_tokens // (case.length + case.max_new_tokens))
    # One prompt is shorter, so that the batch is padded. No end of sequence: all new tokens are made.
    prompts = [[7] * (case.length - (n == 1)) for n in range(count)]
    settings = GenerationConfig(max_new_tokens=case.max_new_tokens, do_sample=False, pad_token_id=0)
    model.generation_config.eos_token_id = None
    _batch(model, prompts, settings)


def distillation(case: Case) -> None:
    groups = counterfactual_groups(case.length, VOCABULARY, max(1, case.max_tokens // (case.length * 3 // 2)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = LeafArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=2,  # the second one finds AdamW's states
            per_device_train_batch_size=2 * len(groups),  # of two packs: the second one finds gradients
            max_tokens=case.max_tokens,
            gradient_checkpointing=case.checkpointing,
            save_strategy="no",
            disable_tqdm=True,
        )
        LeafTrainer(made(case.student), made(case.teacher), arguments, train_dataset=groups * 4).train()


MEASURED: dict[str, Callable[[Case], None]] = {f.__name__: f for f in (scoring, generation, distillation)}


def memory_bytes(what: str) -> int:
    """Of this process: VmRSS is what it holds, VmHWM the most it ever held (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


def worker(name: str) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    imported = memory_bytes("VmRSS")
    MEASURED[CASES[name].stage](CASES[name])
    print(json.dumps(memory_bytes("VmHWM") - imported))


def compare(names: list[str]) -> dict[str, Any]:
    cases = {}
    for name in names:
        stage = predict(CASES[name])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.estimate", "--worker", name],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        measured = int(done.stdout.splitlines()[-1])
        case = {"stage": stage.name, "measured_mib": measured / 2**20, "predicted_mib": stage.peak / 2**20}
        case["error"] = stage.peak / measured - 1
        cases[name] = case
        print(name, {k: round(v, 3) for k, v in case.items() if k != "stage"}, file=sys.stderr)
    return {"environment": environment(torch.device("cpu")), "within": WITHIN, "cases": cases}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="some of the cases; nothing is written")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return 0
    result = compare(arguments.cases or list(CASES))
    if not arguments.cases:
        write_json(RESULTS / "estimate_cpu.json", result)
    errors = {name: case["error"] for name, case in result["cases"].items()}
    print(json.dumps(errors, indent=1))
    return int(any(abs(error) > WITHIN for error in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
