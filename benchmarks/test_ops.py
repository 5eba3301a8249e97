"""Every op on a CPU against plain torch and the released recipe's formulas; what `leaf estimate` says against what is used.

    pytest benchmarks/ --benchmark-json=benchmarks/results/cpu_suite.json      # minutes, on one core
    python benchmarks/tables.py                                                # puts the figures into the documentation

Cases have the ratios of the models that they are named after: widths and vocabulary are an eighth of theirs, heads a
quarter; fp32, random inputs. On a machine with an NVIDIA GPU the stages of `benchmarks.gpu` run instead.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks import attention, cross_entropy, estimate, gpu, linear_kl, losses, token_scores
from benchmarks.suite import CPU, Arm, compare, ratio, relative
from benchmarks.timing import RESULTS, environment, slug
from leaf_kernels import SharedPrefixLayout, attention_mass
from leaf_kernels.testing import assert_close_to_fp64

SAVES = 4  # a loss that makes all logits needs at least this many times our memory
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU case; a GPU runs test_on_the_gpu")

LLAMA_1B, QWEN_1_5B = attention.Model("Llama-3.2-1B", 8, 2, 64), attention.Model("Qwen2.5-1.5B", 6, 1, 128)


# -- losses ------------------------------------------------------------------------------------------------------------

KL_CASES = (
    linear_kl.Case("Llama-3.2-1B from 8B", 256, 512, 16032, N=2048),
    linear_kl.Case("Qwen2.5-1.5B from 72B", 192, 1024, 18992, N=1536, kept=0.5),
)


def loss_arms(problem: losses.Problem, providers: losses.Providers, names: Iterable[str]) -> dict[str, Arm]:
    gate = losses.Gate(problem.first(losses.ACCURACY_ROWS), providers)

    def arm(name: str) -> Arm:
        return Arm(partial(losses.step, providers[name](problem), problem), partial(gate.check, name))

    return {name: arm(name) for name in names}


@on_cpu
@pytest.mark.parametrize("case", KL_CASES, ids=lambda case: case.name)
def test_linear_kl(benchmark, case):
    """A step: the loss, and the gradients of the student's hidden states and head."""
    problem = linear_kl.make(case, CPU, torch.float32)
    arms = loss_arms(problem, linear_kl.PROVIDERS, ("leaf", "eager", "released"))
    facts = {"op": "linear_kl", "mode": "step", "case": case.name, "tokens": case.N, "rows": len(problem.rows)}
    rows = compare(benchmark, arms, **facts)
    assert ratio(rows, "peak_bytes", "released") >= SAVES


@on_cpu
@pytest.mark.parametrize("case", [cross_entropy.Case("Llama-3.2-1B", 256, 16032, N=4096, kept=0.25)])
def test_linear_cross_entropy(benchmark, case):
    """A step of the usual loss on responses, a quarter of the tokens. Everybody else makes the logits of all of them."""
    problem = cross_entropy.make(case, CPU, torch.float32)
    arms = loss_arms(problem, cross_entropy.PROVIDERS, ("leaf", "eager"))
    facts = {"op": "linear_cross_entropy", "mode": "step", "case": case.name, "tokens": case.N}
    rows = compare(benchmark, arms, **facts, rows=len(problem.rows))
    assert ratio(rows, "peak_bytes", "eager") >= SAVES


# -- attention ---------------------------------------------------------------------------------------------------------

ATTENTION_CASES = (
    attention.Case("Llama-3.2-1B, groups", LLAMA_1B, ("forward", "step"), groups=2),
    attention.Case("Qwen2.5-1.5B, packed", QWEN_1_5B, ("forward", "step"), lengths=(300, 1000), tokens=3000),
)


def one_by_one(
    problem: attention.Problem, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
) -> attention.Provider:
    """Separate sequences, each through `attend` ([1, H, L, D] to the same): what a batch of one does."""
    starts = problem.layout.segment_starts.tolist()

    def run(plan: None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs = []
        for a, b in itertools.pairwise(starts):
            outs.append(attend(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1))
        return torch.cat(outs)

    leaves = [x.detach().requires_grad_() for x in problem[1:4]]
    return attention.Provider(leaves, problem.upstream, run)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[1, Hq, L, L], as transformers' eager attention makes them."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * q.shape[-1] ** -0.5
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return probabilities(q, k) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


@on_cpu
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_pruned_attention(benchmark, case, mode):
    """One layer: a pack, where the others get the same sequences one after the other, with nothing shared.

    The released recipe runs its models with transformers' default, which is SDPA, on a batch of one.
    """
    packed, separate = attention.problems(case, CPU, torch.float32)
    gates = {id(problem): attention.Gate(problem) for problem in (packed, separate)}

    def arm(problem: attention.Problem, provider: attention.Provider, factor: int) -> Arm:
        call = attention.call(provider, mode, case.layers)
        return Arm(lambda: call.run(None), partial(gates[id(problem)].check, provider, factor))

    ours = attention.leaf(packed, deterministic=True)
    arms = {"leaf": arm(packed, ours, 1)}
    for name, attend in (("eager", eager), ("released: sdpa", sdpa)):
        arms[name] = arm(separate, one_by_one(separate, attend), 2)
    facts = {"op": "pruned_attention", "mode": mode, "case": case.name, "tokens": packed.layout.num_tokens}
    compare(benchmark, arms, **facts, separate_tokens=separate.layout.num_tokens)


@on_cpu
def test_attention_mass(benchmark):
    """The attention that each token receives from the last 200 tokens of its sequence, against whole matrices."""
    case = ATTENTION_CASES[1]
    problem, _ = attention.problems(case, CPU, torch.float32)
    layout, q, k = problem.layout, problem.q, problem.k
    queries = torch.zeros(len(q), dtype=torch.bool)
    spans = [(a, b) for a, b, *_ in layout.spans()]
    for a, b in spans:
        queries[max(a, b - 200) : b] = True

    def matrices(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        parts = [(q[a:b].transpose(0, 1)[None], k[a:b].transpose(0, 1)[None], queries[a:b]) for a, b in spans]
        return torch.cat([probabilities(x, y)[0][:, chosen].sum(1) for x, y, chosen in parts], dim=1)

    def ours(q: torch.Tensor, k: torch.Tensor, layout: SharedPrefixLayout = layout) -> torch.Tensor:
        return attention_mass(q, k, layout, queries=queries)

    oracle, plain = matrices(q.double(), k.double()), matrices(q, k)

    def check(mass: Callable[..., torch.Tensor]) -> dict[str, float]:
        result = mass(q, k)
        assert_close_to_fp64(result, plain, oracle, max_lse=float(oracle.max()))
        return {"mass_error": relative(result, oracle)}

    arms = {name: Arm(partial(f, q, k), partial(check, f)) for name, f in (("leaf", ours), ("eager", matrices))}
    facts = {
        "op": "attention_mass",
        "mode": "forward",
        "case": case.name,
        "tokens": len(q),
        "queries": int(queries.sum()),
    }
    rows = compare(benchmark, arms, **facts)
    assert ratio(rows, "peak_bytes", "eager") >= 2


# -- scores ------------------------------------------------------------------------------------------------------------


def scores_one_by_one(problem: token_scores.Problem) -> torch.Tensor:
    """[N], as the released code has it: one sample after the other, min–max of fp32 norms."""

    def min_max(x: torch.Tensor) -> torch.Tensor:
        return (x - x.min()) / (x.max() - x.min())

    starts, scores = problem.segment_starts.tolist(), []
    for a, b in itertools.pairwise(starts):
        teacher, student = (gradient[a:b].float().norm(dim=-1) for gradient in problem[:2])
        scores.append(min_max(min_max(teacher) - min_max(student)))
    return torch.cat(scores)


@on_cpu
def test_token_scores(benchmark):
    """Scores from gradients in bf16. On a CPU ours is the specification: all segments at once in plain torch."""
    case = token_scores.Case("Llama-3.2-1B from 70B", 8192)
    problem = token_scores.make(case, CPU)
    exact = token_scores.oracle(problem)

    def check() -> dict[str, float]:
        return token_scores.check(token_scores.select(problem, "auto"), exact, problem)

    def check_released() -> dict[str, float]:
        error = float((scores_one_by_one(problem).double() - exact.score).abs().max())
        assert error <= token_scores.SCORE_ERROR
        return {"score_error": error}

    arms = {
        "leaf": Arm(token_scores.leaf(problem, "scores"), check),
        "released": Arm(partial(scores_one_by_one, problem), check_released),
    }
    compare(benchmark, arms, op="token_scores", mode="scores", case=case.name, tokens=case.tokens)


# -- the memory model --------------------------------------------------------------------------------------------------

ESTIMATES = ("distil, Llama 1024 x 2 to 512 x 2, a group of 512", "score, Qwen2 1024 x 4, 4 rows of 512")


@on_cpu
@pytest.mark.parametrize("name", ESTIMATES)
def test_estimate(benchmark, name):
    """What is timed is the prediction; `benchmarks.estimate` has more cases."""
    benchmark.pedantic(estimate.predict, (estimate.CASES[name],), rounds=1)
    case = estimate.compare([name])["cases"][name]
    benchmark.extra_info["estimate"] = {"case": name, **case, **environment(CPU)}
    assert abs(case["error"]) <= estimate.WITHIN


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("stage", gpu.STAGES)
def test_on_the_gpu(benchmark, stage):
    """Stage after stage of `benchmarks.gpu`, whose results are where that command leaves them."""
    status = benchmark.pedantic(gpu.main, (["--stage", stage],), rounds=1)
    name = gpu.BENCHMARKS.get(stage, stage).rpartition(".")[2]
    path = RESULTS / slug(torch.cuda.get_device_name()) / f"{name}.json"
    benchmark.extra_info.update(json.loads(path.read_text()) if path.exists() else {})
    assert status == 0
