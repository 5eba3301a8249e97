"""A model's own path from hidden states to logits, and ours: every post-processing, tied and untied, adapters and hooks."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from leaf.objective import check_head, distillation, head_of, install
from leaf.sensitivity import sensitivities

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
# model type: what its config says beside COMMON, and (scale, softcap) of its logits
HEADS = {
    "llama": ({}, (1, None)),
    "gpt2": ({"n_embd": 16, "n_layer": 1, "n_head": 2}, (1, None)),
    "phi": ({}, (1, None)),  # a bias
    "gemma2": ({"final_logit_softcapping": 0.7}, (1, 0.7)),
    "gemma3_text": ({"final_logit_softcapping": 0.7}, (1, 0.7)),
    "nanochat": ({"final_logit_softcapping": 0.7}, (1, 0.7)),
    "cohere": ({"logit_scale": 0.25}, (0.25, None)),
    "cohere2": ({"logit_scale": 0.25}, (0.25, None)),
    "granite": ({"logits_scaling": 4.0}, (0.25, None)),
    "granitemoe": ({"logits_scaling": 4.0, "num_local_experts": 2, "num_experts_per_tok": 1}, (0.25, None)),
    "hyperclovax": ({"logits_scaling": 4.0}, (4, None)),
    "opt": ({"ffn_dim": 32, "word_embed_proj_dim": 8}, (1, None)),  # its logits do not pass through model.base_model
    "falcon_h1": ({"lm_head_multiplier": 0.5, **MAMBA}, (0.5, None)),
}


def model(kind: str, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    options = HEADS[kind][0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **{**COMMON, "tie_word_embeddings": tied, **options})
        result = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in result.parameters():  # large logits, and no bias of zeros
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return result


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradients_are_those_of_the_models_own_logits(kind, tied):
    student, teacher = model(kind, tied), model(kind, tied, seed=1).requires_grad_(False)
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    scale, softcap = HEADS[kind][1]
    assert (head_of(student).logit_scale, head_of(student).softcap) == (pytest.approx(scale), softcap)
    check_head(student)
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))
    rows, labels = torch.arange(8), ids[0, 1:]

    own = student(input_ids=ids).logits[0]
    with torch.no_grad():
        theirs = teacher(input_ids=ids).logits[0]
        teacher_hidden = teacher.base_model(input_ids=ids).last_hidden_state[0]
    q, p = F.log_softmax(own.float() / 2, -1), F.log_softmax(theirs.float() / 2, -1)
    expected = 4 * F.kl_div(q[:-1], p[:-1], reduction="sum", log_target=True) + 0.5 * F.cross_entropy(
        own[:-1], labels, reduction="sum"
    )
    names, parameters = zip(*student.named_parameters())
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)

    pack = {
        "rows": rows,
        "weight_original": (torch.arange(9) < 8).float(),
        "weight_counterfactual": torch.zeros(9),
        "labels": labels,
        "label_rows": rows,
        "label_weight": torch.ones(8),
        "label_is_original": torch.ones(8, dtype=torch.bool),
    }
    objective = distillation(
        pack, teacher_hidden, head_of(teacher), (torch.tensor(1.0), torch.tensor(0.0)),
        temperature=2.0, divergence="forward_kl", beta=None, ce_weight=0.5, vocab_size=None,
    )  # fmt: skip
    install(student)
    loss = student(objective=objective, input_ids=ids).loss
    got = torch.autograd.grad(loss, parameters, allow_unused=True)

    assert expected > 1
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, a, b in zip(names, got, wanted):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_scoring_refuses_what_the_check_refuses():
    tokenizer = tiny.tokenizer()
    plain = tiny.model(tokenizer, logit_scale=0.25)
    with pytest.raises(ValueError, match="are not those of its output head"):
        next(sensitivities(plain, [], max_tokens=64), None)


def test_scores_are_those_of_the_models_own_logits():
    tokenizer = tiny.tokenizer()
    capped = tiny.model(tokenizer, arch="gemma2", final_logit_softcapping=0.05)
    ids = tokenizer("Eva is 5 years old. Tom has 2 books.")["input_ids"]
    start = len(ids) - 4
    sample = type("Sample", (), {"input_ids": ids, "response_start": start, "scored": [True] * len(ids)})()
    (got,) = sensitivities(capped, [sample], max_tokens=64, activation_checkpointing=False)

    capped.set_attn_implementation("eager")
    embeddings = capped.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    logits = capped(inputs_embeds=embeddings).logits[0, start - 1 : -1]
    loss = F.cross_entropy(logits, torch.tensor(ids[start:]))
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert got.loss == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(got.norm, gradient[0].norm(dim=-1), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "granitemoe"])
def test_the_check_accepts_every_dtype_and_leaves_no_trace(kind, dtype):
    checked = model(kind).to(dtype).train()
    checked.base_model.layers[0].eval()
    ids = torch.arange(3, 9)[None]
    before, state = checked(input_ids=ids).logits, torch.random.get_rng_state()
    check_head(checked)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(checked(input_ids=ids).logits, before)
    assert checked.training
    assert not checked.base_model.layers[0].training


def test_a_failing_forward_leaves_the_mode_as_it_was():
    broken = model("llama").train()
    broken.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check_head(broken)
    assert broken.training


def test_an_empty_head_says_so():
    sharded = model("llama")
    sharded.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="is empty here: ZeRO-3 has divided it"):
        check_head(sharded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "value"),
    [("final_logit_softcapping", 5.0), ("logit_scale", 1.03), ("logits_scaling", 0.97), ("lm_head_multiplier", 0.97)],
)
def test_a_config_that_names_what_the_class_does_not_do_is_refused(name, value, dtype):
    plain = model("llama").to(dtype)
    setattr(plain.config, name, value)
    with pytest.raises(ValueError, match=r"(?s)logits of LlamaForCausalLM are not those .* of their norm apart"):
        check_head(plain)


def test_a_class_that_does_more_to_its_logits_is_refused():
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, **kwargs):
            result = super().forward(**kwargs)
            result.logits = result.logits * 1.01
            return result

    with pytest.raises(ValueError, match="in a way that LeaF does not know"):
        check_head(Shifted(model("llama").config))


def hooked(head: torch.nn.Linear, how: str) -> None:
    if how == "patched":  # as accelerate's offloading does
        head.forward = torch.nn.Linear.forward.__get__(head)
    elif how == "parametrised":
        torch.nn.utils.parametrizations.weight_norm(head)
    else:
        getattr(head, f"register_{how}")(lambda *_: None)


@pytest.mark.parametrize(
    "how",
    ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "patched", "parametrised"],
)
def test_a_head_that_is_more_than_its_weight_is_refused(how):
    plain = model("llama")
    hooked(plain.lm_head, how)
    with pytest.raises(ValueError, match=r"must be a plain torch\.nn\.Linear without hooks"):
        check_head(plain)


def test_lora_on_the_body_has_the_gradients_of_the_models_own_logits_and_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model("gemma2"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    student, teacher = adapted.get_base_model(), model("gemma2", seed=1).requires_grad_(False)
    check_head(student)
    ids = torch.arange(3, 12)[None]
    teacher_hidden = teacher.base_model(input_ids=ids).last_hidden_state[0].detach()
    p = F.log_softmax(teacher(input_ids=ids).logits[0], -1).detach()
    expected = F.kl_div(F.log_softmax(adapted(input_ids=ids).logits[0], -1), p, reduction="sum", log_target=True)
    trained = [x for x in adapted.parameters() if x.requires_grad]
    wanted = torch.autograd.grad(expected, trained)
    pack = {"rows": None, "weight_original": torch.ones(9), "weight_counterfactual": torch.zeros(9)}
    objective = distillation(
        pack, teacher_hidden, head_of(teacher), (torch.tensor(1.0), torch.tensor(0.0)),
        temperature=1.0, divergence="forward_kl", beta=None, ce_weight=0.0, vocab_size=None,
    )  # fmt: skip
    install(student)
    loss = adapted(objective=objective, input_ids=ids).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert math.isfinite(loss.item())
    assert len(trained) == 2
    for a, b in zip(torch.autograd.grad(loss, trained), wanted):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    for options in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        on_head = peft.get_peft_model(model("llama"), peft.LoraConfig(r=2, **options))
        with pytest.raises(ValueError, match="leave lm_head out of target_modules"):
            check_head(on_head.get_base_model())
