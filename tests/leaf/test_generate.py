from __future__ import annotations

import random
import sys
import types
import weakref

import pytest
import tiny
import torch

import leaf.generate
from leaf.data import Encoder
from leaf.generate import asker, generate, load_vllm
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
        found = dict(generate(model, tokenizer, iter(PROMPTS), max_new_tokens=NEW, max_tokens=max_tokens))
        assert [found[p] for p in PROMPTS] == wanted


def test_stops_before_the_end_of_turn(tokenizer) -> None:
    model = lively(tokenizer)
    ids = greedy(model, tokenizer, PROMPTS[1])
    stop = ids[2]
    ((prompt, response),) = generate(model, tokenizer, [PROMPTS[1]], max_new_tokens=NEW, stop=stop)
    assert prompt == PROMPTS[1]
    assert response == tokenizer.decode(ids[: ids.index(stop)])
    assert list(generate(model, tokenizer, [], max_new_tokens=NEW)) == []


def test_leaves_the_model_as_it_was(tokenizer) -> None:
    register()
    model = lively(tokenizer)
    wanted = dict(generate(model, tokenizer, PROMPTS, max_new_tokens=NEW))
    model.set_attn_implementation("leaf")
    model.train()
    model.model.layers[1].eval()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    own = model.generation_config
    found = {}
    for prompt, response in generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, max_tokens=1):
        found[prompt] = response
        assert torch.is_grad_enabled()  # between two results the caller may train
        assert model.training
    assert found == wanted
    assert model.config._attn_implementation == "leaf"
    assert model.generation_config is own
    assert (model.training, model.model.layers[0].training, model.model.layers[1].training) == (True, True, False)


def test_encoder_knows_the_end_of_turn() -> None:
    tokenizer = tiny.tokenizer("gemma")
    tokenizer.eos_token = "<|bos|>"  # the template ends turns with another token than the end of sequence
    assert Encoder(tokenizer).end_of_turn_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Encoder(tiny.tokenizer(None), chat_template="none").end_of_turn_id == tiny.tokenizer().eos_token_id


def test_models_are_freed(tokenizer) -> None:
    alive: list[weakref.ref] = []

    def load():
        assert all(ref() is None for ref in alive), "two models are resident"
        model = tiny.model(tokenizer)
        alive.append(weakref.ref(model))
        return model

    ask = asker(load, Encoder(tokenizer), max_new_tokens=2)
    assert ask(["a"]) == ask(["a"])
    assert ask([]) == {}
    assert len(alive) == 2


class Recorder:
    """Which batches a model is asked; more than `limit` prompts at once do not fit."""

    def __init__(self, model, limit: int = 10**9, error: Exception | None = None):
        self.batches: list[int] = []
        own = model.generate

        def generate(input_ids, **options):
            self.batches.append(len(input_ids))
            if len(input_ids) > limit:
                raise error
            return own(input_ids, **options)

        model.generate = generate


def test_prompts_are_asked_once_and_sorted_by_length_as_a_whole(tokenizer) -> None:
    model = lively(tokenizer)
    prompts = ["Tom has 2 books. " * (1 + n % 3) + str(n) for n in range(300)]
    random.Random(0).shuffle(prompts)
    lengths = [len(tokenizer(p, add_special_tokens=False).input_ids) for p in prompts]
    recorder = Recorder(model)
    budget = 20 * (max(lengths) + 1)
    found = dict(generate(model, tokenizer, prompts * 2, max_new_tokens=1, max_tokens=budget))
    assert found.keys() == set(prompts)
    assert sum(recorder.batches) == 300
    assert len(recorder.batches) <= 1 + sum(lengths) / (budget - 20 * max(lengths) / 3)  # nearly no padding
    backwards = dict(generate(model, tokenizer, prompts[::-1], max_new_tokens=1, max_tokens=budget))
    assert backwards == found


def out_of_memory() -> RuntimeError:
    """The CPU's own error."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), out_of_memory()], ids=["gpu", "cpu"])
def test_a_batch_that_does_not_fit_is_halved(tokenizer, error: RuntimeError, caplog) -> None:
    model = lively(tokenizer)
    prompts = [f"Eva is {n}" for n in range(10, 30)]
    wanted = dict(generate(model, tokenizer, prompts, max_new_tokens=NEW))
    recorder = Recorder(model, 5, error)
    assert dict(generate(model, tokenizer, prompts, max_new_tokens=NEW)) == wanted
    assert recorder.batches == [20, 10, 5, 5, 5, 5]
    assert "out of memory with 20 prompts of up to" in caplog.text


def test_what_does_not_fit_even_alone_is_an_error(tokenizer) -> None:
    model = lively(tokenizer)
    longest = len(tokenizer(PROMPTS[1], add_special_tokens=False).input_ids)
    recorder = Recorder(model, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(MemoryError, match=f"a prompt of {longest} tokens with 6 new ones .* lower --max-new-tokens"):
        list(generate(model, tokenizer, PROMPTS, max_new_tokens=NEW))
    assert recorder.batches == [4, 2, 1]
    Recorder(model, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(generate(model, tokenizer, PROMPTS, max_new_tokens=NEW))


class Vllm(types.ModuleType):
    """What `leaf` uses of vLLM, with the parameters that vLLM has; it answers with "1" to "n" and the end it was given."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.calls: list[tuple] = []
        calls = self.calls

        class SamplingParams:
            def __init__(self, *, temperature: float, max_tokens: int, stop_token_ids: list[int], detokenize: bool):
                self.temperature, self.max_tokens = temperature, max_tokens
                self.stop_token_ids, self.detokenize = stop_token_ids, detokenize

        class LLM:
            def __init__(self, model: str, *, tokenizer: str, dtype: str, max_model_len: int):
                calls.append((model, tokenizer, dtype, max_model_len))

            def generate(self, prompts, sampling_params, *, use_tqdm: bool = True):
                calls.append((prompts, sampling_params, use_tqdm))
                results = []
                for prompt in prompts:
                    new = prompt["prompt_token_ids"][: sampling_params.max_tokens]
                    ends = len(new) < sampling_params.max_tokens
                    new = new + sampling_params.stop_token_ids[:1] if ends else new
                    output = types.SimpleNamespace(token_ids=tuple(new), finish_reason="stop" if ends else "length")
                    results.append(types.SimpleNamespace(outputs=[output]))
                return results

        self.SamplingParams, self.LLM = SamplingParams, LLM


def test_vllm(tokenizer, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in: an echo of the prompt."""
    tiny.model(tokenizer, max_position_embeddings=50).save_pretrained(tmp_path)
    tokenizer.name_or_path = "student"
    module = Vllm()
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(leaf.generate.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(leaf.generate, "VLLM_PROMPTS", 3)
    engine = load_vllm(str(tmp_path), tokenizer, dtype="bfloat16", max_tokens=4096)
    assert module.calls.pop() == (str(tmp_path), "student", "bfloat16", 50)

    found = dict(generate(engine, tokenizer, [*PROMPTS, PROMPTS[0]], max_new_tokens=5, stop=7))
    ids = {p: tokenizer(p, add_special_tokens=False).input_ids for p in PROMPTS}
    assert found == {p: tokenizer.decode(i[:5]) for p, i in ids.items()}
    assert {len(i) < 5 for i in ids.values()} == {True, False}  # some end by themselves, some are cut off
    assert [call[0] for call in module.calls] == [
        [{"prompt_token_ids": ids[p]} for p in PROMPTS[:3]],
        [{"prompt_token_ids": ids[PROMPTS[3]]}],
    ]
    for _, params, use_tqdm in module.calls:
        assert (params.temperature, params.max_tokens, params.detokenize, use_tqdm) == (0, 5, False, False)
        assert params.stop_token_ids == sorted({7, tokenizer.eos_token_id})


def test_vllm_that_cannot_run_is_an_error(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_vllm("model", tokenizer, dtype="float32", max_tokens=8)

    monkeypatch.setattr(leaf.generate.importlib.util, "find_spec", lambda name: None)
    fails("vllm is not installed: `pip install vllm`, or leave out --engine vllm")
    monkeypatch.setattr(leaf.generate.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails("sees no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails("without accelerate launch")
