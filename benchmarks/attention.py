"""pruned_attention against the vendors' kernels and compiled FlexAttention: goals A1–A5. On a machine with an NVIDIA GPU:

    python -m benchmarks.attention --budget 540
    python -m benchmarks.attention --budget 540 --continue     # where the first run was cut
    python benchmarks/tables.py                                # puts the results into the documentation

Writes benchmarks/results/<gpu>/attention.json after every case. A number is written only if its implementation has just met
the error budget against fp64 on the same inputs; what cannot run is in the file as absent, with the reason. Modes:

    forward, backward   on a plan (schedule, block mask) that is there already
    plan+forward        the plan is built inside the timing
    step                the plan, then forward and backward of every layer of the case

Vendors' kernels know no shared prefixes: on a pack that has them they get the same sequences one after the other. cuDNN gets
them padded, the padding itself untimed. On a CPU, `--output DIR` runs every step on tiny cases; the times mean nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.timing import (
    Call,
    Deadline,
    Row,
    allocated,
    environment,
    interleave,
    parser,
    place,
    reason,
    run_cases,
    state,
)
from leaf_kernels import SharedPrefixLayout, pruned_attention
from leaf_kernels.testing import assert_close_to_fp64, attention_in_chunks, pruned_groups

OURS = ("leaf", "leaf fused")  # deterministic=True, the default, and deterministic=False
VENDORS = ("torch_varlen", "cudnn", "flash_attn")
FLEX = ("flex", "flex tuned")


# -- cases -------------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    name: str
    Hq: int
    Hk: int
    D: int


LLAMA_1B = Model("Llama-3.2-1B", 32, 8, 64)
LLAMA_8B = Model("Llama-3.1-8B", 32, 8, 128)
QWEN_1_5B = Model("Qwen2.5-1.5B", 12, 2, 128)


class Case(NamedTuple):
    """One pack of one model. `lengths` draws plain sequences; without it, `groups` pruned groups share their prefixes."""

    name: str
    model: Model
    modes: tuple[str, ...]
    lengths: tuple[int, int] = (0, 0)  # shortest, longest
    tokens: int = 32768
    groups: int = 0
    layers: int = 1

    def sequences(self) -> tuple[SharedPrefixLayout, SharedPrefixLayout]:
        """The pack, and the same sequences with nothing shared; on the CPU."""
        if self.groups:
            prompt, response = ((300, 1000), 200) if self.tokens > 4096 else ((50, 90), 10)
            groups = pruned_groups(self.groups, prompt=prompt, response=response)
            packed, _ = SharedPrefixLayout.from_groups(groups)
            return packed, SharedPrefixLayout.from_lengths([len(member) for group in groups for member in group])
        generator, lengths, (low, high) = torch.Generator().manual_seed(0), list[int](), self.lengths
        while sum(lengths) + low <= self.tokens:
            drawn = int(torch.randint(low, high + 1, (1,), generator=generator))
            lengths.append(min(drawn, self.tokens - sum(lengths)))
        packed = SharedPrefixLayout.from_lengths(lengths)
        return packed, packed

    def tiny(self) -> Case:
        """For a CPU: the same kind of pack, small enough to take no time."""
        model = Model(self.model.name, self.model.Hq // self.model.Hk, 1, 16)
        lengths = (self.lengths[0] // 128 + 1, self.lengths[1] // 128 + 1)
        return self._replace(
            model=model, lengths=lengths, tokens=300, groups=min(self.groups, 1), layers=min(self.layers, 2)
        )


CASES = (
    Case("1b-packed", LLAMA_1B, ("forward", "backward", "plan+forward", "step"), lengths=(300, 1000)),
    Case("1.5b-packed", QWEN_1_5B, ("forward", "backward"), lengths=(300, 1000)),
    Case("1b-groups", LLAMA_1B, ("plan+forward", "step"), groups=14),
    Case("1b-groups-16-layers", LLAMA_1B, ("step",), groups=14, layers=16),
    Case("8b-4k", LLAMA_8B, ("forward", "backward"), lengths=(4096, 4096), tokens=16384),
    Case("8b-16k", LLAMA_8B, ("forward", "backward"), lengths=(16384, 16384), tokens=16384),
    Case("8b-32k", LLAMA_8B, ("forward", "backward"), lengths=(32768, 32768), tokens=32768),
    Case("8b-128k", LLAMA_8B, ("forward", "backward"), lengths=(131072, 131072), tokens=131072),
)


# -- goals -------------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """`wanted` <= time of the fastest of `peers` / time of the faster of our backward variants, in one mode of one case."""

    id: str
    case: str
    mode: str
    peers: tuple[str, ...]
    wanted: float
    stretch: float
    times_token_ratio: bool = False  # both thresholds times the tokens that sharing saves


GOALS = (
    Goal("A1", "1b-packed", "forward", ("torch_varlen",), 1.25, 1.5),
    Goal("A2", "1b-packed", "backward", ("torch_varlen",), 1.1, 1.4),
    Goal("A2b", "1.5b-packed", "forward", ("torch_varlen",), 1.0, 1.2),
    Goal("A2b", "1.5b-packed", "backward", ("torch_varlen",), 1.0, 1.2),
    *(
        Goal("A3", case, mode, FLEX, 2.5, 3.0)
        for case in ("1b-packed", "1b-groups")
        for mode in ("plan+forward", "step")
    ),
    *(
        Goal("A4", case, mode, VENDORS, wanted, stretch)
        for case in ("8b-4k", "8b-16k", "8b-32k", "8b-128k")
        for mode, wanted, stretch in (("forward", 0.75, 0.85), ("backward", 0.6, 0.7))
    ),
    # 16 layers, because a model builds its plan once for all of them
    Goal("A5", "1b-groups-16-layers", "step", VENDORS, 0.92, 0.97, times_token_ratio=True),
)


def verdicts(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every goal held against the rows of one run: `passed` is None where a row is missing.

    `noise` says that the ratio cannot be told from 1: it differs from it by less than twice the A–A spread.
    """
    found = {(row["case"], row["mode"], row["provider"]): row for row in rows if "ms" in row}
    out = []
    for goal in GOALS:

        def have(names: tuple[str, ...], goal: Goal = goal) -> dict[str, dict[str, Any]]:
            keys = {name: (goal.case, goal.mode, name) for name in names}
            return {name: found[key] for name, key in keys.items() if key in found}

        ours, peers = have(OURS), have(goal.peers)
        verdict: dict[str, Any] = {"goal": goal.id, "case": goal.case, "mode": goal.mode, "passed": None}
        out.append(verdict)
        if not ours or not peers:
            verdict["reason"] = "not measured: " + " or ".join(goal.peers if ours else OURS)
            continue
        peer = min(peers, key=lambda name: peers[name]["ms"])
        best = min(ours, key=lambda name: ours[name]["ms"])
        ratio, token_ratio = peers[peer]["ms"] / ours[best]["ms"], ours[best]["token_ratio"]
        factor = token_ratio if goal.times_token_ratio else 1.0
        verdict |= {
            "peer": peer,
            "provider": best,
            "ratio": ratio,
            "ratios": {name: peers[peer]["ms"] / row["ms"] for name, row in ours.items()},
            "wanted": goal.wanted * factor,
            "stretch": goal.stretch * factor,
            "token_ratio": token_ratio,
            "roofline": ours[best].get("roofline"),
            "noise": abs(ratio - 1) < 2 * ours[best]["aa_spread"],
            "passed": ratio >= goal.wanted * factor,
            "passed_stretch": ratio >= goal.stretch * factor,
        }
    return out


# -- work --------------------------------------------------------------------------------------------------------------

PRODUCTS = {"forward": 2, "backward": 5, "plan+forward": 2, "step": 7}


def visible_pairs(layout: SharedPrefixLayout) -> int:
    """Pairs of a query and a key it sees: L·P + L(L + 1)/2 for a segment of L tokens that has a prefix of P."""
    return sum((b - a) * prefix + (b - a) * (b - a + 1) // 2 for a, b, _, prefix in layout.spans())


def flop(model: Model, layout: SharedPrefixLayout, mode: str, layers: int = 1) -> int:
    """2·Hq·D per visible pair and product: QKᵀ and PV forward; QKᵀ again, dOVᵀ, PᵀdO, dS K and dSᵀQ backward.

    What a deterministic backward in two kernels ("leaf") computes twice, QKᵀ and dOVᵀ, counts once: it reaches 5/7 at most.
    """
    return 2 * model.Hq * model.D * visible_pairs(layout) * PRODUCTS[mode] * layers


# -- implementations ---------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Packed inputs of one layout; q, k, v, upstream are [N, heads, D]."""

    layout: SharedPrefixLayout  # on the CPU, pinned where there is a GPU
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    upstream: torch.Tensor


class Provider(NamedTuple):
    """One implementation, on a problem brought into its own form."""

    tensors: list[torch.Tensor]  # q, k, v; gradients are taken of these
    upstream: torch.Tensor
    attend: Callable[..., torch.Tensor]  # (plan, q, k, v) -> out
    plan: Callable[[], Any] = lambda: None
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda x: x  # back to [N, heads, D]


def leaf(problem: Problem, deterministic: bool) -> Provider:
    layout, *tensors, upstream = problem
    impl = "triton" if upstream.is_cuda else "auto"

    def attend(plan: SharedPrefixLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return pruned_attention(q, k, v, plan, deterministic=deterministic, impl=impl)  # type: ignore[return-value]

    # A layout just moved has no schedule yet: it is built in the first call on it
    return Provider(_leaves(tensors), upstream, attend, lambda: layout.to(upstream.device, non_blocking=True))


def torch_varlen(problem: Problem) -> Provider:
    """FlashAttention-2 as torch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    layout, *tensors, upstream = problem
    starts, length = layout.segment_starts.to(upstream.device), layout.max_len
    has = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in has else {"is_causal": True}
    )  # 2.10 has the latter
    if "enable_gqa" in has:
        options["enable_gqa"] = True
    return Provider(
        _leaves(tensors),
        upstream,
        lambda plan, q, k, v: varlen_attn(q, k, v, starts, starts, length, length, **options),
    )


def flash_attn(problem: Problem) -> Provider:
    from flash_attn import flash_attn_varlen_func

    layout, *tensors, upstream = problem
    starts, length = layout.segment_starts.to(upstream.device), layout.max_len
    return Provider(
        _leaves(tensors),
        upstream,
        lambda plan, q, k, v: flash_attn_varlen_func(q, k, v, starts, starts, length, length, causal=True),
    )


def cudnn(problem: Problem) -> Provider:
    """Dense and causal on sequences padded at their ends, where no real query sees the padding."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layout, *tensors, upstream = problem
    S, L, device = layout.num_segments, layout.max_len, upstream.device
    place = (layout.segment_ids * L + layout.position_ids).to(device)

    def pad(x: torch.Tensor) -> torch.Tensor:  # [N, H, D] to [S, H, L, D]
        padded = x.new_zeros(S * L, *x.shape[1:])
        padded[place] = x.detach()
        return padded.unflatten(0, (S, L)).transpose(1, 2)

    def attend(plan: None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if q.is_cuda else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return Provider(
        _leaves(pad(x) for x in tensors),
        pad(upstream),
        attend,
        rows=lambda x: x.transpose(1, 2).flatten(0, 1)[place],
    )


def flex(problem: Problem, mode: str | None = None) -> Provider:
    """FlexAttention with the pack's mask, prefixes included; compiled, as is the building of its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout, *tensors, upstream = problem
    N, device = layout.num_tokens, upstream.device
    segment = layout.segment_ids
    first = layout.prefix_starts[segment].to(device)
    end = first + layout.prefix_lens[segment].to(device)
    segment = segment.to(device)
    attention, build = flex_attention, create_block_mask
    if device.type == "cuda":
        attention, build = torch.compile(flex_attention, mode=mode), torch.compile(create_block_mask)

    def visible(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (segment[query] == segment[key]) & (query >= key)
        return own | ((key >= first[query]) & (key < end[query]))

    def heads_first(x: torch.Tensor) -> torch.Tensor:  # [N, H, D] to [1, H, N, D]
        return x.detach().transpose(0, 1)[None].contiguous()

    return Provider(
        _leaves(heads_first(x) for x in tensors),
        heads_first(upstream),
        lambda mask, q, k, v: attention(q, k, v, block_mask=mask, enable_gqa=True),
        lambda: build(visible, None, None, N, N, device=device.type),
        lambda x: x[0].transpose(0, 1),
    )


def _leaves(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


PROVIDERS: dict[str, Callable[[Problem], Provider]] = {
    "leaf": partial(leaf, deterministic=True),
    "leaf fused": partial(leaf, deterministic=False),
    "torch_varlen": torch_varlen,
    "cudnn": cudnn,
    "flash_attn": flash_attn,
    "flex": flex,
    "flex tuned": partial(flex, mode="max-autotune-no-cudagraphs"),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def problems(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Problem, Problem]:
    """The pack, and the same sequences with nothing shared (the same object where nothing is)."""
    packed, separate = case.sequences()

    def problem(layout: SharedPrefixLayout) -> Problem:
        generator = torch.Generator(device).manual_seed(0)
        q, k, v, upstream = (
            torch.randn(layout.num_tokens, H, case.model.D, generator=generator, device=device, dtype=dtype)
            for H in (case.model.Hq, case.model.Hk, case.model.Hk, case.model.Hq)
        )
        return Problem(layout.pin_memory() if device.type == "cuda" else layout, q, k, v, upstream)

    one = problem(packed)
    return one, one if separate is packed else problem(separate)


class Gate:
    """The error budget against fp64, on the queries of the first key head: at most twice the error of textbook bf16 code.

    A peer may have twice that: its rounding is not ours to judge, only that it computes the same.
    """

    def __init__(self, problem: Problem):
        layout, Hk = problem.layout.to(problem.q.device), problem.k.shape[1]
        tensors = [x[:, : x.shape[1] // Hk] for x in problem[1:]]
        q, k, v, upstream = (x.double() for x in tensors)
        self.plain = attention_in_chunks(*tensors[:3], layout, tensors[3])
        self.oracle = attention_in_chunks(q, k, v, layout, upstream)

    def check(self, provider: Provider, factor: int) -> dict[str, float]:
        """Relative errors against fp64. Raises AssertionError."""
        errors = {}
        out = provider.attend(provider.plan(), *provider.tensors)
        gradients = torch.autograd.grad(out, provider.tensors, provider.upstream)
        for name, x in zip(("out", "dq", "dk", "dv"), (out, *gradients)):
            rows = provider.rows(x.detach())
            plain, oracle = getattr(self.plain, name), getattr(self.oracle, name)
            try:
                assert_close_to_fp64(rows[:, : oracle.shape[1]], oracle + factor * (plain - oracle), oracle)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            error = rows[:, : oracle.shape[1]].double() - oracle
            errors[f"{name}_error"] = float(error.norm() / oracle.norm())
        return errors


def call(provider: Provider, mode: str, layers: int) -> Call:
    """What a mode times. Gradients are wanted throughout, so that a forward also keeps what its backward needs."""
    ready = provider.plan()

    def forward(plan: Any) -> torch.Tensor:
        return provider.attend(plan, *provider.tensors)

    def backward(out: torch.Tensor) -> Any:
        return torch.autograd.grad(out, provider.tensors, provider.upstream)

    def step(_: None) -> None:
        plan = provider.plan()
        for _ in range(layers):
            backward(forward(plan))

    return {
        "forward": Call(lambda _: forward(ready)),
        "backward": Call(backward, setup=lambda: forward(ready)),
        "plan+forward": Call(lambda _: forward(provider.plan())),
        "step": Call(step),
    }[mode]


def names_of(case: Case, tuned: bool) -> list[str]:
    """Ours, and the peers of the case's goals."""
    peers = {peer for goal in GOALS if goal.case == case.name for peer in goal.peers}
    return [name for name in PROVIDERS if name in OURS or (name in peers and (tuned or name != "flex tuned"))]


def measure(case: Case, device: torch.device, deadline: Deadline, tuned: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of one case: times of what met its budget, the reason for what did not or is not there.

    Without ours nothing is timed. Raises OutOfTime.
    """
    torch._dynamo.reset()  # every case compiles for its own shapes, and none counts as a recompilation
    packed, separate = problems(case, device)
    gates = {id(problem): Gate(problem) for problem in (packed, separate)}
    ready, found, reasons = dict[str, Provider](), dict[str, Row](), dict[str, str]()
    memory = dict[tuple[str, str], Row]()
    for name in names_of(case, tuned):
        deadline.check()
        problem = separate if name in VENDORS else packed
        try:
            provider = PROVIDERS[name](problem)
            errors = gates[id(problem)].check(provider, factor=1 if name in OURS else 2)
            memory |= {(name, mode): allocated(call(provider, mode, case.layers), device) for mode in case.modes}
        except Exception as error:  # whatever a peer fails with is its reason to be absent
            reasons[name] = reason(error)
        else:
            ready[name] = provider
            found[name] = {"tokens": problem.layout.num_tokens, **errors}
    facts = {
        "op": "pruned_attention",
        "case": case.name,
        "model": case.model.name,
        "heads": f"{case.model.Hq}/{case.model.Hk}/{case.model.D}",
        "dtype": "bfloat16",
        "segments": packed.layout.num_segments,
        "longest": packed.layout.max_len,
        "layers": case.layers,
        "token_ratio": separate.layout.num_tokens / packed.layout.num_tokens,
    }
    gates.clear()
    if OURS[0] not in ready:
        reasons |= {name: f"not timed: {OURS[0]} failed" for name in ready}
        ready.clear()
    for name, why in reasons.items():
        yield {**facts, "mode": "all", "provider": name, "absent": why}
    for mode in case.modes if ready else ():
        calls = {name: call(provider, mode, case.layers) for name, provider in ready.items()}
        times, spread = interleave(calls, device, deadline)
        own = {
            "mode": mode,
            "flop": flop(case.model, packed.layout, mode, case.layers),
            "gate": "passed",
            **state(device),
        }
        for name, timing in times.items():
            yield {**facts, **own, "provider": name, **found[name], **memory[name, mode], **timing.columns(spread)}


def run(
    path: Path,
    device: torch.device,
    budget: float,
    *,
    resume: bool = False,
    tuned: bool = False,
    commit: str | None = None,
    only: Iterable[str] = (),
) -> bool:
    """Measures the cases into `path`, case by case. True: every case is there and our implementation met its budget."""
    return run_cases(
        path,
        device,
        budget,
        environment(device, commit, ["flash-attn"]),
        CASES,
        lambda case, deadline: measure(case, device, deadline, tuned),
        verdicts,
        lambda rows: map(line, verdicts(rows)),
        resume=resume,
        only=only,
    )


def line(verdict: dict[str, Any]) -> str:
    head = f"{verdict['goal']:4}{verdict['case']}, {verdict['mode']}: "
    if verdict["passed"] is None:
        return head + verdict["reason"]
    word = "reached" if verdict["passed"] else "missed"
    noise = ", within noise of 1" if verdict["noise"] else ""
    return f"{head}{verdict['ratio']:.2f}x of {verdict['peer']}, wanted {verdict['wanted']:.2f}x: {word}{noise}"


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__, (case.name for case in CASES))
    options.add_argument("--tuned-peers", action="store_true", help="also FlexAttention with max-autotune (minutes)")
    chosen = options.parse_args(arguments)
    device, folder = place(options, chosen.output)
    complete = run(
        folder / "attention.json",
        device,
        chosen.budget,
        resume=chosen.resume,
        tuned=chosen.tuned_peers,
        commit=chosen.commit,
        only=chosen.cases,
    )
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
