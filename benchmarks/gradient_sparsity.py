"""How many vocabulary entries hold linear_kl's logit gradient: would a sparse one be worth building? A CPU is enough:

    python -m benchmarks.gradient_sparsity --data DIR     # ten minutes on two cores; DIR/gsm8k/{train,test}.jsonl

K(δ) of a row is the smallest number of entries of p_student − p_teacher such that the others have at most δ of its L1 norm.
A sparse gradient is worth building if the median of K(0.01) is at most 256 with a vocabulary of 32k or more. Measured on the
response rows of held-out samples, before, midway and after distilling with `linear_kl`. Writes
results/gradient_sparsity.json.

What this can say is limited. No pretrained model is used: teacher and student are tiny, trained here for minutes on GSM8K
alone, and less sure of the next token than real ones, so their gradients are wider. Read the third of the rows where the
teacher has the least entropy beside the whole. The text is too small for 32k merges of byte-level BPE: the rest of the
vocabulary are entries that no text uses (`vocabulary` in the file says how many), as in padded embeddings.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.timing import RESULTS, environment, write_json
from leaf.data import Encoder, Sample
from leaf_kernels import linear_cross_entropy, linear_kl

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "leaf"))  # the rows and tiny models are those of the tests

import gsm8k  # noqa: E402 - found by the line above
import tiny  # noqa: E402

DELTAS = (1e-1, 1e-2, 1e-3)
LIMIT, LIMIT_DELTA = 256, 1e-2  # of the median
THREADS = 2
CHUNK = 256  # rows whose logits are held at a time


class Settings(NamedTuple):
    """Models, and how long they are trained; batches are in samples."""

    vocab_size: int = 32768
    teacher_hidden: int = 192
    teacher_layers: int = 4
    student_hidden: int = 96
    student_layers: int = 2
    batch_size: int = 12
    teacher_steps: int = 300
    student_steps: int = 80
    distillation_steps: int = 100
    learning_rate: float = 3e-3
    held_out_rows: int = 6000  # at least: samples are taken whole
    seed: int = 0


# -- what is measured --------------------------------------------------------------------------------------------------


def entries_needed(gradient: torch.Tensor, deltas: Sequence[float] = DELTAS) -> torch.Tensor:
    """K(δ) of every row: the fewest entries such that the others have at most δ of the row's L1 norm.

    gradient: [N, V]. Returns [len(deltas), N] int64; 0 for a row of zeros.
    """
    # Sums of the smallest: summed from the largest, what is dropped would be a difference of nearly equal numbers
    dropped = gradient.abs().sort(dim=1).values.cumsum(1, dtype=torch.float64)
    most = dropped[:, -1:] * torch.tensor(deltas, dtype=torch.float64)
    return (gradient.shape[1] - torch.searchsorted(dropped, most, right=True)).T


def measure_rows(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Of every row, K(δ) of linear_kl's logit gradient p_student − p_teacher, and what says how far the models are trained.

    hidden [N, D] and weight [V, D] of each, labels [N]. Returns K [len(DELTAS), N], and teacher_entropy, kl, l1, teacher_nll
    and student_nll, each [N] (nats).
    """
    parts = []
    for chunk in torch.arange(len(labels)).split(CHUNK):
        student = (student_hidden[chunk] @ student_weight.T).log_softmax(1)
        teacher = (teacher_hidden[chunk] @ teacher_weight.T).log_softmax(1)
        p, label = teacher.exp(), labels[chunk, None]
        gradient = student.exp() - p
        part = {
            "K": entries_needed(gradient),
            "teacher_entropy": -(p * teacher).sum(1),
            "kl": (p * (teacher - student)).sum(1),
            "l1": gradient.abs().sum(1),
            "teacher_nll": -teacher.gather(1, label)[:, 0],
            "student_nll": -student.gather(1, label)[:, 0],
        }
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}


def summary(rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """`measure_rows` in numbers: quantiles of K(δ), means of the rest, and whether the median of K(0.01) is within the limit."""
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    K = rows["K"].double().quantile(quantiles, dim=1, interpolation="nearest").long().T.tolist()
    limited = rows["K"][DELTAS.index(LIMIT_DELTA)] <= LIMIT
    entropy = rows["teacher_entropy"]
    return {
        "rows": len(entropy),
        **{name: values.mean().item() for name, values in rows.items() if name != "K"},
        "teacher_entropy_range": [entropy.min().item(), entropy.max().item()],
        "K": {str(delta): dict(zip(("p10", "median", "p90"), values)) for delta, values in zip(DELTAS, K)},
        "rows_within_limit": limited.double().mean().item(),
        "within_limit": K[DELTAS.index(LIMIT_DELTA)][1] <= LIMIT,
    }


def point(name: str, steps: int, rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The summary of all rows and of their thirds by the teacher's entropy, the surest first."""
    thirds = rows["teacher_entropy"].argsort().tensor_split(3)
    terciles = [summary({name: values[..., third] for name, values in rows.items()}) for third in thirds]
    return {"point": name, "distillation_steps": steps, **summary(rows), "terciles": terciles}


# -- models ------------------------------------------------------------------------------------------------------------


def response_rows(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids [B, L], padded on the right; the N rows of [B · L] that predict a response token; its labels [N]."""
    length = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.long)  # causal: nobody sees the padding
    predicted = torch.zeros(len(samples), length, dtype=torch.bool)
    for n, sample in enumerate(samples):
        ids[n, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        predicted[n, sample.response_start : len(sample.input_ids)] = True
    rows = predicted.flatten().nonzero()[:, 0] - 1
    return ids, rows, ids.flatten()[rows + 1]


def hidden(model: PreTrainedModel, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Final hidden states [N, D] of `rows` of input_ids [B, L]."""
    return model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows]


def train(
    model: PreTrainedModel, loss: Callable[..., torch.Tensor], samples: Sequence[Sample], steps: int, settings: Settings
) -> Iterator[int]:
    """Adam, its rate decaying to zero. `loss(input_ids, rows, labels)` is a sum over rows. Yields the steps that are done."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(steps):
        chosen = torch.randint(len(samples), (settings.batch_size,), generator=generator).tolist()
        ids, rows, labels = response_rows([samples[n] for n in chosen])
        mean = loss(ids, rows, labels) / len(rows)
        optimizer.zero_grad()
        mean.backward()
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / steps)
        optimizer.step()
        if step % 20 == 0 or step + 1 == steps:
            print(f"  step {step + 1}/{steps}: {mean.item():.3f} nats", flush=True)
        yield step + 1


def measure(folder: Path, settings: Settings) -> dict[str, Any]:
    """The whole measurement on folder/gsm8k: what goes into the file, less the environment."""
    texts = [text for record in gsm8k.records(folder, "train") for text in record.values()]
    tokenizer = tiny.tokenizer(corpus=texts, vocab_size=settings.vocab_size)
    encoder = Encoder(tokenizer)

    def samples(split: str) -> list[Sample]:
        encoded = (encoder.encode(row)[0] for row in gsm8k.rows(folder, split))
        return [sample for sample in encoded if isinstance(sample, Sample)]

    def model(seed: int, width: int, layers: int) -> PreTrainedModel:
        shape = {"hidden": width, "layers": layers, "vocab_size": settings.vocab_size, "attn_implementation": "sdpa"}
        return tiny.model(tokenizer, seed=seed, tie_word_embeddings=True, **shape)

    def cross_entropy(model: PreTrainedModel) -> Callable[..., torch.Tensor]:
        return lambda ids, rows, labels: (
            linear_cross_entropy(hidden(model, ids, rows), model.lm_head.weight, labels).loss
        )

    def distillation(ids: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_hidden = hidden(teacher, ids, rows)
        return linear_kl(hidden(student, ids, rows), student_head, teacher_hidden, teacher_head).loss

    @torch.no_grad()
    def measured(name: str, steps: int) -> dict[str, Any]:
        parts = []
        for start in range(0, len(held_out), settings.batch_size):
            ids, rows, labels = response_rows(held_out[start : start + settings.batch_size])
            parts.append((hidden(student, ids, rows), hidden(teacher, ids, rows), labels))
        student_hidden, teacher_hidden, labels = (torch.cat(column) for column in zip(*parts))
        found = point(name, steps, measure_rows(student_hidden, student_head, teacher_hidden, teacher_head, labels))
        print(f"{name}: { ({key: value for key, value in found.items() if key != 'terciles'}) }", flush=True)
        return found

    training, held_out, count = samples("train"), list[Sample](), 0
    for sample in samples("test"):
        if count < settings.held_out_rows:
            held_out.append(sample)
            count += len(sample.input_ids) - sample.response_start

    teacher = model(settings.seed, settings.teacher_hidden, settings.teacher_layers)
    student = model(settings.seed + 1, settings.student_hidden, settings.student_layers)
    teacher_head, student_head = teacher.lm_head.weight.detach(), student.lm_head.weight
    for trained, steps in ((teacher, settings.teacher_steps), (student, settings.student_steps)):
        print(f"training a model of width {trained.config.hidden_size}", flush=True)
        for _ in train(trained, cross_entropy(trained), training, steps, settings):
            pass
    points = [measured("before", 0)]
    names = {settings.distillation_steps // 2: "midway", settings.distillation_steps: "after"}
    for step in train(student, distillation, training, settings.distillation_steps, settings):
        if step in names:
            points.append(measured(names[step], step))
    return {
        "settings": {
            **settings._asdict(),
            "deltas": DELTAS,
            "limit": LIMIT,
            "limit_delta": LIMIT_DELTA,
            "threads": THREADS,
        },
        "vocabulary": {"size": settings.vocab_size, "in_use": len(tokenizer)},
        "points": points,
    }


def main(argv: Sequence[str] | None = None, settings: Settings = Settings()) -> None:  # noqa: B008 - immutable
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("LEAF_TEST_DATA"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=RESULTS / "gradient_sparsity.json", metavar="FILE")
    arguments = parser.parse_args(argv)
    files = "gsm8k/train.jsonl", "gsm8k/test.jsonl"
    if arguments.data is None or not all((arguments.data / file).is_file() for file in files):
        parser.error(f"--data DIR (default: $LEAF_TEST_DATA, here {arguments.data}) must have {' and '.join(files)}")
    torch.set_num_threads(THREADS)
    where, start = environment(torch.device("cpu"), packages=("transformers", "tokenizers")), time.monotonic()
    result = measure(arguments.data, settings)
    write_json(arguments.output, {"environment": where, "wall_s": time.monotonic() - start, **result})


if __name__ == "__main__":
    main()
