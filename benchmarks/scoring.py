"""Scoring on a CPU: peak memory and time against the released procedure and a naive lean loop; memory against length.

    python -m benchmarks.scoring                # 5 interleaved rounds of whole processes: results/scoring_cpu.json
    python -m benchmarks.scoring --memory       # 1k to 64k tokens, a quarter of an hour: results/scoring_memory.json

Long rows and a model of 8B on a GPU: benchmarks/scoring_gpu.py.

Two random Llamas of 67M and 97M parameters (2 layers, V = 32000, fp32) and four rows of 2400 tokens, of which 400 are the
response. Every arm is a process of its own that loads the models from disk; memory is its high-water mark (VmHWM) and time
is that from the first import's end to the last norm, models loaded included. Every arm's norms must be the same.

- released: the authors' procedure with its one-line repair (`retain_grad`). Both models resident, one row at a time, logits
  of every position, a backward that makes gradients of the parameters and never clears them.
- lean: what one writes by hand. One model at a time, frozen, one row at a time, the head on response rows only.
- ours: `leaf.score.sensitivities`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.timing import RESULTS, environment, write_json
from leaf.data import Sample, Skip
from leaf.sensitivity import sensitivities
from leaf_kernels.ops.linear_kl import op as linear_kl
from leaf_kernels.testing import record_peak_bytes

ROUNDS = 5
ROWS, PROMPT, RESPONSE, VOCABULARY = 4, 2000, 400, 32000
SIZES = {"teacher": (1024, 3712, 16), "student": (768, 2816, 12)}  # hidden, intermediate, heads

Norms = Iterator[torch.Tensor]  # [tokens] of a row


def make_models(folder: Path) -> None:
    for seed, (role, (hidden, intermediate, heads)) in enumerate(SIZES.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=PROMPT + RESPONSE,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / role)


def samples() -> list[Sample]:
    n = PROMPT + RESPONSE
    ids = torch.randint(VOCABULARY, (ROWS, n), generator=torch.Generator().manual_seed(0)).tolist()
    scored = [i < PROMPT for i in range(n)]
    offsets = [(i, i + 1) for i in range(n)]
    return [Sample(str(i), "instruction", 0, "x" * n, PROMPT, ids[i], offsets, PROMPT, scored) for i in range(ROWS)]


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def released(folder: Path) -> Iterator[Norms]:
    models = [load(folder / role).eval() for role in SIZES]

    def norms(model: PreTrainedModel) -> Norms:
        for sample in samples():
            input_ids = torch.tensor([sample.input_ids])
            embeddings = model.get_input_embeddings()(input_ids)
            embeddings.retain_grad()
            labels = input_ids.clone()
            labels[:, : sample.response_start] = -100
            model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss.backward()
            yield embeddings.grad[0].norm(dim=-1)

    return map(norms, models)


def lean(folder: Path) -> Iterator[Norms]:
    def norms(role: str) -> Norms:
        model = load(folder / role).eval().requires_grad_(False)
        for sample in samples():
            input_ids, start = torch.tensor([sample.input_ids]), sample.response_start
            embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
            hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, start - 1 : -1]
            loss = F.cross_entropy(model.lm_head(hidden), input_ids[0, start:])
            (gradient,) = torch.autograd.grad(loss, embeddings)
            yield gradient[0].norm(dim=-1)

    return map(norms, SIZES)


def ours(folder: Path) -> Iterator[Norms]:
    def norms(role: str) -> Norms:
        model = load(folder / role)
        for one in sensitivities(model, samples(), max_tokens=PROMPT + RESPONSE):
            yield one.norm
        assert all(p.grad is None for p in model.parameters())

    return map(norms, SIZES)


ARMS: dict[str, Callable[[Path], Iterator[Norms]]] = {arm.__name__: arm for arm in (released, lean, ours)}


def worker(arm: str, folder: Path, result: Path) -> None:
    imported = peak_mib()
    start, cpu_start = time.perf_counter(), time.process_time()
    norms = [norm for model in ARMS[arm](folder) for norm in model]
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    torch.save({"norms": norms, **times, "mib": peak_mib(), "imported_mib": imported}, result)


def peak_mib() -> float:
    """The most memory that this process ever had (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(arm: str, folder: Path) -> dict[str, float | torch.Tensor]:
    result = folder / f"{arm}.pt"
    subprocess.run([sys.executable, "-m", "benchmarks.scoring", "--worker", arm, str(folder), str(result)], check=True)
    return torch.load(result)


def compare() -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder)
        rounds = []
        for _ in range(ROUNDS):
            rounds.append({arm: measure(arm, folder) for arm in ARMS})
            expected = rounds[-1]["released"]["norms"]
            for arm in ARMS:
                torch.testing.assert_close(rounds[-1][arm].pop("norms"), expected, rtol=1e-4, atol=0)
            print({arm: {k: round(v, 1) for k, v in m.items()} for arm, m in rounds[-1].items()}, file=sys.stderr)
    medians = {
        arm: {name: statistics.median(each[arm][name] for each in rounds) for name in rounds[0][arm]} for arm in ARMS
    }
    ratios = {
        arm: {name: medians[arm][name] / medians["released"][name] for name in ("mib", "seconds", "cpu_seconds")}
        for arm in ARMS
    }
    return {"environment": environment(torch.device("cpu")), "medians": medians, "ratios": ratios, "rounds": rounds}


# -- memory against length ---------------------------------------------------------------------------------------------

LENGTHS = tuple(2**n for n in range(10, 17))
LAYERS, HIDDEN, ANSWER = 4, 64, 128
RELEASED_UP_TO = 16384  # its logits, their softmax and gradient: 6 GiB


def one_row(tokens: int) -> Sample:
    ids = torch.randint(300, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = tokens - ANSWER
    scored, offsets = [i < prompt for i in range(tokens)], [(i, i + 1) for i in range(tokens)]
    return Sample("0", "instruction", 0, "x" * tokens, prompt, ids, offsets, prompt, scored)


def peak_of(arm: Callable[[PreTrainedModel, Sample], object], tokens: int, layers: int = LAYERS) -> int:
    """Most bytes of live tensors while one row is scored; weights and the gradients that stay on them are not counted."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=LENGTHS[-1],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    row, own = one_row(tokens), linear_kl._topk
    linear_kl._topk = linear_kl.topk  # the recorder does not see inside an operator
    try:
        with record_peak_bytes() as peak:
            arm(model, row)
    finally:
        linear_kl._topk = own
    return peak[0]


def score_released(model: PreTrainedModel, row: Sample) -> torch.Tensor:
    input_ids = torch.tensor([row.input_ids], device=model.device)
    labels = input_ids.clone()
    labels[:, : row.response_start] = -100
    embeddings = model.get_input_embeddings()(input_ids)
    embeddings.retain_grad()
    model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss.backward()
    return embeddings.grad[0].norm(dim=-1).cpu()


def score_ours(model: PreTrainedModel, row: Sample) -> torch.Tensor:
    (result,) = sensitivities(model, [row], max_tokens=1, activation_checkpointing=True)
    if isinstance(result, Skip):
        raise torch.OutOfMemoryError(result.detail)
    return result.norm


def memory() -> dict:
    rows = []
    for tokens in LENGTHS:
        start = time.perf_counter()
        row = {"tokens": tokens, "ours": peak_of(score_ours, tokens), "seconds": time.perf_counter() - start}
        if tokens <= RELEASED_UP_TO:
            row["released"] = peak_of(score_released, tokens)
        rows.append(row)
        print(row, file=sys.stderr)
    checkpoints = (LAYERS - 1) * HIDDEN * 4  # bytes per token; the last layer has none
    slope = (rows[-1]["ours"] - rows[-2]["ours"]) / (LENGTHS[-1] - LENGTHS[-2])
    return {
        "environment": environment(torch.device("cpu")),
        "model": {"layers": LAYERS, "hidden": HIDDEN, "vocabulary": VOCABULARY, "response": ANSWER},
        "checkpoint_bytes_per_token": checkpoints,
        "bytes_per_token": slope,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help="memory against length")
    arguments = parser.parse_args()
    if arguments.worker:
        arm, folder, result = arguments.worker
        worker(arm, Path(folder), Path(result))
        return
    if arguments.memory:
        write_json(RESULTS / "scoring_memory.json", memory())
        return
    result = compare()
    write_json(RESULTS / "scoring_cpu.json", result)
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    main()
