"""The distillation objective (E7), computed inside the student's own forward.

Loss and head run inside the wrapped model's forward, where wrappers look for gradients: a head that is read
from outside is an unsynchronised parameter under DDP, an empty shard under FSDP and a tensor of size 0 under ZeRO-3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from transformers import PreTrainedModel

from leaf_kernels import SharedPrefixLayout, linear_cross_entropy, linear_kl


class Head(NamedTuple):
    """The output head: logits = softcap(logit_scale · (hidden · weightᵀ + bias))."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model, with the post-processing that its config asks for. See `check_head`.

    Raises:
        ValueError: the head is not a plain linear layer (an adapter, a hook, a parametrisation), whose effect would be lost
            if its weight were read, or its weight is not on a device.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or _is_hooked(head):
        raise ValueError(
            f"the output head of {type(model).__name__} must be a plain torch.nn.Linear without hooks, got "
            f"{type(head).__name__}; put adapters on the body only (for LoRA: leave lm_head out of target_modules)"
        )
    _refuse_offloaded(model, "output head", head)
    if head.weight.numel() == 0:
        raise ValueError(
            f"the output head of {type(model).__name__} is empty here; gather it if it is sharded (ZeRO-3)"
        )
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite divides by what HyperCLOVA X multiplies with
    scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return Head(head.weight, head.bias, getattr(config, "final_logit_softcapping", None), float(scale))


def _is_hooked(module: torch.nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    # accelerate's hook of a `device_map` moves inputs between devices and changes no value
    replaced = "forward" in vars(module) and type(getattr(module, "_hf_hook", None)) is not AlignDevicesHook
    return replaced or any(getattr(module, name) for name in hooks)


def _refuse_offloaded(model: PreTrainedModel, name: str, module: torch.nn.Module) -> None:
    if module.weight.is_meta:
        raise ValueError(
            f"the {name} of {type(model).__name__} is offloaded to host memory or disk by its device_map, and its weight is "
            "read; only layers can be offloaded: use more GPUs, a quantized teacher (--teacher-quantization) or one that "
            "processes share (--shard-teacher)"
        )


def check_head(model: PreTrainedModel) -> None:
    """Holds the model's own logits of a few tokens against what `head_of` says of its last hidden states.

    Raises:
        ValueError: they differ: the model does something between its body and its logits, or its config names a scale or a
            cap that its class does not apply. Losses computed from the head would then be another model's. Or head or
            embeddings are offloaded.
    """
    head, modes = head_of(model), {module: module.training for module in model.modules()}
    embeddings: Any = model.get_input_embeddings()
    _refuse_offloaded(model, "input embedding", embeddings)
    layout = SharedPrefixLayout.from_lengths([8]).to(embeddings.weight.device)
    ids = layout.position_ids[None].long()
    inputs = {"input_ids": ids % len(head.weight), "position_ids": ids, "layout": layout}
    try:
        with torch.no_grad():
            model.eval()
            hidden, own = hidden_states(model, inputs), model(**inputs, use_cache=False).logits[0].float()
            hidden, own = hidden.to(head.weight.device), own.to(head.weight.device)
    finally:
        for module, training in modes.items():
            module.training = training
    with torch.no_grad():
        ours = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
        if head.softcap is not None:
            ours = head.softcap * torch.tanh(ours / head.softcap)
        error, size = (own - ours).norm().item(), own.norm().item()
    # Both round the same products; a model then scales and caps them in its own dtype
    eps = max(torch.finfo(dtype).eps for dtype in (head.weight.dtype, torch.float32))
    if error > 2 * eps * size:  # NaN weights are the trainer's to report
        raise ValueError(
            f"the logits of {type(model).__name__} are not those of its output head with logit_scale={head.logit_scale:g} "
            f"and softcap={head.softcap}, as read from its config: they are {error / size:.1%} of their norm apart. "
            "Either its config names a scale or a cap that this class does not apply (remove it), or the class changes its "
            "logits in a way that LeaF does not know"
        )


def hidden_states(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Last hidden states [N, H] of a pack."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state[0]


def install(model: PreTrainedModel) -> None:
    """Gives `model.forward` a keyword `objective`; without it the forward is what it was. Idempotent.

    `model(objective=f, **pack_inputs)` returns `f(hidden [N, H], head)`: the body and `f` run inside the forward, the logits
    are never made.
    """
    if getattr(model.forward, "takes_objective", False):
        return
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, objective: Callable[[torch.Tensor, Head], Any] | None = None, **kwargs: Any) -> Any:
        if objective is None:
            return original(*args, **kwargs)
        kwargs = {
            name: value for name, value in kwargs.items() if value is not None
        }  # PEFT fills in what was not passed
        return objective(hidden_states(model, kwargs), head_of(model))

    forward.takes_objective = True  # type: ignore[attr-defined]
    model.forward = forward  # type: ignore[method-assign]


class Distillation(NamedTuple):
    """Result of the objective; the sums are over this pack, detached, and weighted as `Collator` counts."""

    loss: torch.Tensor
    kl_original: torch.Tensor  # Σ weight_original · KL
    kl_counterfactual: torch.Tensor  # Σ weight_counterfactual · KL


def coefficients(counts: torch.Tensor, lambda_: float, concat: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a unit of original and of counterfactual weight counts in the loss; no host sync.

    counts: (N_o, N_c), the weights summed over the optimiser step and all ranks. Pair: λ/N_o and (1−λ)/N_c, the whole weight
    on one side where the other is empty. Concat: one divisor for both.
    """
    n_original, n_counterfactual = counts.unbind()
    if concat:
        one = 1 / counts.sum().clamp_min(1)
        return one, one
    lam = torch.where(n_counterfactual == 0, 1.0, torch.where(n_original == 0, 0.0, lambda_))
    return lam / n_original.clamp_min(1e-30), (1 - lam) / n_counterfactual.clamp_min(1e-30)


def distillation(
    pack: dict[str, Any],
    teacher_hidden: torch.Tensor,
    teacher_head: Head,
    coefficient: tuple[torch.Tensor, torch.Tensor],
    *,
    temperature: float,
    divergence: str,
    beta: float | None,
    ce_weight: float,
    vocab_size: int | None,
) -> Callable[[torch.Tensor, Head], Distillation]:
    """E7 on one pack, as a function of the student's hidden states and head.

    teacher_hidden: [N, Ht], the teacher's last hidden states on the same pack. teacher_head: in the student's dtype, or in
    any under autocast. coefficient: what a unit of original and of
    counterfactual weight counts, see `coefficients`.
    """
    original, counterfactual = coefficient

    def objective(hidden: torch.Tensor, head: Head) -> Distillation:
        weight_original, weight_counterfactual = pack["weight_original"], pack["weight_counterfactual"]
        loss, per_token = linear_kl(
            hidden,
            head.weight,
            teacher_hidden.to(teacher_head.weight.dtype),
            teacher_head.weight,
            token_weight=original * weight_original + counterfactual * weight_counterfactual,
            rows=pack["rows"],
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            vocab_size=vocab_size,
            student_bias=head.bias,
            teacher_bias=teacher_head.bias,
            student_softcap=head.softcap,
            teacher_softcap=teacher_head.softcap,
            student_logit_scale=head.logit_scale,
            teacher_logit_scale=teacher_head.logit_scale,
        )
        if ce_weight:
            label_coefficient = torch.where(pack["label_is_original"], original, counterfactual)
            loss = (
                loss
                + ce_weight
                * linear_cross_entropy(
                    hidden[pack["label_rows"]],
                    head.weight,
                    pack["labels"],
                    token_weight=label_coefficient * pack["label_weight"],
                    rows=torch.arange(len(pack["labels"]), device=hidden.device),
                    bias=head.bias,
                    softcap=head.softcap,
                    logit_scale=head.logit_scale,
                    vocab_size=vocab_size,
                )[0]
            )
        return Distillation(loss, (weight_original * per_token).sum(), (weight_counterfactual * per_token).sum())

    return objective
