"""Teachers that one device does not hold: spread by hooks, offloaded, quantized."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest
import tiny
import torch
from accelerate import dispatch_model
from test_score import SAMPLES
from transformers import PreTrainedModel

from leaf.attention import Marked, attention_to_marked
from leaf.config import RunConfig
from leaf.loading import check_loading, load_model
from leaf.sensitivity import Scorer, Sensitivity

CPU = torch.device("cpu")
WHOLE = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


def model(**options: object) -> PreTrainedModel:
    return tiny.model(tiny.tokenizer(), **options)


def measure(model: PreTrainedModel, **options: object) -> list[Sensitivity]:
    return Scorer(model, perplexity=True, **options)(SAMPLES)  # type: ignore[arg-type,return-value]


def assert_same(measured: list[Sensitivity], expected: list[Sensitivity]) -> None:
    assert len(measured) == len(expected)
    for one, other in zip(measured, expected):
        torch.testing.assert_close(one.norm, other.norm, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(one.nll, other.nll)
        assert one.loss == pytest.approx(other.loss, rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_accelerates_hooks_is_scored_as_without(tied: bool, checkpointing: bool) -> None:
    options = {"activation_checkpointing": checkpointing}
    expected = measure(model(tie_word_embeddings=tied), **options)
    hooked = dispatch_model(model(tie_word_embeddings=tied), {**WHOLE, "lm_head": "cpu"}, force_hooks=True)
    assert "forward" in vars(hooked.lm_head)
    assert_same(measure(hooked, **options), expected)


@pytest.mark.parametrize("checkpointing", [False, True, None])
def test_layers_can_be_offloaded(tmp_path: pathlib.Path, checkpointing: bool | None) -> None:
    where = {**WHOLE, "model.layers": "disk", "lm_head": "cpu"}
    offloaded = dispatch_model(model(), where, offload_dir=str(tmp_path))
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    assert_same(measure(offloaded, activation_checkpointing=checkpointing), measure(model()))


@pytest.mark.parametrize(("part", "name"), [("lm_head", "output head"), ("model.embed_tokens", "input embedding")])
def test_an_offloaded_head_or_embedding_is_refused(tmp_path: pathlib.Path, part: str, name: str) -> None:
    where = {**WHOLE, "lm_head": "cpu", part: "disk"}
    offloaded = dispatch_model(model(), where, offload_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"{name} of LlamaForCausalLM is offloaded .*--teacher-quantization"):
        Scorer(offloaded)


def test_another_hook_on_the_head_is_still_refused() -> None:
    hooked = dispatch_model(model(), {**WHOLE, "lm_head": "cpu"}, force_hooks=True)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="without hooks"):
        Scorer(hooked)


def test_attention_of_a_model_with_hooks() -> None:
    items = [Marked(sample.input_ids, sample.response_start, sample.scored) for sample in SAMPLES]
    hooked = dispatch_model(model(), {**WHOLE, "lm_head": "cpu"}, force_hooks=True)
    shares = list(attention_to_marked(hooked, items, max_tokens=64))
    assert shares == pytest.approx(list(attention_to_marked(model(), items, max_tokens=64)))


# -- Quantized ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "error"), [("8bit", 0.02), ("4bit", 0.2)])
def test_a_quantized_model(tmp_path: pathlib.Path, bits: str, error: float, dtype: torch.dtype) -> None:
    """Norms near those of the whole model; with checkpoints and tiles the same as without."""
    large = model(hidden=64)
    large.save_pretrained(tmp_path)
    expected = measure(large)
    quantized = load_model(str(tmp_path), dtype, CPU, print, quantization=bits)
    assert {p.dtype for p in quantized.model.layers.parameters()} >= {torch.int8 if bits == "8bit" else torch.uint8}
    assert quantized.lm_head.weight.dtype == dtype
    found = measure(quantized, activation_checkpointing=False)
    for one, other in zip(found, expected):
        difference = (one.norm - other.norm).norm() / other.norm.norm()
        assert 1e-5 < difference < error, "neither the model before nor another one"
        assert one.loss == pytest.approx(other.loss, rel=error)
    assert all(p.grad is None and not p.requires_grad for p in quantized.parameters())
    for one, other in zip(measure(quantized, activation_checkpointing=True), found):
        torch.testing.assert_close(one.norm, other.norm)


# -- Options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto", "device": "cpu"}, "device_map=auto and device=cpu both say"),
        ({"teacher_quantization": "8bit", "engine": "vllm"}, "no effect with engine=vllm"),
        ({"teacher_quantization": "8bit", "shard_teacher": True}, "cannot be sharded"),
        ({"device_map": "disk"}, r"device_map must be auto \| balanced"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**options)  # type: ignore[arg-type]


def test_options_and_the_number_of_processes() -> None:
    with pytest.raises(ValueError, match="each of the 2 processes would spread its models over all GPUs"):
        check_loading(RunConfig(device_map="auto"), ["score"], 2)
    with pytest.raises(ValueError, match="this is a single one"):
        check_loading(RunConfig(shard_teacher=True), ["score"], 1)
    for stages, ranks in ((["score"], 1), (["distill"], 2)):
        assert check_loading(RunConfig(device_map="auto"), stages, ranks) == []
    assert check_loading(RunConfig(shard_teacher=True), ["select"], 1) == [], "one file of options for every command"
    assert check_loading(RunConfig(shard_teacher=True), ["score"], 2) == []
    (note,) = check_loading(RunConfig(shard_teacher=True), ["score", "verify"], 2)
    assert "each rank loads it whole" in note


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"teacher_mode": "cached_topk", "divergence": "reverse_kl"}, 1, "not for reverse_kl: give .* cached_hidden"),
        ({"teacher_mode": "fsdp2"}, 1, "this is a single one: run it under accelerate launch, or give"),
        ({"teacher_mode": "fsdp2", "teacher_quantization": "8bit"}, 2, "cannot shard a teacher with"),
        ({"teacher_mode": "device_map", "device_map": "auto"}, 2, "each of the 2 processes would spread the teacher"),
        ({"teacher_mode": "device_map"}, 1, "needs --device-map, which says how: add --device-map auto"),
        ({"teacher_mode": "cached_hidden", "device_map": "auto"}, 2, "would spread its models over all GPUs"),
        ({"teacher_mode": "cached_hidden", "shard_teacher": True}, 1, "this is a single one"),
    ],
)
def test_how_distill_gets_its_teacher(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], ranks: int, message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=message):
        check_loading(RunConfig(**options), ["cache", "distill"], ranks)
    check_loading(RunConfig(**options), ["prune"], ranks)  # one file of options for every command


def test_combinations_that_work() -> None:
    both = ["cache", "distill"]
    for options, ranks in (
        ({"teacher_mode": "fsdp2"}, 2),
        ({"teacher_mode": "device_map", "device_map": "auto"}, 1),
        ({"teacher_mode": "cached_hidden", "device_map": "auto", "divergence": "reverse_kl"}, 1),
        ({"teacher_mode": "cached_topk", "shard_teacher": True}, 2),
        ({"teacher_mode": "replicate", "device_map": "auto"}, 2),
    ):
        assert check_loading(RunConfig(**options), both, ranks) == []  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs no cache: give `leaf cache --teacher-mode cached_hidden`"):
        check_loading(RunConfig(), ["cache"], 1)


@pytest.mark.parametrize("installed", [False, True])
def test_bitsandbytes(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    config = RunConfig(teacher_quantization="4bit")
    assert check_loading(config, ["prune"], 1) == []
    if installed:
        (note,) = check_loading(config, ["select", "score"], 1)
        assert "quantized to 4bit" in note
        assert "dequantized weights" in note
    else:
        with pytest.raises(ImportError, match=r"pip install 'leaf-kernels\[quantization\]'"):
            check_loading(config, ["score"], 1)
