"""Greedy generation for many prompts, with transformers or vLLM."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import Encoder

logger = logging.getLogger(__name__)
Loader = Callable[[], Any]  # returns what `generate` takes as model
Ask = Callable[[Sequence[str]], Mapping[str, str]]  # the response to each prompt
Ids = list[int]

VLLM_PROMPTS = 1024  # handed to vLLM together: it returns nothing before all of them are answered


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    max_tokens: int = 16384,
    stop: int | None = None,
) -> Iterator[tuple[str, str]]:
    """Each distinct prompt with its greedy continuation, without the end of turn, as they finish.

    Prompts of similar length share a left-padded batch; which prompts share one never changes a result beyond the
    rounding of the attention. The model's own sampling settings are set aside, and the model is left as it was.

    Args:
        model: a transformers model, or a vLLM engine from `load_vllm`, which makes its batches itself.
        prompts: rendered text; no special tokens are added.
        max_tokens: budget of a batch, prompts and new tokens together; a larger prompt gets a batch of its own. Where the
            memory does not suffice, the budget is lowered for the rest.
        stop: the id that ends a response (`Encoder.end_of_turn_id`), besides the end-of-sequence ids of model and tokenizer.

    Raises:
        MemoryError: a prompt does not fit even alone; the message has its length.
    """
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        return
    ids = tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, stop} - {None}
    if isinstance(model, torch.nn.Module):
        pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        continuations = _with_transformers(model, ids, ends, pad, max_new_tokens, max_tokens)
    else:
        continuations = _with_vllm(model, ids, ends, max_new_tokens)
    for n, new in continuations:
        yield distinct[n], str(tokenizer.decode(new))


def asker(load: Loader, encoder: Encoder, *, max_new_tokens: int = 512, max_tokens: int = 16384) -> Ask:
    """Asks the model that `load` returns, which is freed before the answers are: one model is resident at a time."""

    def ask(prompts: Sequence[str]) -> Mapping[str, str]:
        if not prompts:
            return {}
        options = {"max_new_tokens": max_new_tokens, "max_tokens": max_tokens, "stop": encoder.end_of_turn_id}
        try:
            written = {encoder.as_read(prompt): prompt for prompt in prompts}
            given = generate(load(), encoder.tokenizer, written, **options)  # type: ignore[arg-type]
            return {written[prompt]: encoder.response_of(response) for prompt, response in given}
        finally:
            free_memory()

    return ask


def free_memory() -> None:
    """Gives back what models that nobody holds any longer have left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's allocator for GPUs has a class of its own, that of the CPU, pinned memory and Triton only a message."""
    messages = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def _with_transformers(
    model: Any, ids: Sequence[Ids], ends: set[int], pad: int, max_new_tokens: int, max_tokens: int
) -> Iterator[tuple[int, Ids]]:
    """Positions and new ids. The longest come first, so what does not fit into the memory is known at once."""
    own = model.generation_config.eos_token_id
    ends = ends | {*(own if isinstance(own, list) else [own])} - {None}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    order = sorted(range(len(ids)), key=lambda n: -len(ids[n]))
    while order:
        longest = len(ids[order[0]])
        width = longest + max_new_tokens
        batch = order[: max(1, max_tokens // width)]
        new = _batch(model, [ids[n] for n in batch], settings)
        if new is not None:
            yield from ((n, list(itertools.takewhile(lambda i: i not in ends, each))) for n, each in zip(batch, new))
            order = order[len(batch) :]
        elif len(batch) > 1:
            max_tokens = len(batch) // 2 * width
            logger.warning(
                "out of memory with %d prompts of up to %d tokens; --max-tokens is %d from here on",
                len(batch),
                longest,
                max_tokens,
            )
        else:
            raise MemoryError(
                f"a prompt of {longest} tokens with {max_new_tokens} new ones does not fit into the memory of "
                f"{model.device}, even alone: lower --max-new-tokens, or --max-length, which skips such rows"
            )


def _batch(model: PreTrainedModel, prompts: Sequence[Ids], settings: GenerationConfig) -> list[Ids] | None:
    """The new ids of a batch; None where the memory does not suffice."""
    padded, mask = (
        pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left").to(model.device)
        for rows, value in (
            ([torch.tensor(prompt) for prompt in prompts], settings.pad_token_id),
            ([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], 0),
        )
    )
    try:
        with _generating(model, settings), torch.no_grad():
            output = model.generate(padded, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
        return output[:, padded.shape[1] :].tolist()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()  # not before the error is gone, whose traceback holds the tensors
    return None


@contextlib.contextmanager
def _generating(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Eval mode, a kernel that can use a KV cache, and none of the model's own sampling settings (`generate` would fill
    what `settings` leaves open from them: a repetition penalty, for one)."""
    own, attention = model.generation_config, model.config._attn_implementation
    model.generation_config = settings
    if attention == "leaf":
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        with evaluating(model):
            yield
    finally:
        if attention == "leaf":
            model.set_attn_implementation(attention)
        model.generation_config = own


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode; every module then has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_vllm() -> None:
    """Raises a ValueError where vLLM cannot run."""
    remedy = "or leave out --engine vllm"
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"--engine vllm: vllm is not installed: `pip install vllm`, {remedy}")
    if not torch.cuda.is_available():
        raise ValueError(f"--engine vllm: torch {torch.__version__} sees no GPU: run it where one is, {remedy}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "--engine vllm runs in one process: run select, prune and eval without accelerate launch and the other "
            f"stages with it, {remedy}"
        )


def load_vllm(name: str, tokenizer: PreTrainedTokenizerBase, *, dtype: str, max_tokens: int) -> Any:
    """A vLLM engine for `generate`; `max_tokens` = of a prompt and its continuation, which memory is set aside for."""
    check_vllm()
    from vllm import LLM

    positions = getattr(AutoConfig.from_pretrained(name).get_text_config(), "max_position_embeddings", max_tokens)
    return LLM(model=name, tokenizer=tokenizer.name_or_path, dtype=dtype, max_model_len=min(max_tokens, positions))


def _with_vllm(llm: Any, ids: Sequence[Ids], ends: set[int], max_new_tokens: int) -> Iterator[tuple[int, Ids]]:
    """Positions and new ids. vLLM adds the end-of-sequence ids of the model's generation config by itself."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_new_tokens, stop_token_ids=sorted(ends), detokenize=False)
    for start in range(0, len(ids), VLLM_PROMPTS):
        prompts = [{"prompt_token_ids": each} for each in ids[start : start + VLLM_PROMPTS]]
        for n, request in enumerate(llm.generate(prompts, params, use_tqdm=False), start):
            (output,) = request.outputs
            yield n, list(output.token_ids[: -1 if output.finish_reason == "stop" else None])  # without the end itself
