"""`attn_implementation="leaf"`: any transformers decoder on packs that share prefixes.

    from leaf_kernels import SharedPrefixLayout
    from leaf_kernels.integrations.transformers import packed_inputs, register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="leaf")
    layout, input_ids = SharedPrefixLayout.from_groups([[ids_original, ids_counterfactual]])
    hidden = model.model(**packed_inputs(layout, input_ids)).last_hidden_state[0]  # [N, H]
    hidden[layout.member_rows(1)]  # every position of the counterfactual, as if it had been run alone

The layout travels as a keyword argument of the model's forward to every attention layer, also under checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from .. import SharedPrefixLayout, attention_mass, pruned_attention

NAME = "leaf"
_REMEDY = "train it on single, unpacked sequences with its own attention (attn_implementation='sdpa' or 'eager')"


def register() -> None:
    """Makes `attn_implementation="leaf"` available. Calling it twice does no harm."""
    AttentionInterface.register(NAME, leaf_attention)
    AttentionMaskInterface.register(NAME, leaf_mask)


def packed_inputs(layout: SharedPrefixLayout, input_ids: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments for the model's forward: input_ids [N] as a batch of one, the positions, the layout, no cache."""
    return {
        "input_ids": input_ids[None],
        "position_ids": layout.position_ids[None],
        "layout": layout,
        "use_cache": False,
    }


@dataclass
class MassRecorder:
    """Records the attention mass of every layer: `model(**packed_inputs(...), mass=MassRecorder(queries))`."""

    queries: torch.Tensor  # [N] bool, the rows whose attention is summed
    layers: list[torch.Tensor] = field(default_factory=list)  # [Hq, N] each, see `attention_mass`


def check_model(model: PreTrainedModel | PreTrainedConfig) -> None:
    """Refuses, by name, a model whose forward on a pack would not equal that of its separate sequences.

    Raises:
        ValueError: recurrent or linear-attention layers (their state runs across segments), chunked or sparse attention,
            multi-head latent attention (query and value heads of different sizes), encoder-decoders, and models that do not
            route their attention through transformers' attention interface.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    text = config.get_text_config()
    reason = None
    other = sorted(set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    # Configurations name these sizes after the layer they belong to; no attribute says "recurrent" outright.
    recurrent = sorted(
        k for k in text.to_dict() if k.startswith(("mamba_", "ssm_", "state_size", "linear_", "lru_", "conv_L_"))
    )
    if config.is_encoder_decoder:
        reason = "is an encoder-decoder"
    elif other:
        reason = f"has layers of type {', '.join(other)}"
    elif recurrent:
        reason = f"has recurrent layers ({recurrent[0]})"
    elif getattr(text, "kv_lora_rank", None):
        reason = "uses multi-head latent attention (kv_lora_rank)"
    elif isinstance(model, PreTrainedModel) and not model._supports_attention_backend:
        reason = "does not use transformers' attention interface"
    if reason is not None:
        raise ValueError(
            f"{config.model_type} {reason}, so a pack of several sequences would not equal the sequences alone; {_REMEDY}"
        )


def leaf_mask(*, attention_mask: torch.Tensor | None = None, **_: Any) -> None:
    """The mask that attention layers receive: none, the layout holds it."""
    if attention_mask is not None:
        raise ValueError(
            "attn_implementation='leaf': attention_mask must be None, a pack has no padding; pass layout=..., or use "
            "model.set_attn_implementation('sdpa') for padded batches and for generate()"
        )


def leaf_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    layout: SharedPrefixLayout | None = None,
    mass: MassRecorder | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: q/k/v [1, H, N, D] → [1, N, H, D]."""
    if layout is None:
        raise ValueError(
            "attn_implementation='leaf' needs layout=... in the model's forward (see packed_inputs); use "
            "model.set_attn_implementation('sdpa') for ordinary batches and for generate()"
        )
    if attention_mask is not None:
        raise ValueError("attn_implementation='leaf': attention_mask must be None, the layout describes the pack")
    if dropout:
        raise ValueError(
            f"attn_implementation='leaf': attention dropout must be 0, got {dropout}; set it to 0 in the config"
        )
    if query.shape[0] != 1:
        raise ValueError(f"attn_implementation='leaf': a pack is a batch of 1, got a batch of {query.shape[0]}")
    if key.shape[2] != query.shape[2]:
        raise ValueError("attn_implementation='leaf': a key/value cache is in use; call the model with use_cache=False")
    if getattr(module, "is_causal", True) is False:
        raise ValueError("attn_implementation='leaf': this layer is bidirectional; packs are causal")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
    if mass is not None:
        mass.layers.append(attention_mass(q, k, layout, queries=mass.queries, **options))
    out = pruned_attention(q, k, v, layout, **options)
    return out[None], None  # type: ignore[call-overload]  # no lse was asked for: a tensor
