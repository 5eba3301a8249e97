"""How many vocabulary entries hold linear_kl's logit gradient: is a sparse one worth building? A CPU is enough:

    python -m benchmarks.gradient_sparsity --data DIR     # a quarter of an hour on one core; DIR/gsm8k/{train,test}.jsonl

K(δ) of a row is the smallest number of entries of p_student − p_teacher such that the others have at most δ of its L1 norm.
A sparse gradient is worth building if the median of K(0.01) is at most 256 on a vocabulary of 32k or more. Measured on the
response rows of held-out samples before, midway and after distilling with `linear_kl`; results/gradient_sparsity.json.

What this can say is limited. No pretrained model is used: teacher and student are tiny, trained for minutes on GSM8K alone,
and less sure of the next token than real ones, so their gradients are wider; compare the terciles of the rows by the
teacher's entropy. The text is too small for 32k merges: the rest of the vocabulary is never used, as in padded embeddings.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.timing import RESULTS, environment, write_json
from leaf.data import Encoder, Sample
from leaf_kernels import linear_cross_entropy, linear_kl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "leaf"))  # the rows and tiny models are those of the tests

import gsm8k
import tiny

DELTAS = (1e-1, 1e-2, 1e-3)
LIMIT, LIMIT_DELTA = 256, 1e-2
THREADS = 1  # two are slower where the second core is not free


class Settings(NamedTuple):
    """Models, and how long they are trained. Samples are GSM8K's rows; only their responses are trained and measured."""

    vocab_size: int = 32768
    teacher: tuple[int, int] = (192, 4)  # hidden size, layers
    student: tuple[int, int] = (96, 2)
    batch_size: int = 8
    learning_rate: float = 3e-3
    teacher_steps: int = 400
    student_steps: int = 100
    distillation_steps: int = 100
    held_out_samples: int = 64  # about 100 rows each
    seed: int = 0


# -- what is measured --------------------------------------------------------------------------------------------------


def entries_needed(gradient: torch.Tensor, deltas: Sequence[float] = DELTAS) -> torch.Tensor:
    """K(δ): the fewest entries of each row such that the others have at most δ of its L1 norm.

    gradient: [N, V]. Returns [len(deltas), N] int64; 0 for a row of zeros.
    """
    # From the smallest up: as the total less the largest, a small share would drown in rounding
    dropped = gradient.abs().sort(dim=1).values.cumsum(1, dtype=torch.float64)
    allowed = dropped[:, -1:] * torch.tensor(deltas, dtype=torch.float64)
    return gradient.shape[1] - torch.searchsorted(dropped, allowed, right=True).T


def measure_rows(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """K(δ) of linear_kl's logit gradient, and how sure and how far apart the models are, in nats.

    student, teacher: logits [N, V]; labels [N]. Returns K [len(DELTAS), N]; teacher_entropy, kl, l1, *_nll: [N].
    """
    student, teacher = student.log_softmax(1), teacher.log_softmax(1)
    p, gradient = teacher.exp(), student.exp() - teacher.exp()
    return {
        "K": entries_needed(gradient),
        "teacher_entropy": -(p * teacher).sum(1),
        "kl": (p * (teacher - student)).sum(1),
        "l1": gradient.abs().sum(1),
        "teacher_nll": -teacher.gather(1, labels[:, None])[:, 0],
        "student_nll": -student.gather(1, labels[:, None])[:, 0],
    }


def summary(rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Quantiles of K(δ), means of the rest, and whether the median of K(0.01) is within the limit, over N rows."""
    quantiles, entropy = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), rows["teacher_entropy"]
    K = rows["K"].double().quantile(quantiles, dim=1, interpolation="nearest").T.long().tolist()
    limited = DELTAS.index(LIMIT_DELTA)
    return {
        "rows": len(entropy),
        **{name: values.mean().item() for name, values in rows.items() if name != "K"},
        "teacher_entropy_range": [entropy.min().item(), entropy.max().item()],
        "K": {str(delta): dict(zip(("p10", "median", "p90"), values)) for delta, values in zip(DELTAS, K)},
        "share_within_limit": (rows["K"][limited] <= LIMIT).double().mean().item(),
        "within_limit": K[limited][1] <= LIMIT,
    }


def point(name: str, steps: int, rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The summary of all rows and of each third of them by teacher entropy, the lowest first."""
    thirds = rows["teacher_entropy"].argsort().tensor_split(3)
    terciles = [summary({name: values[..., third] for name, values in rows.items()}) for third in thirds]
    return {"point": name, "distillation_steps": steps, **summary(rows), "terciles": terciles}


# -- models ------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B samples and their N response tokens."""

    ids: torch.Tensor  # [B, L], padded on the right: attention is causal, nobody sees it
    rows: torch.Tensor  # [N], those of the B · L positions that predict a response token
    labels: torch.Tensor  # [N], these tokens


def collate(samples: Sequence[Sample]) -> Batch:
    ids = torch.zeros(len(samples), max(len(sample.input_ids) for sample in samples), dtype=torch.long)
    response = torch.zeros_like(ids, dtype=torch.bool)
    for n, sample in enumerate(samples):
        ids[n, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        response[n, sample.response_start : len(sample.input_ids)] = True
    return Batch(ids, response.flatten().nonzero()[:, 0] - 1, ids[response])


def head(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the ops take: final hidden states [N, D] and the weight [V, D]."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.rows], model.lm_head.weight


def cross_entropy(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return linear_cross_entropy(*head(model, batch), batch.labels).loss


def distillation(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return linear_kl(*head(student, batch), *head(teacher, batch)).loss


Loss = Callable[[PreTrainedModel, Batch], torch.Tensor]  # summed over rows


def train(model: PreTrainedModel, loss: Loss, samples: list[Sample], steps: int, settings: Settings) -> Iterator[int]:
    """Adam on the mean of `loss` over rows, its rate falling to zero. Yields the number of steps taken."""
    optimizer = torch.optim.Adam(model.parameters())
    generator = torch.Generator().manual_seed(settings.seed)
    samples = sorted(samples, key=lambda sample: len(sample.input_ids))  # neighbours need little padding
    for step in range(steps):
        first = int(torch.randint(len(samples) - settings.batch_size + 1, (), generator=generator))
        batch = collate(samples[first : first + settings.batch_size])
        mean = loss(model, batch) / len(batch.rows)
        optimizer.zero_grad()
        mean.backward()
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / steps)
        optimizer.step()
        if step % 20 == 0:
            print(f"width {model.config.hidden_size}, step {step} of {steps}: {mean.item():.3f} nats", flush=True)
        yield step + 1


@torch.no_grad()
def compare(student: PreTrainedModel, teacher: PreTrainedModel, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """`measure_rows` of all response rows."""
    parts = []
    for start in range(0, len(samples), 4):  # a few hundred rows: their logits take 100 MB
        batch = collate(samples[start : start + 4])
        logits = (hidden @ weight.T for hidden, weight in (head(student, batch), head(teacher, batch)))
        parts.append(measure_rows(*logits, batch.labels))
    return {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}


def measure(folder: Path, settings: Settings) -> dict[str, Any]:
    """The whole measurement on folder/gsm8k: what goes into the file, less the environment."""
    texts = [text for record in gsm8k.records(folder, "train") for text in record.values()]
    tokenizer = tiny.tokenizer(corpus=texts, vocab_size=settings.vocab_size)
    encoder = Encoder(tokenizer)
    training = [encoder.encode(row)[0] for row in gsm8k.rows(folder, "train")]
    held_out = [encoder.encode(row)[0] for row in gsm8k.rows(folder, "test")[: settings.held_out_samples]]

    def model(hidden: int, layers: int) -> PreTrainedModel:
        config = {"vocab_size": settings.vocab_size, "tie_word_embeddings": True, "attn_implementation": "sdpa"}
        return tiny.model(tokenizer, seed=settings.seed, hidden=hidden, layers=layers, **config)

    teacher, student = model(*settings.teacher), model(*settings.student)
    for trained, steps in ((teacher, settings.teacher_steps), (student, settings.student_steps)):
        for _ in train(trained, cross_entropy, training, steps, settings):
            pass
    teacher.requires_grad_(False)
    total = settings.distillation_steps
    names = {0: "before", total // 2: "midway", total: "after"}
    taken = chain([0], train(student, partial(distillation, teacher), training, total, settings))
    points = [point(names[n], n, compare(student, teacher, held_out)) for n in taken if n in names]
    fixed = {"deltas": DELTAS, "limit": LIMIT, "limit_delta": LIMIT_DELTA, "threads": THREADS}
    vocabulary = {"size": settings.vocab_size, "in_use": len(tokenizer)}
    return {"settings": {**settings._asdict(), **fixed}, "vocabulary": vocabulary, "points": points}


def main(argv: Sequence[str] | None = None, settings: Settings = Settings()) -> None:  # noqa: B008 - immutable
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("LEAF_TEST_DATA", ""), metavar="DIR")
    parser.add_argument("--output", type=Path, default=RESULTS / "gradient_sparsity.json", metavar="FILE")
    arguments = parser.parse_args(argv)
    data = Path(arguments.data, "gsm8k")
    if not (arguments.data and (data / "train.jsonl").is_file() and (data / "test.jsonl").is_file()):
        parser.error("--data DIR (default: LEAF_TEST_DATA) must hold gsm8k/train.jsonl and gsm8k/test.jsonl")
    torch.set_num_threads(THREADS)
    start, where = time.monotonic(), environment(torch.device("cpu"), packages=("transformers", "tokenizers"))
    result = measure(data.parent, settings)
    write_json(arguments.output, {"environment": where, "wall_s": time.monotonic() - start, **result})
    for found in result["points"]:
        K = ", ".join(f"K({delta}) = {values['median']}" for delta, values in found["K"].items())
        print(f"{found['point']}: {found['rows']} rows, medians {K}; within {LIMIT}: {found['within_limit']}")


if __name__ == "__main__":
    main()
