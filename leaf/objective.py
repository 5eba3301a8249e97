"""The distillation objective (E7), computed inside the forward of the student's own output head.

There the wrappers have gathered the head's weight, once, and look for its gradient: read from outside, it is an
unsynchronised parameter under DDP, an empty shard under FSDP and a tensor of size 0 under ZeRO-3.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from transformers import PreTrainedConfig, PreTrainedModel

from leaf_kernels import SharedPrefixLayout, linear_cross_entropy, linear_kl, linear_kl_topk


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
            f"the output head of {type(model).__name__} is empty here: ZeRO-3 has divided it among the ranks. Load both "
            "models before the training arguments are made; DeepSpeed divides the student when training starts"
        )
    return _read_head(head, model.config.get_text_config())


def _read_head(head: torch.nn.Linear, config: PreTrainedConfig) -> Head:
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite divides by what HyperCLOVA X multiplies with
    scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return Head(head.weight, head.bias, getattr(config, "final_logit_softcapping", None), float(scale))


def _is_hooked(module: torch.nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    # accelerate's hook of a `device_map` moves inputs between devices and changes no value; nor does our own keyword
    known = type(getattr(module, "_hf_hook", None)) is AlignDevicesHook or _takes_objective(module)
    replaced = "forward" in vars(module) and not known
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
    """Last hidden states [N, H] of a pack, or of the rows of a batch end to end."""
    return model.base_model(**{**inputs, "use_cache": False}).last_hidden_state.flatten(0, 1)


def install(model: PreTrainedModel) -> None:
    """Gives `model.forward` a keyword `objective`; without it the forward is what it was. Idempotent.

    `model(objective=f, **pack_inputs)` returns `f(hidden [N, H], head)`: `f` runs inside the forward of the output head, the
    logits are never made.
    """
    if _takes_objective(model):
        return
    head: Any = model.get_output_embeddings()
    inner: Any = model.forward
    # Bound methods, not closures: a deep copy of the model must call itself, not the model that it was copied from
    inner = getattr(inner, "__func__", None) or (lambda _, *args, _inner=inner, **kwargs: _inner(*args, **kwargs))

    @functools.wraps(inner)
    def forward(
        self: Any, *args: Any, objective: Callable[[torch.Tensor, Head], Any] | None = None, **kwargs: Any
    ) -> Any:
        if objective is None:
            return inner(self, *args, **kwargs)
        kwargs = {
            name: value for name, value in kwargs.items() if value is not None
        }  # PEFT fills in what was not passed
        config = self.config.get_text_config()

        def in_head(hidden: torch.Tensor, head: torch.nn.Linear) -> Any:
            return objective(hidden, _read_head(head, config))

        return self.get_output_embeddings()(hidden_states(self, kwargs), objective=in_head)

    forward.takes_objective = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    head.forward = types.MethodType(_head_forward, head)


def _head_forward(self: Any, input: torch.Tensor, objective: Callable[..., Any] | None = None) -> Any:
    return type(self).forward(self, input) if objective is None else objective(input, self)


_head_forward.takes_objective = True  # type: ignore[attr-defined]


def _takes_objective(module: Any) -> bool:
    return getattr(module.forward, "takes_objective", False)


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
    teacher_hidden: torch.Tensor | None,
    teacher_head: Head | None,
    coefficient: tuple[torch.Tensor, torch.Tensor],
    *,
    temperature: float,
    divergence: str,
    beta: float | None,
    ce_weight: float,
    vocab_size: int | None,
) -> Callable[[torch.Tensor, Head], Distillation]:
    """E7 on one pack, as a function of the student's hidden states and head.

    teacher_hidden: [N, Ht], the teacher's last hidden states on the same pack. None: the pack brings what a cache knows of
    its M `rows`, `teacher_hidden` [M, Ht] or `topk_ids` and `topk_logprobs` [M, K]. teacher_head: in the student's dtype, or
    in any under autocast; None with `topk_ids`. coefficient: what a unit of original and of counterfactual weight counts,
    see `coefficients`.
    """
    original, counterfactual = coefficient
    weight_original, weight_counterfactual, rows = (
        pack[name] for name in ("weight_original", "weight_counterfactual", "rows")
    )
    cached = teacher_hidden is None
    taught: Any = pack.get("teacher_hidden") if cached else teacher_hidden
    if cached:  # of the rows alone
        weight_original, weight_counterfactual = weight_original[rows], weight_counterfactual[rows]

    def objective(hidden: torch.Tensor, head: Head) -> Distillation:
        x = hidden[rows] if cached else hidden
        student: dict[str, Any] = {
            "token_weight": original * weight_original + counterfactual * weight_counterfactual,
            "rows": torch.arange(len(rows), device=rows.device) if cached else rows,
            "temperature": temperature,
            "vocab_size": vocab_size,
            "student_bias": head.bias,
            "student_softcap": head.softcap,
            "student_logit_scale": head.logit_scale,
        }
        if teacher_head is None:
            loss, per_token, _ = linear_kl_topk(x, head.weight, pack["topk_ids"], pack["topk_logprobs"], **student)
        else:
            loss, per_token = linear_kl(
                x,
                head.weight,
                taught.to(teacher_head.weight.dtype),
                teacher_head.weight,
                divergence=divergence,
                beta=beta,
                teacher_bias=teacher_head.bias,
                teacher_softcap=teacher_head.softcap,
                teacher_logit_scale=teacher_head.logit_scale,
                **student,
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
