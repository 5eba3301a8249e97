from __future__ import annotations

import pytest
import tiny
import torch

from leaf.data import Encoder
from leaf.generate import generate, with_model
from leaf_kernels.integrations.transformers import register

PROMPTS = ["How many", "Tom has 2 books. The sign says 9. How many books does Tom have now?", "🙂", "Eva is 5"]
NEW = 6


@torch.no_grad()
def greedy(model, tokenizer, prompt: str) -> list[int]:
    """One prompt, no padding, no cache."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    start = len(ids)
    while len(ids) < start + NEW:
        ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[start:]


def lively(tokenizer, arch: str = "llama"):
    """A random model whose continuations differ: its weights are large."""
    return tiny.model(tokenizer, arch=arch, initializer_range=0.5)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_equals_one_prompt_at_a_time(tokenizer, arch: str) -> None:
    model = lively(tokenizer, arch)
    wanted = [tokenizer.decode(greedy(model, tokenizer, p)) for p in PROMPTS]
    assert len(set(wanted)) > 1
    for max_tokens in (1, 60, 10_000):
        assert list(generate(model, tokenizer, iter(PROMPTS), max_new_tokens=NEW, max_tokens=max_tokens)) == wanted


def test_stops_before_the_end_of_turn(tokenizer) -> None:
    model = lively(tokenizer)
    ids = greedy(model, tokenizer, PROMPTS[1])
    stop = ids[2]
    (response,) = generate(model, tokenizer, [PROMPTS[1]], max_new_tokens=NEW, stop=[stop])
    assert response == tokenizer.decode(ids[: ids.index(stop)])
    assert list(generate(model, tokenizer, [], max_new_tokens=NEW)) == []


def test_leaves_the_model_as_it_was(tokenizer) -> None:
    register()
    model = lively(tokenizer)
    wanted = list(generate(model, tokenizer, PROMPTS, max_new_tokens=NEW))
    model.set_attn_implementation("leaf")
    model.train()
    model.model.layers[1].eval()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    own = model.generation_config
    assert list(generate(model, tokenizer, PROMPTS, max_new_tokens=NEW)) == wanted
    assert model.config._attn_implementation == "leaf"
    assert model.generation_config is own
    assert (model.training, model.model.layers[0].training, model.model.layers[1].training) == (True, True, False)


def test_encoder_knows_the_end_of_turn() -> None:
    tokenizer = tiny.tokenizer("gemma")
    tokenizer.eos_token = "<|bos|>"  # the template ends turns with another token than the end of sequence
    assert Encoder(tokenizer).end_of_turn_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Encoder(tiny.tokenizer(None), chat_template="none").end_of_turn_id == tiny.tokenizer().eos_token_id


def test_models_are_freed(tokenizer) -> None:
    import weakref

    alive: list[weakref.ref] = []

    def load():
        assert all(ref() is None for ref in alive), "two models are resident"
        model = tiny.model(tokenizer)
        alive.append(weakref.ref(model))
        return model

    assert [with_model(load, lambda model: type(model).__name__) for _ in range(2)] == ["LlamaForCausalLM"] * 2
