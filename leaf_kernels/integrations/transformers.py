"""`attn_implementation="leaf"`: any transformers decoder on packs that share prefixes.

    from leaf_kernels import SharedPrefixLayout
    from leaf_kernels.integrations.transformers import check_model, packed_inputs, register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="leaf")
    check_model(model)  # nothing else says that a model's packs would not equal its separate sequences
    layout, input_ids = SharedPrefixLayout.from_groups([[ids_original, ids_counterfactual]])
    layout, input_ids = layout.to(model.device), input_ids.to(model.device)
    hidden = model.base_model(**packed_inputs(layout, input_ids)).last_hidden_state[0]  # [N, H]
    hidden[layout.member_rows(1)]  # every position of the counterfactual, as if it had been run alone

The layout travels as a keyword argument of the model's forward to every attention layer, also under checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from .. import SharedPrefixLayout, attention_mass, pruned_attention

NAME = "leaf"
# What transformers hands to every layer and no attention function uses
_WITHOUT_EFFECT = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
}
_REMEDY = "train it on single, unpacked sequences with its own attention (attn_implementation='sdpa' or 'eager')"


def register() -> None:
    """Makes `attn_implementation="leaf"` available. Calling it twice does no harm."""
    AttentionInterface.register(NAME, leaf_attention)
    AttentionMaskInterface.register(NAME, leaf_mask)


def packed_inputs(layout: SharedPrefixLayout, input_ids: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments for the model's forward: input_ids [N] as a batch of one, the positions, the layout, no cache.

    Do not add `labels`: the model would shift them from one sequence into the next, and a row of a shared prefix has a label
    of its own for each sequence. Gather rows with `layout.member_rows` instead, as in examples/grpo_shared_prompt.py.

    Experts are chosen per token, so mixtures are exact too. A load-balancing loss (`output_router_logits`) is not a sum over
    sequences: it is computed over the rows of the pack, where a shared prefix counts once.
    """
    if not isinstance(layout, SharedPrefixLayout) or tuple(input_ids.shape) != (layout.num_tokens,):
        raise ValueError(
            "packed_inputs: wants (layout, input_ids) as SharedPrefixLayout.from_groups returns them, got "
            f"{type(layout).__name__} and ids of shape {tuple(getattr(input_ids, 'shape', ()))}"
        )
    return {
        "input_ids": input_ids[None],
        "position_ids": layout.position_ids[None],
        "layout": layout,
        "use_cache": False,
    }


@dataclass
class MassRecorder:
    """Records the attention mass of every layer: `model(**packed_inputs(...), mass=MassRecorder(queries))`.

    Run the model under `torch.no_grad()`: a checkpointed layer that is computed again for a backward is recorded again.
    """

    queries: torch.Tensor  # [N] bool, the rows whose attention is summed
    layers: list[torch.Tensor] = field(default_factory=list)  # [Hq, N] each, see `attention_mass`


def check_model(model: PreTrainedModel | PreTrainedConfig) -> None:
    """Refuses, by name, a model whose forward on a pack would not equal that of its separate sequences.

    Raises:
        ValueError: recurrent or linear-attention layers (their state runs across segments), chunked or sparse attention,
            query and value heads of different sizes (multi-head latent attention), bidirectional models, encoder-decoders,
            models that do not route their attention through transformers' attention interface, that put into their masks
            what a layout cannot say, or (known only of a model, not of its config) whose positions do not begin at 0.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    text = config.get_text_config()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) if config is model else model
    reason = None
    other = sorted(set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    # Configurations name these sizes after the layer they belong to; no attribute says "recurrent" outright.
    values = text.to_dict()
    recurrent = [
        k for k in sorted(values) if k.startswith(("mamba_", "ssm_", "state_size", "linear_", "lru_", "conv_L_"))
    ]
    sparse = [k for k in sorted(values) if k.startswith("index_")]
    if config.is_encoder_decoder:
        reason = "is an encoder-decoder"
    elif getattr(text, "is_causal", True) is False:
        reason = "is bidirectional (is_causal=False)"
    elif other:
        reason = f"has layers of type {', '.join(other)}"
    elif recurrent:
        reason = f"has recurrent layers ({recurrent[0]})"
    elif sparse:
        reason = f"has layers of sparse attention ({sparse[0]})"
    elif getattr(text, "kv_lora_rank", None):
        reason = "uses multi-head latent attention (kv_lora_rank)"
    elif values.get("v_head_dim") not in (None, values.get("head_dim")):
        reason = "has query and value heads of different sizes (v_head_dim)"
    elif kind is not None and not kind._supports_attention_backend:
        reason = "does not use transformers' attention interface"
    elif kind is not None and not kind._supports_flash_attn:  # which takes no mask either
        reason = "puts more into its attention masks than order and a window"
    elif isinstance(model, torch.nn.Module) and _counts_positions_after_padding(model):
        reason = "counts its positions from padding_idx + 1"
    if reason is not None:
        raise ValueError(
            f"{config.model_type} {reason}, so a pack of several sequences would not equal the sequences alone; {_REMEDY}"
        )


def _counts_positions_after_padding(model: torch.nn.Module) -> bool:
    """RoBERTa and its descendants: their own positions are not those of `position_ids`."""
    return any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for name, module in model.named_modules()
    )


@dataclass(frozen=True)
class PackMask:
    """The mask that attention layers receive: a window, everything else is in the layout.

    Some models give a window to their masks only, not to the attention function. Eager and SDPA obey the mask; so do packs.
    """

    window: int | None
    __iter__ = None  # or `__getitem__` would make it endless

    def __getitem__(self, rows: tuple[Any, ...]) -> PackMask:
        """Gemma 4 cuts its masks to the rows that its last layers keep; for a pack these are all."""
        return self


def leaf_mask(
    *, attention_mask: torch.Tensor | None = None, local_size: int | None = None, use_vmap: bool = False, **_: Any
) -> PackMask:
    """transformers' mask function."""
    if attention_mask is not None:
        raise ValueError(
            "attn_implementation='leaf': attention_mask must be None, a pack has no padding; pass layout=..., or use "
            "model.set_attn_implementation('sdpa') for padded batches and for generate()"
        )
    if use_vmap:  # set by transformers where a model adds a mask function of its own
        raise ValueError(
            "attn_implementation='leaf': the model adds a rule of its own to the causal mask (bidirectional image tokens?), "
            f"which packs cannot follow; {_REMEDY}"
        )
    return PackMask(local_size)


def leaf_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PackMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    layout: SharedPrefixLayout | None = None,
    mass: MassRecorder | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: q/k/v [1, H, N, D] → [1, N, H, D]."""
    if layout is None:
        raise ValueError(
            "attn_implementation='leaf' needs layout=... in the model's forward (see packed_inputs), and a model that hands "
            "keyword arguments on to its attention layers; use model.set_attn_implementation('sdpa') for ordinary batches "
            "and for generate()"
        )
    if attention_mask is not None and not isinstance(attention_mask, PackMask):
        raise ValueError("attn_implementation='leaf': attention_mask must be None, the layout describes the pack")
    if dropout:
        raise ValueError(
            f"attn_implementation='leaf': attention dropout must be 0, got {dropout}; set it to 0 in the config"
        )
    if query.shape[0] != 1:
        raise ValueError(f"attn_implementation='leaf': a pack is a batch of 1, got a batch of {query.shape[0]}")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"attn_implementation='leaf': {query.shape[2]} queries but {key.shape[2]} keys; call the model with "
            "use_cache=False and without logits_to_keep"
        )
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        raise ValueError("attn_implementation='leaf': this layer is bidirectional; packs are causal")
    unknown = [k for k, v in others.items() if k not in _WITHOUT_EFFECT and v is not None and v is not False]
    if unknown:
        raise ValueError(
            f"attn_implementation='leaf': {type(module).__name__} received {', '.join(unknown)}, which packs cannot "
            f"follow; leave it out of the model's call, or, if the model adds it itself, {_REMEDY}"
        )
    _check_rope(module, layout)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = sliding_window if attention_mask is None else attention_mask.window
    options: dict[str, Any] = {"scale": scaling, "window": window, "softcap": softcap, "sinks": s_aux}
    if mass is not None:
        queries = mass.queries.to(q.device)  # elsewhere where the model spans devices
        mass.layers.append(attention_mass(q, k, layout, queries=queries, **options))
    out = pruned_attention(q, k, v, layout, **options)
    return out[None], None  # type: ignore[call-overload]  # no lse was asked for: a tensor


def _check_rope(module: torch.nn.Module, layout: SharedPrefixLayout) -> None:
    """Some rotary frequencies depend on the longest sequence of a batch: in a pack its neighbours would get them too."""
    config = getattr(module, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *rope.values()]:  # of the model, or of each type of layer
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        if kind == "longrope":
            limit = parameters["original_max_position_embeddings"]
        elif kind is not None and "dynamic" in kind:
            limit = config.max_position_embeddings  # type: ignore[union-attr]
        else:
            continue
        if layout.max_len > limit:
            raise ValueError(
                f"attn_implementation='leaf': a sequence of {layout.max_len} tokens changes the {kind} frequencies of every "
                f"sequence in the pack; keep sequences at most {limit} tokens long, or {_REMEDY}"
            )
