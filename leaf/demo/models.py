"""The built-in task's models: a teacher that computes, a student that has learnt to read the sign."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .task import ANSWER, TEST_SETS, Row, drop_words, make_rows

# A student outside these bounds before distillation shows little: it has no bias to remove, or cannot compute at all.
WINDOW = {"in_distribution": (0.88, 1.0), "adversarial": (0.10, 0.35), "clean": (0.15, 0.40)}

Batch = TypeVar("Batch")
Track = Callable[[Iterable[int], int, str], Iterable[int]]  # items, how many, what they are

BATCH = 64
CPU = torch.device("cpu")
STUDENT_CHECK_EVERY, STUDENT_FIRST_CHECK = 10, 100
VALIDATION_ROWS, VALIDATION_MARGIN = 256, 0.02  # about one standard error inside the window


class Size(NamedTuple):
    """Of a Llama: about 11 · layers · hidden² parameters.

    initializer_range: at the default of 0.02 a small model spends most of its steps on leaving its start.
    """

    hidden: int
    layers: int = 2
    heads: int = 4  # twice those of keys and values
    initializer_range: float = 0.04


TEACHER, STUDENT = Size(96), Size(64)  # 216k and 98k parameters


def make_model(tokenizer: PreTrainedTokenizerBase, size: Size, seed: int, **options: Any) -> LlamaForCausalLM:
    """A Llama with untied embeddings. `options` go to its config."""
    settings: dict[str, Any] = {"max_position_embeddings": 128, **options}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        initializer_range=size.initializer_range,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, response) pairs, rendered and padded on the right: `input_ids` and `labels` [B, T] (-100 = no target)."""
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in pairs]
    texts = tokenizer.apply_chat_template(turns, tokenize=False)
    sequences = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answer = tokenizer.convert_tokens_to_ids(ANSWER)  # the response follows it
    width = max(map(len, sequences))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, sequence in enumerate(sequences):
        start = sequence.index(answer) + 1
        ids[i, : len(sequence)] = torch.tensor(sequence)
        labels[i, start : len(sequence)] = ids[i, start : len(sequence)]
    return ids, labels


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[bool]:
    """Whether greedy decoding of each prompt gives exactly the response.

    One teacher-forced forward decides it: greedy decoding follows the response as long as every argmax agrees with it.
    """
    correct: list[bool] = []
    with torch.inference_mode():
        for begin in range(0, len(pairs), 256):
            ids, labels = encode(tokenizer, pairs[begin : begin + 256])
            predicted = model(ids.to(model.device)).logits[:, :-1].argmax(-1).cpu()
            correct += ((predicted == labels[:, 1:]) | (labels[:, 1:] == -100)).all(-1).tolist()
    return correct


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> float:
    """Share of rows whose whole response is reproduced."""
    return sum(exact_match(model, tokenizer, [(row["prompt"], row["completion"]) for row in rows])) / len(rows)


def outside_window(scores: dict[str, float], margin: float = 0.0) -> float:
    """By how much a student before distillation misses the window, `margin` inside its bounds; 0 = it lies within."""
    below = sum(max(low + margin - scores[name], 0) for name, (low, _) in WINDOW.items())
    above = sum(max(scores[name] - high + margin * (high < 1), 0) for name, (_, high) in WINDOW.items())
    return below + above


def _plain(items: Iterable[int], total: int, description: str) -> Iterable[int]:
    return items


def train(
    model: LlamaForCausalLM,
    batches: Iterator[Batch],
    predict: Callable[[LlamaForCausalLM, Batch], tuple[torch.Tensor, torch.Tensor]],
    *,
    learning_rate: Callable[[int], float],
    label_smoothing: float = 0.0,
) -> Iterator[int]:
    """AdamW on the response cross-entropy, one step per batch; yields the number of steps done.

    predict: the logits [targets, V] that a model gives the response tokens of a batch, and their ids [targets].
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step, batch in enumerate(batches, start=1):
        logits, labels = predict(model, batch)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        yield step
    model.eval()


def padded(tokenizer: PreTrainedTokenizerBase) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`predict` of `train` for batches of (prompt, response) pairs of similar length."""

    def predict(model: LlamaForCausalLM, pairs: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = (x.to(model.device) for x in encode(tokenizer, pairs))
        hidden = model.model(ids).last_hidden_state[:, :-1]
        target = labels[:, 1:] != -100
        return model.lm_head(hidden[target]), labels[:, 1:][target]

    return predict


def cosine(step: int, steps: int, peak: float = 3e-3) -> float:
    """The teachers' learning rate: 20 steps of warm-up, then down to 5 %."""
    warm, progress = min(step / 20, 1.0), max(step - 20, 0) / max(steps - 20, 1)
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def constant(step: int, peak: float = 3e-3) -> float:
    """The students' learning rate: 20 steps of warm-up."""
    return peak * min(step / 20, 1.0)


def _batches(rows: Sequence[Row]) -> Iterator[list[tuple[str, str]]]:
    for begin in range(0, len(rows), BATCH):
        yield [(row["prompt"], row["completion"]) for row in rows[begin : begin + BATCH]]


def train_teacher(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    steps: int,
    spare_operands: bool = True,
    size: Size = TEACHER,
    learning_rate: float = 3e-3,
    device: torch.device = CPU,
    track: Track = _plain,
) -> LlamaForCausalLM:
    """The teacher: the sign tells it nothing, and it has seen prompts with words missing.

    In half of each batch every prompt word is deleted with p = 0.05. With `spare_operands` operands are never deleted;
    without it they are, and rows that lost one are left out, so that nothing tells the teacher which words matter.
    """
    rows = make_rows("teacher", BATCH * steps, seed)
    rng = random.Random(f"drop/{seed}")

    def batches() -> Iterator[list[tuple[str, str]]]:
        for begin in range(0, len(rows), BATCH):
            batch = rows[begin : begin + BATCH]
            dropped = [drop_words(row, rng, p=0.05, spare_operands=spare_operands) for row in batch[BATCH // 2 :]]
            prompts = [row["prompt"] for row in batch[: BATCH // 2]] + dropped
            yield [
                (prompt, row["completion"]) for prompt, row in zip(prompts, batch, strict=True) if prompt is not None
            ]

    model = make_model(tokenizer, size, seed=1000 + seed).to(device)  # type: ignore[arg-type]
    training = train(
        model,
        batches(),
        padded(tokenizer),
        learning_rate=lambda step: cosine(step, steps, learning_rate),
        label_smoothing=0.05,
    )
    for _ in track(training, steps, f"seed {seed}: teacher"):
        pass
    return model.eval()


def train_student(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    max_steps: int = 400,
    size: Size = STUDENT,
    learning_rate: float = 3e-3,
    device: torch.device = CPU,
    track: Track = _plain,
) -> tuple[LlamaForCausalLM, int]:
    """The biased student and its steps: trained where the sign is right 95 % of the time, until it lies in the window.

    One that never does is taken from where it came closest.
    """
    validation = {name: make_rows(f"validation/{name}", VALIDATION_ROWS, seed) for name in TEST_SETS}
    model = make_model(tokenizer, size, seed=2000 + seed).to(device)  # type: ignore[arg-type]
    rows = make_rows("student", BATCH * max_steps, seed)
    training = train(model, _batches(rows), padded(tokenizer), learning_rate=lambda step: constant(step, learning_rate))
    closest, best, steps = model, math.inf, 0
    for step in track(training, max_steps, f"seed {seed}: student"):
        if (step >= STUDENT_FIRST_CHECK and step % STUDENT_CHECK_EVERY == 0) or step == max_steps:
            scores = {name: accuracy(model, tokenizer, rows) for name, rows in validation.items()}
            miss = outside_window(scores, margin=VALIDATION_MARGIN)
            if miss < best:
                closest, best, steps = copy.deepcopy(model), miss, step
            if miss == 0:
                break
    return closest.eval(), steps
