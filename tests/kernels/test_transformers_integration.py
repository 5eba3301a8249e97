"""Packs that share prefixes give what the separate, unpadded sequences give: hidden states, losses, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3NextConfig,
    T5Config,
)

from leaf_kernels import SharedPrefixLayout
from leaf_kernels.integrations.transformers import check_model, packed_inputs, register

register()

VOCAB = 50
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "gemma2": Gemma2Config(**COMMON, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    ),
    "gpt_oss": GptOssConfig(
        **COMMON,
        head_dim=8,
        sliding_window=6,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
# transformers' own attention computes its softmax in fp32 even for fp64 inputs
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def build(name: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    # "eager" experts: the grouped matmul of mixtures of experts has no fp64
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], attn_implementation=attention, experts_implementation="eager"
    ).double()
    if name == "gpt_oss":  # empty at construction: a sink of 0 would not show whether it arrives
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model.train()


def sequences() -> list[list[list[int]]]:
    """Two groups: spans removed in the middle, at the very start, right before the response, and nothing removed."""
    g = torch.Generator().manual_seed(1)
    root, other = (torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in (19, 11))
    return [
        [root, root[:5] + root[8:], root[3:], root[:11] + root[12:], root, root[:14]],
        [other, other[:1] + other[6:]],
    ]


def loss_of(model, logits_fp64: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_fp64[:-1], ids[1:], reduction="sum")


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, params = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, params)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_pack_equals_separate_sequences(name: str, checkpointing: bool):
    groups = sequences()
    members = [torch.tensor(m) for group in groups for m in group]

    separate = build(name, "eager")
    expected_hidden, expected_losses = [], []
    for ids in members:
        hidden = separate.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        expected_hidden.append(hidden)
        expected_losses.append(
            loss_of(separate, separate(input_ids=ids[None], use_cache=False).logits[0].double(), ids)
        )

    packed = build(name, "leaf")
    if checkpointing:
        packed.activation_checkpointing_enable()
    layout, input_ids = SharedPrefixLayout.from_groups(groups)
    assert layout.num_tokens < sum(len(m) for m in members), "nothing was shared: the test would show little"
    inputs = packed_inputs(layout, input_ids)
    hidden = packed.base_model(**inputs).last_hidden_state[0]
    logits = packed(**inputs).logits[0].double()
    losses = [loss_of(packed, logits[layout.member_rows(m)], ids) for m, ids in enumerate(members)]

    for m in range(len(members)):
        torch.testing.assert_close(hidden[layout.member_rows(m)], expected_hidden[m], **TOLERANCE)
        torch.testing.assert_close(losses[m], expected_losses[m], **TOLERANCE)
    weights = torch.linspace(0.5, 1.5, len(members))
    actual = gradients(packed, sum(w * x for w, x in zip(weights, losses)))
    expected = gradients(separate, sum(w * x for w, x in zip(weights, expected_losses)))
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            actual[parameter], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, p=parameter: f"{p}: {m}"
        )


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Qwen3NextConfig(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2), "linear_attention"),
        (DeepseekV3Config(), "multi-head latent attention"),
        (AutoConfig.for_model("falcon_h1"), "hybrid"),
        (AutoConfig.for_model("mamba"), "recurrent|mamba"),
        (AutoConfig.for_model("llama4_text"), "chunked_attention"),
        (T5Config(), "encoder-decoder"),
    ],
    ids=lambda v: getattr(v, "model_type", ""),
)
def test_unpackable_models_are_refused_by_name(config, named: str):
    with pytest.raises(ValueError, match=named) as error:
        check_model(config)
    assert config.model_type in str(error.value)
    assert "sdpa" in str(error.value), "the remedy is named"


@pytest.mark.parametrize("name", CONFIGS)
def test_supported_models_are_accepted(name: str):
    check_model(build(name, "leaf"))


def test_misuse_raises_with_the_remedy():
    model = build("llama", "leaf")
    layout, ids = SharedPrefixLayout.from_groups([[[3, 4, 5]]])
    inputs = packed_inputs(layout, ids)
    with pytest.raises(ValueError, match="needs layout="):
        model(input_ids=ids[None])
    with pytest.raises(ValueError, match="attention_mask must be None"):
        model(**inputs, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="batch of 1"):
        model(**{**inputs, "input_ids": ids.expand(2, 3)})
    with pytest.raises(ValueError, match=r"use_cache=False|set_attn_implementation"):
        model.generate(ids[None], max_new_tokens=2)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout must be 0"):
        model(**inputs)
