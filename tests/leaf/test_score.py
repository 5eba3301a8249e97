"""Scoring equals a plain one-row implementation, and holds what it promises about gradients, memory and skips."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import tiny
import torch
import torch.nn.functional as F

from leaf import sensitivity
from leaf.data import Sample, Skip
from leaf.generate import is_out_of_memory
from leaf.score import score_samples
from leaf.sensitivity import sensitivities

ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt2")


def sample(i: int, prompt: int, response: int) -> Sample:
    g = torch.Generator().manual_seed(i)
    n = prompt + response
    scored = [0 < j < prompt - 1 for j in range(n)]
    return Sample(
        id=str(i),
        level="instruction",
        cut=0,
        text="x" * n,
        prompt_chars=prompt,
        input_ids=torch.randint(4, 200, (n,), generator=g).tolist(),
        offsets=[(j, j + 1) for j in range(n)],
        response_start=prompt,
        scored=scored,
    )


SAMPLES = [sample(0, 9, 3), sample(1, 4, 1), sample(2, 14, 5), sample(3, 6, 6)]


def models(arch: str, tied: bool = False):
    tokenizer = tiny.tokenizer()
    make = lambda seed, hidden: tiny.model(  # noqa: E731
        tokenizer, arch=arch, seed=seed, hidden=hidden, tie_word_embeddings=tied
    ).double()
    return lambda: make(0, 32), lambda: make(1, 16)


def plain(model, s: Sample):
    """One row, full logits, the gradient read from the embedding layer's output."""
    caught = []

    def catch(module, args, output):
        output.retain_grad()
        caught.append(output)

    handle = model.get_input_embeddings().register_forward_hook(catch)
    ids = torch.tensor(s.input_ids)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    handle.remove()
    loss = F.cross_entropy(logits[s.response_start - 1 : -1], ids[s.response_start :])
    loss.backward()
    nll = F.cross_entropy(logits[:-1], ids[1:], reduction="none").detach()
    return caught[0].grad[0].norm(dim=-1), loss.item(), nll


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("max_tokens", "checkpointing"), [(1, True), (1000, False), (1000, True)])
def test_equals_a_plain_implementation(
    arch: str, tied: bool, max_tokens: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sensitivity.TILE_ROWS, "cpu", 7)
    teacher, student = models(arch, tied)
    rows = list(
        score_samples(
            SAMPLES,
            teacher,
            student,
            max_tokens=max_tokens,
            perplexity=True,
            activation_checkpointing=checkpointing,
        )
    )
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"]
    for s, row in zip(SAMPLES, rows):
        scored = torch.tensor(s.scored)
        normalised = []
        for name, load in (("teacher", teacher), ("student", student)):
            norm, loss, nll = plain(load(), s)
            mine = torch.tensor([math.nan if x is None else x for x in row[f"{name}_norm"]], dtype=torch.float64)
            assert torch.equal(mine.isnan(), ~scored)
            torch.testing.assert_close(mine[scored], norm[scored], rtol=1e-6, atol=0)
            assert row[f"{name}_loss"] == pytest.approx(loss, rel=1e-6)
            norm = norm[scored]
            normalised.append((norm - norm.min()) / (norm.max() - norm.min()))
        expected_nll = torch.cat([torch.zeros(1), nll])[scored]
        actual_nll = torch.tensor([x for x in row["student_nll"] if x is not None], dtype=torch.float64)
        torch.testing.assert_close(actual_nll, expected_nll.double(), rtol=1e-4, atol=1e-5)
        if scored.sum() > 2:
            difference = normalised[0] - normalised[1]
            expected = (difference - difference.min()) / (difference.max() - difference.min())
            actual = torch.tensor([x for x in row["score"] if x is not None], dtype=torch.float64)
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_no_parameter_ever_has_a_gradient_and_dropout_is_off():
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer, attention_dropout=0.5).train()
    first = list(sensitivities(model, SAMPLES, max_tokens=64))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    again = list(sensitivities(model, SAMPLES, max_tokens=64))
    for a, b in zip(first, again):
        assert torch.equal(a.norm, b.norm)


def test_one_model_is_resident_at_a_time():
    alive = []

    def loader(seed: int):
        def load():
            assert not any(ref() is not None for ref in alive), "the other model is still in memory"
            model = tiny.model(tiny.tokenizer(), seed=seed)
            alive.extend(map(weakref.ref, [model, *model.parameters()]))
            return model

        return load

    assert len(list(score_samples(SAMPLES, loader(0), loader(1), max_tokens=64))) == len(SAMPLES)
    assert len(alive) > 2


def test_no_logits_are_held():
    """Beyond a chunk of the response rows: no allocation of tokens × vocabulary."""
    from leaf_kernels.testing import record_allocations

    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer, hidden=16, vocab_size=5000)
    long = sample(5, 200, 4)
    with record_allocations() as sizes:
        list(sensitivities(model, [long], max_tokens=1000, activation_checkpointing=False))
    weight = 5000 * 16
    assert max(sizes) <= weight
    assert sum(s >= 5000 * 100 for s in sizes) == 0


def test_skips_stay_in_order_and_non_finite_is_a_reason():
    teacher, student = models("llama")

    def broken():
        model = student()
        with torch.no_grad():
            model.get_input_embeddings().weight[SAMPLES[2].input_ids[1]] = math.nan
        return model

    items = [SAMPLES[0], Skip("a", "too_long", "9 tokens"), SAMPLES[2]]
    rows = list(score_samples(items, teacher, broken, max_tokens=64))
    assert [(r["id"], r["status"], r["reason"]) for r in rows] == [
        ("0", "ok", None),
        ("a", "skipped", "too_long"),
        ("2", "skipped", "non_finite"),
    ]
    assert set(rows[0]) == set(rows[1]), "every row has every column"
    assert rows[1]["score"] is None


# -- what is computed, and what is kept --------------------------------------------------------------------------------


class Rows:
    """Counts the rows that enter each layer's MLP."""

    def __init__(self, model):
        self.model, self.counts = model, [0] * len(model.model.layers)
        for n, layer in enumerate(model.model.layers):
            layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args, n=n: self.add(n, args[0].shape[1]))

    def add(self, layer: int, rows: int) -> None:
        self.counts[layer] += rows


@pytest.mark.parametrize(("checkpointing", "forwards"), [(False, 1), (True, 2)])
def test_an_mlp_is_computed_once_and_again_only_for_its_gradient_and_the_last_on_response_rows_only(
    checkpointing: bool, forwards: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sensitivity.TILE_ROWS, "cpu", 16)
    model = tiny.model(tiny.tokenizer(), layers=3)
    scorer = sensitivity.Scorer(model, activation_checkpointing=checkpointing)
    rows = Rows(model)
    scorer(SAMPLES)
    tokens, targets = sum(len(s.input_ids) for s in SAMPLES), sum(len(s.input_ids) - s.response_start for s in SAMPLES)
    assert rows.counts == [forwards * tokens, forwards * tokens, forwards * targets]


def test_an_mlp_that_mixes_rows_is_left_alone():
    def mixing(seed: int):
        model = tiny.model(tiny.tokenizer(), seed=seed).double()
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_hook(lambda _, __, out: out.cumsum(1))
        return model

    (alone,) = sensitivities(mixing(0), SAMPLES[:1], max_tokens=1, activation_checkpointing=True)
    torch.testing.assert_close(alone.norm[:9].float(), plain(mixing(0), SAMPLES[0])[0][:9].float(), rtol=1e-6, atol=0)


def test_activations_are_kept_where_they_take_no_more_than_the_weights():
    model = tiny.model(tiny.tokenizer(), vocab_size=5000)
    scorer = sensitivity.Scorer(model)
    weights = sum(p.nbytes for p in model.parameters())
    per_token = sensitivity.activation_bytes_per_token(model)
    assert 2 * 32 * 4 * 5 < per_token < 2 * 32 * 4 * 50, "2 layers of 32: hidden states, q, k, v, gate, up, …"
    assert scorer.keeps == pytest.approx(weights / per_token)
    rows, small = Rows(model), int(scorer.keeps) // 14 * [sample(0, 9, 5)]
    scorer(small)
    assert rows.counts[0] == 14 * len(small)
    scorer([*small, SAMPLES[2]])
    assert rows.counts[0] == 14 * len(small) + 2 * (14 * len(small) + 19), (
        "each row twice: the layers were checkpointed"
    )


def test_memory_grows_with_tokens_only_by_a_checkpoint_per_layer(monkeypatch: pytest.MonkeyPatch):
    """Nothing else is kept of a layer: what one layer works with is there once, whatever their number."""
    from leaf_kernels.ops.linear_kl import op
    from leaf_kernels.testing import record_peak_bytes

    monkeypatch.setattr(op, "_topk", op.topk)  # the recorder does not see inside an operator
    monkeypatch.setitem(sensitivity.TILE_ROWS, "cpu", 64)

    def peak(layers: int, tokens: int) -> int:
        model = tiny.model(tiny.tokenizer(), layers=layers, vocab_size=3000)
        scorer = sensitivity.Scorer(model, activation_checkpointing=True)
        with record_peak_bytes() as bytes_:
            scorer([sample(0, tokens - 8, 8)])
        return bytes_[0]

    slope = {layers: (peak(layers, 1024) - peak(layers, 512)) / 512 for layers in (3, 8)}
    assert slope[8] - slope[3] == pytest.approx(5 * 32 * 4, rel=0.02)
    assert slope[3] < 32 * 4 * 30


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_model_is_left_as_it_was_but_for_its_mode(arch: str):
    model = tiny.model(tiny.tokenizer(), arch=arch)
    before = {name: vars(module).keys() for name, module in model.named_modules()}
    scorer = sensitivity.Scorer(model, activation_checkpointing=True)
    scorer(SAMPLES)
    scorer(SAMPLES)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == before
    assert not any(module.training or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("checkpointing", [None, True])
def test_nothing_of_a_model_outlives_it(checkpointing: bool | None):
    model = tiny.model(tiny.tokenizer(), layers=3)
    parameters = [weakref.ref(p) for p in model.parameters()]
    list(sensitivities(model, SAMPLES, max_tokens=64, activation_checkpointing=checkpointing))
    del model
    gc.collect()
    assert not any(p() is not None for p in parameters)


def test_checkpoints_drop_nothing_out():
    """OPT's layers drop out by themselves, wherever they are in train mode."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.5,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    kept, checkpointed = (
        list(sensitivities(model, SAMPLES, max_tokens=64, activation_checkpointing=how)) for how in (False, True)
    )
    for a, b in zip(kept, checkpointed):
        torch.testing.assert_close(a.norm, b.norm)


# -- memory that does not suffice --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_checkpointed_then_cut_then_skipped(monkeypatch: pytest.MonkeyPatch):
    """A card that holds 30 tokens with their activations and 50 where they are checkpointed."""
    model = tiny.model(tiny.tokenizer(), layers=3)
    scorer = sensitivity.Scorer(model, activation_checkpointing=False)
    tried, measure = [], scorer._measure

    def measured(batch):
        tokens = sum(len(s.input_ids) for s in batch)
        checkpoints = "forward" in vars(scorer.layers[0])
        tried.append((tokens, checkpoints))
        if tokens > (50 if checkpoints else 30):
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
        return measure(batch)

    monkeypatch.setattr(scorer, "_measure", measured)
    short, long = [sample(n, 6, 4) for n in range(6)], sample(9, 50, 10)
    expected = list(sensitivities(tiny.model(tiny.tokenizer(), layers=3), short, max_tokens=1))

    def results(batch):
        tried.clear()
        return scorer(batch)

    for got, want in zip(results(short), expected, strict=True):  # 60 tokens
        torch.testing.assert_close(got.norm, want.norm)
    assert tried == [(60, False), (60, True), (30, False), (30, False)]
    assert len(results(short[:4])) == 4
    assert tried == [(40, False), (40, True)], "more than 30 may still fit: 60 did not"
    results(short[:5])
    assert tried == [(50, True)], "40 did not fit with activations, so 50 is not tried"
    assert results([long]) == [Skip("9", "oom", "60 tokens do not fit into memory, not even alone")]
    assert tried == [], "60 did not fit with checkpoints either"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), False),
    ],
)
def test_what_counts_as_a_lack_of_memory(error: RuntimeError, is_memory: bool):
    assert is_out_of_memory(error) == is_memory
