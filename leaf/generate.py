"""Greedy generation for many prompts."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
Loader = Callable[[], PreTrainedModel]

WINDOW = 256  # prompts that are sorted by length together


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    max_tokens: int = 16384,
    stop: Sequence[int] = (),
) -> Iterator[str]:
    """The greedy continuation of each rendered prompt, without its end of turn, in the order of the prompts.

    Prompts of similar length share a left-padded batch; which prompts share one never changes a result beyond the
    rounding of the attention. The model's own sampling settings are set aside, and the model is left as it was.

    Args:
        prompts: rendered text; no special tokens are added.
        max_tokens: budget of a batch, prompts and new tokens together; a larger prompt gets a batch of its own.
        stop: ids that end a response, besides the end-of-sequence ids of model and tokenizer (`Encoder.end_of_turn_id`).
    """
    ends = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id), *stop} - {None}
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    remaining = iter(prompts)
    while window := list(itertools.islice(remaining, WINDOW)):
        ids = tokenizer(window, add_special_tokens=False, verbose=False)["input_ids"]
        responses: dict[int, str] = {}
        with _generating(model, settings), torch.no_grad():
            for batch in _batches([len(i) for i in ids], max_new_tokens, max_tokens):
                width = len(ids[batch[0]])
                padded = torch.tensor([[pad] * (width - len(ids[n])) + ids[n] for n in batch], device=model.device)
                mask = torch.tensor(
                    [[0] * (width - len(ids[n])) + [1] * len(ids[n]) for n in batch], device=model.device
                )
                output = model.generate(padded, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
                for n, new in zip(batch, output[:, width:].tolist()):
                    responses[n] = str(tokenizer.decode(list(itertools.takewhile(lambda i: i not in ends, new))))
        yield from (responses[n] for n in range(len(window)))


def _batches(lengths: Sequence[int], max_new_tokens: int, max_tokens: int) -> Iterator[list[int]]:
    """Positions of prompts, longest first: the first batch needs the most memory, so a budget too large fails at once."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    while order:
        size = max(1, max_tokens // (lengths[order[0]] + max_new_tokens))
        yield order[:size]
        order = order[size:]


@contextlib.contextmanager
def _generating(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Eval mode, a kernel that can use a KV cache, and none of the model's own sampling settings (`generate` would fill
    what `settings` leaves open from them: a repetition penalty, for one)."""
    modes = [(module, module.training) for module in model.modules()]
    own, attention = model.generation_config, model.config._attn_implementation
    model.eval()
    model.generation_config = settings
    if attention == "leaf":
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        if attention == "leaf":
            model.set_attn_implementation(attention)
        model.generation_config = own
        for module, mode in modes:
            module.training = mode


def _as_list(ids: int | list[int] | None) -> list[int | None]:
    return ids if isinstance(ids, list) else [ids]  # type: ignore[return-value]


def with_model(load: Loader, work: Callable[[PreTrainedModel], T]) -> T:
    """`work` with the model that `load` returns, which is freed before this returns: one model is resident at a time."""
    try:
        return work(load())
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
