"""What rows of the benchmarks say of memory and rooflines: bytes are those allocated, work is that of closed forms."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    attention,
    attention_mass,
    cross_entropy,
    e2e,
    linear_kl,
    losses,
    scoring_gpu,
    timing,
    token_scores,
)
from leaf_kernels import SharedPrefixLayout, pruned_attention

CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
ANCHORS = {"case": "anchors", "copy_gb_s": 2000.0, "matmul_tflop_s": 500.0, "gpu": "some GPU"}


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_allocated_bytes_are_those_of_the_run(device):
    """A megabyte stays from the setup, which is not counted; of 3 and 2 the first is gone when 4 are made."""
    mib = 2**20

    def make(n: int) -> torch.Tensor:
        return torch.ones(n * mib, dtype=torch.int8, device=device)

    def run(state: torch.Tensor) -> None:
        a, b = make(3), make(2)
        del a
        c = make(4)
        assert len(state) + len(b) + len(c) == 7 * mib

    got = timing.allocated(timing.Call(run, lambda: make(1)), torch.device(device))
    assert got == {"peak_bytes": pytest.approx(6 * mib, abs=4096), "largest_bytes": pytest.approx(4 * mib, abs=512)}


def test_bytes_inside_our_operators_count():
    problem = linear_kl.make(linear_kl.CASES[0].tiny(), CPU, torch.float32)
    ours, plain = (
        timing.allocated(timing.Call(lambda _, run=run: losses.step(run, problem)), CPU)
        for run in (linear_kl.leaf(problem), linear_kl.eager(problem))
    )
    logits = 4 * len(problem.rows) * len(problem.student_weight)
    assert plain["largest_bytes"] == logits
    assert 0 < ours["largest_bytes"] <= ours["peak_bytes"] < plain["peak_bytes"]


@pytest.fixture
def history(monkeypatch):
    """torch's CUDA allocator, with a history of three entries."""
    memory = torch.cuda.memory
    record = mock.create_autospec(memory._record_memory_history)
    entries = [
        {"action": "alloc", "size": 70},
        {"action": "alloc", "size": 30},
        {"action": "segment_alloc", "size": 99},
    ]
    snapshot = mock.create_autospec(memory._snapshot, return_value={"device_traces": [[], entries]})
    monkeypatch.setattr(memory, "_record_memory_history", record)
    monkeypatch.setattr(memory, "_snapshot", snapshot)
    monkeypatch.setattr(memory, "get_allocator_backend", lambda: "native")
    return record


def test_on_cuda_the_allocator_is_asked(history):
    ran: list[int] = []
    assert timing._largest_allocation(lambda: ran.append(1), torch.device("cuda", 1)) == 70
    assert timing._largest_allocation(lambda: ran.append(1), torch.device("cuda", 0)) is None, "made nothing"
    assert len(ran) == 2
    assert [call.kwargs.get("enabled", "all") for call in history.mock_calls] == ["all", None] * 2


def test_the_history_ends_with_a_run_that_fails_and_another_allocator_keeps_none(history, monkeypatch):
    def fails() -> None:
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        timing._largest_allocation(fails, torch.device("cuda", 1))
    assert history.mock_calls[-1].kwargs == {"enabled": None}
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "cudaMallocAsync")
    history.reset_mock()
    assert timing._largest_allocation(lambda: None, torch.device("cuda", 1)) is None
    assert not history.mock_calls


# -- fractions ---------------------------------------------------------------------------------------------------------


def test_the_floor_is_the_longer_of_products_and_traffic():
    assert timing.floor_ms({"flop": 10**12}, ANCHORS) == pytest.approx(2)  # ms, at 500 TFLOP/s
    assert timing.floor_ms({"bytes": 10**9}, ANCHORS) == pytest.approx(0.5)  # ms, at 2000 GB/s
    assert timing.floor_ms({"flop": 10**12, "bytes": 10**9}, ANCHORS) == pytest.approx(2)
    assert timing.floor_ms({"flop": 10**11, "bytes": 10**9}, ANCHORS) == pytest.approx(0.5)
    assert timing.floor_ms({}, ANCHORS) is None
    assert timing.floor_ms({"flop": 10**12}, {**ANCHORS, "gpu": "none"}) is None


def test_rows_hold_their_fraction_by_the_anchors_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "anchors", lambda device, deadline: ANCHORS)
    case = mock.Mock(tiny=lambda: None)
    case.name = "x"

    def measure(case, deadline):
        yield {"case": "x", "mode": "step", "provider": "leaf", "flop": 10**12, "ms": 4.0}
        yield {"case": "x", "mode": "step", "provider": "peer", "flop": 10**12, "ms": 8.0}
        yield {"case": "x", "mode": "plan", "provider": "leaf", "ms": 8.0}
        yield {"case": "x", "provider": "other", "absent": "not there", "flop": 10**12}

    path = tmp_path / "some.json"
    where = {"gpu": "some GPU"}
    assert timing.run_cases(path, CPU, 60, where, [case], measure, resume=False, only=())
    rows = json.loads(path.read_text())["rows"]
    assert [row.get("roofline", "-") for row in rows] == ["-", 0.5, 0.25, None, "-"]
    assert "x, step: 4.000 ms, 50% of the roofline" in capsys.readouterr().out
    # Gone on with, fractions are by the anchors that are in the file
    monkeypatch.setattr(timing, "anchors", lambda device, deadline: pytest.fail("measured twice"))
    path.write_text(json.dumps({"rows": [{**rows[0], "matmul_tflop_s": 250.0}]}))
    assert timing.run_cases(path, CPU, 60, where, [case], measure, resume=True, only=())
    assert json.loads(path.read_text())["rows"][1]["roofline"] == 1.0


# -- work --------------------------------------------------------------------------------------------------------------


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture
def layout() -> SharedPrefixLayout:
    """Two prompts with two and one continuations, and a sequence of its own."""
    prefix, other = torch.arange(7), torch.arange(50, 55)
    ends = [torch.tensor([90, 91, 92]), torch.tensor([80]), torch.tensor([70, 71])]
    groups = [[torch.cat([prefix, end]) for end in ends[:2]], [torch.cat([other, ends[2]])]]
    return SharedPrefixLayout.from_groups(groups)[0]


def visible(layout: SharedPrefixLayout) -> torch.Tensor:
    """[N, N] bool, query and key: whose value reaches whose output."""
    N = layout.num_tokens
    q = torch.zeros(N, 1, N)
    return pruned_attention(q, q, torch.eye(N)[:, None], layout, impl="reference")[:, 0] > 0


def test_attention_counts_the_pairs_of_the_mask(layout):
    assert layout.has_prefix
    pairs = int(visible(layout).sum())
    assert attention.visible_pairs(layout) == pairs
    model = attention.Model("", 6, 2, 16)
    one = 2 * 6 * 16 * pairs
    got = {mode: attention.flop(model, layout, mode) for mode in attention.PRODUCTS}
    assert got == {"forward": 2 * one, "plan+forward": 2 * one, "backward": 5 * one, "step": 7 * one}
    assert attention.flop(model, layout, "step", layers=3) == 21 * one
    assert {mode for case in attention.CASES for mode in case.modes} <= set(attention.PRODUCTS)


def test_attention_without_a_mask_counts_as_its_products_do():
    """Whole squares of 8 queries and keys, of which causality leaves 36 of 64 pairs."""
    layout, model = SharedPrefixLayout.from_lengths([8]), attention.Model("", 2, 2, 4)
    q, k, v = (torch.randn(2, 8, 4, requires_grad=True) for _ in range(3))
    forward = flops_of(lambda: (q @ k.mT).softmax(-1) @ v)
    assert attention.flop(model, layout, "forward") == forward * 36 / 64
    out = (q @ k.mT).softmax(-1) @ v
    backward = flops_of(lambda: out.sum().backward())
    assert attention.flop(model, layout, "backward") == (backward + forward / 2) * 36 / 64  # no logits are kept


def test_token_scores_reads_every_gradient_once():
    case = token_scores.Case("", 64, 10, 20, Dt=24, Ds=16)
    assert token_scores.make(case, CPU).nbytes() == 64 * (24 + 16) * 2
    at_scale = token_scores.CASES[0]
    assert at_scale.tokens * (at_scale.Dt + at_scale.Ds) * 2 == pytest.approx(2.68e9, rel=0.01)


@pytest.mark.parametrize(("frozen", "students"), [(False, 6), (True, 4)])
def test_linear_kl_counts_three_products_of_the_student_and_one_of_the_teacher(frozen, students):
    case = linear_kl.Case("", 8, 12, 30, N=16, kept=0.5, frozen=frozen)
    assert linear_kl.make(case, CPU).flop() == students * 8 * 30 * 8 + 2 * 8 * 30 * 12


@pytest.mark.parametrize("kept", [1.0, 0.25])
def test_cross_entropy_counts_three_products_of_the_labelled_rows(kept):
    problem = cross_entropy.make(cross_entropy.Case("", 8, 30, N=16, kept=kept), CPU, torch.float32)
    assert problem.flop() == 6 * (16 * kept) * 30 * 8
    few = problem._replace(
        hidden=problem.hidden.detach()[problem.rows].requires_grad_(), labels=problem.labels[problem.rows]
    )
    assert flops_of(lambda: losses.step(cross_entropy.eager(few), few)) == problem.flop()


def test_attention_mass_counts_the_pairs_of_its_queries():
    case = attention_mass.CASES[0]
    problem = attention_mass.make(case._replace(pack=case.pack.tiny(), queries=3), CPU)
    pairs = int(visible(problem.layout)[problem.chosen()].sum())
    assert problem.flop() == 2 * problem.q.shape[1] * problem.q.shape[2] * pairs


def test_a_training_step_counts_the_products_of_both_models():
    """Those of the linear layers are counted; our operators hide theirs, which were checked above."""
    pair = e2e.make_pair(e2e.SMALL_STUDENT, e2e.SMALL_TEACHER, CPU, torch.float32)
    groups = e2e.Case("").tiny().make(307)
    with FlopCounterMode(display=False) as counter:
        e2e.leaf(pair, groups)()
    assert counter.get_flop_counts()["Global"].keys() == {torch.ops.aten.mm}
    (pack,) = e2e.Collator(e2e.MAX_TOKENS, concat=True)(groups)["packs"]
    student, teacher = attention.Model("", 2, 1, 16), attention.Model("", 4, 2, 12)
    of_attention = attention.flop(student, pack["layout"], "step", 2) + attention.flop(
        teacher, pack["layout"], "forward", 2
    )
    of_heads = e2e.response_tokens(groups) * 307 * (6 * 32 + 2 * 48)
    assert e2e.flop(pair, groups) == counter.get_total_flops() + of_attention + of_heads


def test_scoring_counts_forward_and_backward_by_inputs():
    """Products of a frozen model; attention was checked above."""
    model = scoring_gpu.make_model(e2e.SMALL_TEACHER, CPU, torch.float32).requires_grad_(False)
    row = scoring_gpu.one_row(192)
    embeddings = model.get_input_embeddings()(torch.tensor([row.input_ids]) % 307).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        model.lm_head(hidden[0, row.response_start - 1 : -1]).sum().backward()
    of_attention = attention.flop(attention.Model("", 4, 2, 12), SharedPrefixLayout.from_lengths([192]), "step", 2)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert scoring_gpu.flop(model, row) == products + of_attention
