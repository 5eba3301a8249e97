"""Packs that share prefixes give what the separate, unpadded sequences give: hidden states, losses, gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RobertaConfig,
    SmolLM3Config,
    Starcoder2Config,
    T5Config,
)
from transformers.masking_utils import create_causal_mask

from leaf_kernels import Impl, SharedPrefixLayout
from leaf_kernels.integrations.transformers import check_model, packed_inputs, register

register()

VOCAB = 50
ANY = {
    "vocab_size": VOCAB,
    "initializer_range": 0.2,  # the usual 0.02 attends to everything alike, whatever a model does to its logits
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LAYERS = {**ANY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
COMMON = {**LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
# Three, six and seven queries per key. Where a head's size is a setting of its own, it is not hidden_size / heads.
GQA3 = {**LAYERS, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}
GQA3_BY_HIDDEN = {**LAYERS, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
GQA6_BY_HIDDEN = {**GQA3_BY_HIDDEN, "num_key_value_heads": 1}
GQA7 = {**LAYERS, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 8}
GQA7_BY_HIDDEN = {**LAYERS, "hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}
WINDOW = {"sliding_window": 6}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "gemma2": Gemma2Config(**COMMON, **WINDOW, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        **ANY, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "gpt_oss": GptOssConfig(
        **COMMON, **WINDOW, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE
    ),
    "qwen3": Qwen3Config(**GQA3, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "mistral": MistralConfig(**GQA7, **WINDOW),
    "gemma3": Gemma3TextConfig(
        **{**GQA3, "hidden_size": 48, "tie_word_embeddings": True},
        **WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": {**ROPE, "rope_theta": 100.0}, "full_attention": ROPE},
        query_pre_attn_scalar=5,
        final_logit_softcapping=2.0,
    ),
    "gemma4": Gemma4TextConfig(
        **{**GQA3, "num_hidden_layers": 4, "num_key_value_heads": 2},
        **WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
    ),
    "phi3": Phi3Config(
        **GQA7_BY_HIDDEN,
        **WINDOW,
        original_max_position_embeddings=32,
        rope_parameters={
            **ROPE,
            "rope_type": "longrope",
            "partial_rotary_factor": 0.5,
            "short_factor": [1.5, 2.0],
            "long_factor": [4.0, 8.0],
        },
    ),
    "olmo2": Olmo2Config(**GQA3_BY_HIDDEN),
    "smollm3": SmolLM3Config(**GQA3_BY_HIDDEN, **WINDOW, use_sliding_window=True, no_rope_layers=[1, 0]),
    "granite": GraniteConfig(
        **GQA3_BY_HIDDEN,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=4.0,
    ),
    "gpt_neox": GPTNeoXConfig(
        **{**LAYERS, "hidden_size": 48}, num_attention_heads=3, rope_parameters={**ROPE, "partial_rotary_factor": 0.5}
    ),
    "starcoder2": Starcoder2Config(**{**GQA6_BY_HIDDEN, "tie_word_embeddings": True}, **WINDOW),
    "cohere": CohereConfig(**{**GQA3_BY_HIDDEN, "tie_word_embeddings": True}, logit_scale=0.25, use_qk_norm=True),
    "glm4": Glm4Config(**GQA3, rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
    "mixtral": MixtralConfig(**GQA3, **WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **GQA7,
        **WINDOW,
        use_sliding_window=True,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    "ministral": MinistralConfig(**GQA3, **WINDOW, layer_types=["sliding_attention", "full_attention"]),
    # gives its window to the mask only, not to the attention function
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON,
        **WINDOW,
        use_sliding_window=True,
        max_window_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}
# Settings whose change must show in the output: otherwise the equality of packs would not speak for them
CHANGES = [(name, {"sliding_window": 4}) for name, config in CONFIGS.items() if hasattr(config, "sliding_window")] + [
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma3", {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}}),
    ("gemma3", {"query_pre_attn_scalar": 7}),
    ("gemma3", {"final_logit_softcapping": None}),
    ("phi3", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    ("smollm3", {"no_rope_layers": [1, 1]}),
    ("granite", {"attention_multiplier": 0.3}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("gpt_neox", {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}),
    ("glm4", {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}),
    ("cohere", {"logit_scale": 1.0}),
    ("cohere", {"use_qk_norm": False}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("qwen3_moe", {"norm_topk_prob": False}),
]
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@contextmanager
def fp64_throughout() -> Iterator[None]:
    """Models ask for fp32 in norms, softmax and rotations whatever their dtype is; inside, they get fp64."""

    def widened(function):
        def call(*args, **kwargs):
            args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs))
            return function(*args, **kwargs)

        return call

    # Not a TorchFunctionMode: checkpoints are recomputed in the backward, where it would not hold
    with (
        mock.patch.multiple(torch.Tensor, float=torch.Tensor.double, to=widened(torch.Tensor.to)),
        mock.patch.object(F, "softmax", widened(F.softmax)),
    ):
        yield


def build(name: str, attention: str, changes: dict[str, Any] | None = None) -> torch.nn.Module:
    config = copy.deepcopy(CONFIGS[name])
    for setting, value in (changes or {}).items():
        setattr(config, setting, value)
    torch.manual_seed(0)
    # "eager" experts: the grouped matmul of mixtures of experts has no fp64
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    ).double()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # a norm of 1, a bias or sink of 0 would not show whether it arrives
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    return model.train()


def sequences() -> list[list[list[int]]]:
    """Two groups: spans removed in the middle, at the very start, right before the response, and nothing removed."""
    g = torch.Generator().manual_seed(1)
    root, other = (torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in (19, 11))
    return [
        [root, root[:5] + root[8:], root[3:], root[:11] + root[12:], root, root[:14]],
        [other, other[:1] + other[6:]],
    ]


def members() -> list[torch.Tensor]:
    return [torch.tensor(m) for group in sequences() for m in group]


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:-1], ids[1:], reduction="sum")


def weighted(losses: list[torch.Tensor]) -> torch.Tensor:
    return sum(w * x for w, x in zip(torch.linspace(0.5, 1.5, len(losses)), losses))


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, params = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, params)))


@functools.cache
def expected(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, torch.Tensor]]:
    """Hidden states, losses and gradients of every sequence alone, under eager attention."""
    model = build(name, "eager")
    hidden, losses = [], []
    with fp64_throughout():
        for ids in members():
            hidden.append(model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0].detach())
            losses.append(loss_of(model(input_ids=ids[None], use_cache=False).logits[0], ids))
        return hidden, [x.detach() for x in losses], gradients(model, weighted(losses))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_pack_equals_separate_sequences(name: str, checkpointing: bool):
    expected_hidden, expected_losses, expected_gradients = expected(name)
    packed = build(name, "leaf")
    check_model(packed)
    if checkpointing:
        packed.activation_checkpointing_enable()
    layout, input_ids = SharedPrefixLayout.from_groups(sequences())
    assert layout.num_tokens < sum(len(m) for m in members()), "nothing was shared: the test would show little"
    inputs = packed_inputs(layout, input_ids)
    with fp64_throughout():
        hidden = packed.base_model(**inputs).last_hidden_state[0]
        logits = packed(**inputs).logits[0]
        losses = [loss_of(logits[layout.member_rows(m)], ids) for m, ids in enumerate(members())]
        actual_gradients = gradients(packed, weighted(losses))

    for m in range(len(losses)):
        torch.testing.assert_close(hidden[layout.member_rows(m)], expected_hidden[m], **TOLERANCE)
        torch.testing.assert_close(losses[m], expected_losses[m], **TOLERANCE)
    for parameter, gradient in actual_gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[parameter], **TOLERANCE, msg=lambda m, p=parameter: f"{p}: {m}"
        )


@pytest.mark.parametrize(("name", "changes"), CHANGES, ids=lambda v: v if isinstance(v, str) else next(iter(v)))
def test_settings_take_effect(name: str, changes: dict[str, Any]):
    ids = members()[0][None]
    with torch.no_grad():
        one, other = (build(name, "eager", c)(input_ids=ids, use_cache=False).logits for c in (None, changes))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Qwen3NextConfig(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2), "linear_attention"),
        (DeepseekV3Config(), "multi-head latent attention"),
        (AutoConfig.for_model("falcon_h1"), "hybrid"),
        (AutoConfig.for_model("mamba"), "recurrent|mamba"),
        (AutoConfig.for_model("llama4_text"), "chunked_attention"),
        (T5Config(), "encoder-decoder"),
        (LlamaConfig(is_causal=False), "bidirectional"),
        (AutoConfig.for_model("minimax_m3_vl_text"), "sparse attention"),
        (AutoConfig.for_model("mimo_v2_flash"), "v_head_dim"),
        (AutoConfig.for_model("bloom"), "attention interface"),
        (AutoConfig.for_model("doge"), "attention masks"),
    ],
    ids=lambda v: getattr(v, "model_type", ""),
)
def test_unpackable_models_are_refused_by_name(config, named: str):
    with pytest.raises(ValueError, match=named) as error:
        check_model(config)
    assert config.model_type in str(error.value)
    assert "sdpa" in str(error.value), "the remedy is named"


def test_positions_that_do_not_begin_at_0_are_refused():
    config = RobertaConfig(**{**COMMON, "pad_token_id": 1}, is_decoder=True)
    with pytest.raises(ValueError, match="roberta counts its positions from padding_idx"):
        check_model(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(("name", "limit"), [("phi3", 32), ("dynamic", 64)])
def test_rope_of_the_longest_sequence_is_refused(name: str, limit: int):
    """Beyond the limit the frequencies of a batch are those of its longest sequence."""
    model = build("phi3", "leaf") if name == "phi3" else build("llama", "leaf", {"rope_parameters": DYNAMIC})
    fits, too_long = (SharedPrefixLayout.from_groups([[[3] * 8], [[3] * n]]) for n in (limit, limit + 1))
    model(**packed_inputs(*fits))
    with pytest.raises(
        ValueError, match=f"a sequence of {limit + 1} tokens changes the (longrope|dynamic) frequencies"
    ):
        model(**packed_inputs(*too_long))


def test_misuse_raises_with_the_remedy():
    model = build("llama", "leaf")
    layout, ids = SharedPrefixLayout.from_groups([[[3, 4, 5]]])
    inputs = packed_inputs(layout, ids)
    with pytest.raises(ValueError, match="packed_inputs: wants"):
        packed_inputs(ids, layout)
    with pytest.raises(ValueError, match="packed_inputs: wants"):
        packed_inputs(layout, ids[:2])
    with pytest.raises(ValueError, match="needs layout="):
        model(input_ids=ids[None])
    with pytest.raises(ValueError, match="attention_mask must be None"):
        model(**inputs, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"rule of its own to the causal mask"):
        create_causal_mask(
            model.config, model.get_input_embeddings()(ids[None]), None, None, or_mask_function=lambda b, h, q, k: q > 1
        )
    with pytest.raises(ValueError, match="bidirectional"):
        model(**inputs, is_causal=False)
    with pytest.raises(ValueError, match=r"LlamaAttention received cu_seq_lens_q, .* leave it out"):
        model(**inputs, cu_seq_lens_q=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="batch of 1"):
        model(**{**inputs, "input_ids": ids.expand(2, 3)})
    with pytest.raises(ValueError, match=r"use_cache=False|set_attn_implementation"):
        model.generate(ids[None], max_new_tokens=2)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout must be 0"):
        model(**inputs)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_models_reach_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch):
    """What `auto` runs on a GPU, in the interpreter: window, softcap, sinks, transposed views, gradients."""
    pytest.importorskip("triton")
    from leaf_kernels.ops.pruned_attention import api, op

    root = sequences()[0][0]
    layout, input_ids = SharedPrefixLayout.from_groups([[root, root[:9] + root[11:]]])
    results = []
    for impl in (Impl.REFERENCE, Impl.TRITON):
        model = build(name, "leaf").float()
        monkeypatch.setattr(api, "resolve_impl", lambda *_, impl=impl: impl)
        with mock.patch.object(op, "launch", wraps=op.launch) as launches:
            hidden = model.base_model(**packed_inputs(layout, input_ids)).last_hidden_state
            loss = (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum()
            results.append([hidden, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
        kernels = {call.args[0].__name__ for call in launches.call_args_list}
        assert kernels == ({"forward", "row_terms", "backward_q", "backward_kv"} if impl is Impl.TRITON else set())
    for expected, actual in zip(*results):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
