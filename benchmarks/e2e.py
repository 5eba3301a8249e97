"""A training step and the longest context of one GPU: goals D1 and D3. On a machine with an NVIDIA GPU:

    pip install trl liger-kernel                       # the peers; whichever is not there is recorded as absent
    python -m benchmarks.e2e --budget 540
    python -m benchmarks.e2e --budget 540 --continue   # where the first run was cut
    python benchmarks/tables.py                        # puts the results into the documentation

A student of 1B and a teacher of 8B parameters, Llamas with random weights in bf16. Everybody trains the same student, with
the same optimizer, on the same originals and counterfactuals: forward of the teacher, forward and backward of the student,
AdamW. The loss is a forward KL, a mean over response tokens. Written to benchmarks/results/<gpu>/e2e.json case by case:

    step         groups of samples of 600 to 1000 tokens, no checkpoints: time and memory of a step
    longest N    one sample of N tokens, an eighth of them response, layers checkpointed: does a step fit? Lengths come in
                 the order of a bisection; those that follow from what is known are written as such, and not tried

Memory is what is allocated at most, weights included. Implementations:

    leaf        the objective of LeafTrainer on packed groups
    released    what the paper's code does: sequence by sequence, softmaxes of both models at all positions, in fp32
    trl_gkd     TRL's GKD loss on the logits of both models, of which it takes the response, sequence by sequence
    liger       LigerFusedLinearJSD on the hidden states of both models at the response, sequence by sequence

Nothing is measured of an implementation unless its loss and all its gradients are those of fp64, on small models in fp32.
On a CPU, `--output DIR` runs every step on tiny cases; the numbers mean nothing.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks import attention
from benchmarks.timing import (
    Call,
    Deadline,
    Row,
    allocated,
    command,
    environment,
    interleave,
    judge,
    line,
    reason,
    run_cases,
    state,
)
from leaf.generate import is_out_of_memory
from leaf.objective import distillation, head_of, hidden_states, install
from leaf.pack import Collator, Group
from leaf_kernels import SharedPrefixLayout
from leaf_kernels.integrations.transformers import NAME, register
from leaf_kernels.testing import pruned_groups

PACKAGES = ("transformers", "trl", "liger-kernel")
MAX_TOKENS = 16384  # of a pack, LeafTrainer's default
WITHIN = 1e-3  # of the norm of all gradients, in fp32


def llama(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=2**19,
        tie_word_embeddings=hidden == 2048,  # as in Llama-3.2-1B
    )


STUDENT, TEACHER = llama(2048, 8192, 16, 32, 8, 128256), llama(4096, 14336, 32, 32, 8, 128256)
SMALL_STUDENT, SMALL_TEACHER = llama(32, 64, 2, 2, 1, 307), llama(48, 96, 2, 4, 2, 307)


# -- cases -------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """`tokens` of the one sample, or 0: `groups` of originals with counterfactuals."""

    name: str
    tokens: int = 0
    groups: int = 8
    prompt: tuple[int, int] = (400, 800)
    response: int = 200

    def make(self, vocabulary: int) -> list[Group]:
        if self.tokens:
            ids = (torch.arange(self.tokens) % vocabulary).tolist()
            start = self.tokens - max(1, self.tokens // 8)
            return [{"id": "0", "original": {"input_ids": ids, "response_start": start}, "counterfactuals": []}]
        drawn = pruned_groups(self.groups, prompt=self.prompt, response=self.response)

        def member(ids: torch.Tensor) -> Any:
            return {"input_ids": (ids % vocabulary).tolist(), "response_start": len(ids) - self.response}

        return [
            {"id": str(n), "original": member(first), "counterfactuals": [member(ids) for ids in others]}
            for n, (first, *others) in enumerate(drawn)
        ]

    def tiny(self) -> Case:
        """For a CPU: the same kind of case, small enough to take no time."""
        return self._replace(tokens=self.tokens // 128, groups=2, prompt=(45, 60), response=8)


LENGTHS = [*(length for n in range(11, 18) for length in (2**n, 3 * 2 ** (n - 1))), 2**18]


def bisection(values: list[int]) -> list[int]:
    """Sorted values in the order in which a bisection may ask for them: the middle, the middles of the halves, and so on."""
    order, intervals = [], [(0, len(values))]
    while intervals:
        a, b = intervals.pop(0)
        if a < b:
            middle = (a + b) // 2
            order.append(values[middle])
            intervals += [(a, middle), (middle + 1, b)]
    return order


CASES = (Case("step"), *(Case(f"longest {length}", length) for length in bisection(LENGTHS)))


# -- goals -------------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    id: str
    what: str
    peers: tuple[str, ...]  # the best of them counts
    wanted: float
    stretch: float | None


GOALS = (
    Goal("D1", "longest context / {}", ("released",), 16, None),
    Goal("D1", "longest context / {}", ("trl_gkd", "liger"), 2, None),
    Goal("D3", "{} / time", ("released",), 4.5, 5.0),
)


def longest(rows: Iterable[Row]) -> dict[str, int]:
    """Tokens of the longest sample that each implementation trained on; 0 where none fitted.

    Nothing where it is not known: a length is still to try, or failed of something else than memory.
    """
    fits: dict[str, dict[int, bool]] = {}
    for row in rows:
        if "fits" in row:
            fits.setdefault(row["provider"], {})[row["tokens"]] = row["fits"]
    known = {name: tried for name, tried in fits.items() if len(tried) == len(LENGTHS)}
    return {name: max((n for n, fit in tried.items() if fit), default=0) for name, tried in known.items()}


def verdicts(rows: list[Row]) -> list[Row]:
    """Every goal held against the rows of one run: `passed` is None where something was not measured."""
    times = {row["provider"]: row for row in rows if "ms" in row}
    lengths, out = longest(rows), []
    for goal in GOALS:
        timed = goal.id == "D3"
        found: dict[str, float] = {name: row["ms"] for name, row in times.items()} if timed else {**lengths}
        peers = {name: found[name] for name in goal.peers if found.get(name)}
        best = (min if timed else max)(peers, key=lambda name: peers[name], default=None)  # type: ignore[operator]
        verdict: Row = {"goal": goal.id, "case": "step" if timed else "longest", "passed": None}
        verdict["what"] = goal.what.format(best or " or ".join(goal.peers))
        out.append(verdict)
        if best is None or "leaf" not in found:
            verdict["reason"] = "not measured: " + ("leaf" if best else " or ".join(goal.peers))
            continue
        value = peers[best] / found["leaf"] if timed else found["leaf"] / peers[best]
        spread = times["leaf"]["aa_spread"] if timed else 0.0
        verdict |= judge(value, goal.wanted, goal.stretch, spread=spread)
        verdict["roofline"] = times["leaf"].get("roofline") if timed else None
    return out


# -- implementations ---------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    student: PreTrainedModel
    teacher: PreTrainedModel

    @property
    def device(self) -> torch.device:
        return self.student.device


def make_pair(student: LlamaConfig, teacher: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Pair:
    torch.manual_seed(0)
    with device:
        # A model writes its attention implementation into its config
        configs = (copy.deepcopy(config) for config in (student, teacher))
        models = [AutoModelForCausalLM.from_config(config, dtype=dtype) for config in configs]
    register()
    return Pair(models[0].train(), models[1].eval().requires_grad_(False))


Backward = Callable[[], torch.Tensor]  # leaves gradients in the student, returns the loss


def response_tokens(groups: list[Group]) -> int:
    return sum(len(ids) - start for ids, start in members(groups))


def members(groups: list[Group]) -> list[tuple[list[int], int]]:
    """Token ids and response_start of every sequence."""
    every = [member for group in groups for member in (group["original"], *group["counterfactuals"]) if member]
    return [(member["input_ids"], member["response_start"]) for member in every]


def leaf(pair: Pair, groups: list[Group]) -> Backward:
    install(pair.student)
    collated = Collator(MAX_TOKENS, concat=True)(groups)["packs"]
    each = torch.full((), 1 / response_tokens(groups), device=pair.device)
    options: dict[str, Any] = {"temperature": 1.0, "divergence": "forward_kl", "beta": None, "ce_weight": 0.0}

    def run() -> torch.Tensor:
        for model in pair:
            model.set_attn_implementation(NAME)
        total = torch.zeros((), device=pair.device)
        for pack in collated:
            pack = send_to_device(pack, pair.device, non_blocking=True)
            inputs = {name: pack[name] for name in ("input_ids", "position_ids", "layout")}
            with torch.no_grad():
                teacher_hidden = hidden_states(pair.teacher, inputs)
            head = head_of(pair.teacher)
            objective = distillation(pack, teacher_hidden, head, (each, each), vocab_size=None, **options)
            loss = pair.student(**inputs, objective=objective).loss
            loss.backward()
            total += loss.detach()
        return total

    return run


# (models, ids [1, L], response_start) -> sum over the response
Loss = Callable[[Pair, torch.Tensor, int], torch.Tensor]


def one_by_one(loss: Loss, pair: Pair, groups: list[Group]) -> Backward:
    count = response_tokens(groups)

    def run() -> torch.Tensor:
        for model in pair:
            model.set_attn_implementation("sdpa")
        total = torch.zeros((), device=pair.device)
        for ids, start in members(groups):
            value = loss(pair, torch.tensor([ids], device=pair.device), start) / count
            value.backward()
            total += value.detach()
        return total

    return run


def logits(pair: Pair, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, V] of student and teacher."""
    with torch.no_grad():
        teacher = pair.teacher(ids, use_cache=False).logits[0]
    return pair.student(ids, use_cache=False).logits[0], teacher


def released(pair: Pair, ids: torch.Tensor, start: int) -> torch.Tensor:
    student, teacher = (F.softmax(z.float(), -1) for z in logits(pair, ids))
    values = torch.nan_to_num((teacher * (teacher.log() - student.log())).sum(-1))
    return values[start - 1 : -1].sum()


def in_log_space(pair: Pair, ids: torch.Tensor, start: int) -> torch.Tensor:
    student, teacher = (F.log_softmax(z[start - 1 : -1], -1) for z in logits(pair, ids))
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


@functools.cache
def _gkd_loss() -> Callable[..., torch.Tensor]:
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:  # where older releases have it
        from trl import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


def trl_gkd(pair: Pair, ids: torch.Tensor, start: int) -> torch.Tensor:
    """As `GKDTrainer.compute_loss` calls it: the logits of all positions are made, the loss has those of the response."""
    student, teacher = (z[None, start - 1 : -1] for z in logits(pair, ids))
    return _gkd_loss()(student, teacher, beta=0.0, reduction="sum")  # beta = 0 is the forward KL


@functools.cache
def _liger_loss() -> Any:
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)  # the forward KL


def liger(pair: Pair, ids: torch.Tensor, start: int) -> torch.Tensor:
    rows = slice(start - 1, -1)
    with torch.no_grad():
        teacher = pair.teacher.base_model(ids, use_cache=False).last_hidden_state[0, rows]
    student = pair.student.base_model(ids, use_cache=False).last_hidden_state[0, rows]
    weights = pair.student.get_output_embeddings().weight, pair.teacher.get_output_embeddings().weight
    target = ids[0, start:]
    return _liger_loss()(student, weights[0], teacher, weights[1], target) * len(target)


PROVIDERS: dict[str, Callable[[Pair, list[Group]], Backward]] = {
    "leaf": leaf,
    "released": partial(one_by_one, released),
    "trl_gkd": partial(one_by_one, trl_gkd),
    "liger": partial(one_by_one, liger),
}


# -- work --------------------------------------------------------------------------------------------------------------


def model_flop(model: PreTrainedModel, layouts: Iterable[SharedPrefixLayout], rows: int, passes: int) -> int:
    """Of one model on packs. `passes`: 1 the forward, 2 also the backward by inputs, 3 also that by weights.

    Each is 2 · tokens · parameters of the linear layers and 2 · `rows` · parameters of the head, which sees the response
    alone; attention as `attention.flop` counts, in every layer. What norms and softmaxes do is not counted.
    """
    layouts, config = list(layouts), model.config
    linear = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    heads = attention.Model("", config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    mode = "forward" if passes == 1 else "step"
    products = linear * sum(layout.num_tokens for layout in layouts) + head * rows
    return 2 * passes * products + sum(
        attention.flop(heads, layout, mode, config.num_hidden_layers) for layout in layouts
    )


def flop(pair: Pair, groups: list[Group]) -> int:
    """Of a step on packs, where a shared prefix is there once: the teacher forward, the student all three passes.

    The optimizer is not counted.
    """
    layouts = [pack["layout"] for pack in Collator(MAX_TOKENS, concat=True)(groups)["packs"]]
    rows = response_tokens(groups)
    return model_flop(pair.student, layouts, rows, passes=3) + model_flop(pair.teacher, layouts, rows, passes=1)


# -- measuring ---------------------------------------------------------------------------------------------------------


def check(name: str, device: torch.device) -> dict[str, float]:
    """Relative errors of loss and gradients against fp64. Raises AssertionError where they are out of bounds."""
    pair, groups = make_pair(SMALL_STUDENT, SMALL_TEACHER, device, torch.float32), Case("").tiny().make(307)
    exact = Pair(*(copy.deepcopy(model).double() for model in pair))  # before anything is installed in the models
    results = []
    for models, run in (
        (pair, PROVIDERS[name](pair, groups)),
        (exact, one_by_one(in_log_space, exact, groups)),
    ):
        loss = run()
        gradients = torch.cat([p.grad.double().flatten() for p in models.student.parameters() if p.grad is not None])
        results.append((loss.double(), gradients))
    errors = {
        what: float((got - wanted).norm() / wanted.norm())
        for what, got, wanted in zip(("loss_error", "gradient_error"), *results)
    }
    for what, error in errors.items():
        if not error <= WITHIN:
            raise AssertionError(f"{what} {error:.2e} is above {WITHIN:.0e}")
    return errors


class Bench:
    """The pair, made when it is first needed, and what passed its check. `rows` are those of the run so far."""

    def __init__(self, device: torch.device, rows: list[Row]):
        self.device, self.rows = device, rows

    @functools.cached_property
    def checked(self) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        """Errors of what is right, the reason of what is absent."""
        right, absent = {}, {}
        for name in PROVIDERS:
            try:
                right[name] = check(name, self.device)
            except Exception as error:  # whatever it fails with is its reason to be absent
                absent[name] = reason(error)
        if "leaf" not in right:
            absent |= dict.fromkeys(right, "not measured: leaf failed")
            right.clear()
        return right, absent

    @functools.cached_property
    def pair(self) -> Pair:
        gpu = self.device.type == "cuda"
        configs = (STUDENT, TEACHER) if gpu else (SMALL_STUDENT, SMALL_TEACHER)
        return make_pair(*configs, self.device, torch.bfloat16 if gpu else torch.float32)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """With its moments, which a first step would make."""
        parameters = list(self.pair.student.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=self.device.type == "cuda")
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def step(self, name: str, case: Case, checkpointing: bool) -> Callable[[], None]:
        student = self.pair.student
        backward = PROVIDERS[name](self.pair, case.make(student.config.vocab_size))

        def run() -> None:
            if checkpointing:
                student.activation_checkpointing_enable()
            else:
                student.activation_checkpointing_disable()
            backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return run

    def measure(self, case: Case, deadline: Deadline) -> Iterator[Row]:
        """Rows of one case. Raises OutOfTime."""
        right, absent = self.checked
        facts = {"op": "training step", "case": case.name, "student": "1B", "teacher": "8B", "dtype": "bfloat16"}
        if self.device.type != "cuda":
            facts |= {"student": "small", "teacher": "small", "dtype": "float32"}
        if case.tokens:
            for name in right:
                deadline.check()
                own = {"tokens": case.tokens, **right[name], "gate": "passed", **self.fits(name, case)}
                yield {**facts, "provider": name, **own}
        else:
            yield from self.time(case, {**facts, "groups": case.groups}, right, absent, deadline)

    def time(
        self, case: Case, facts: Row, right: dict[str, dict[str, float]], absent: dict[str, str], deadline: Deadline
    ) -> Iterator[Row]:
        steps, found = {}, {}
        for name in right:
            deadline.check()
            try:
                run = self.step(name, case, checkpointing=False)
                run()  # compiles
                found[name] = {**right[name], **self.memory(run)}
                steps[name] = run
            except Exception as error:
                self.recover()
                absent = {**absent, name: reason(error)}
        for name, why in absent.items():
            yield {**facts, "provider": name, "absent": why}
        if "leaf" not in steps:
            return
        calls = {name: Call(lambda _, run=run: run()) for name, run in steps.items()}  # type: ignore[misc]
        times, spread = interleave(calls, self.device, deadline, per_round=1)
        facts["flop"] = flop(self.pair, case.make(self.pair.student.config.vocab_size))
        now = state(self.device)
        for name, timing in times.items():
            own = {**found[name], "gate": "passed", **timing.columns(spread)}
            yield {**facts, "provider": name, "mode": "step", **own, **now}

    def memory(self, run: Callable[[], None]) -> Row:
        parameters = [p for model in self.pair for p in model.parameters()]
        moments = [x for each in self.optimizer.state.values() for x in each.values()]
        own = allocated(Call(lambda _: run()), self.device, warm=False)
        return {**own, "peak_bytes": own["peak_bytes"] + sum(x.nbytes for x in (*parameters, *moments))}

    def fits(self, name: str, case: Case) -> Row:
        """Whether a step fits; where that follows from other lengths it is not tried.

        Absent where it fails of anything but memory: that says nothing about other lengths.
        """
        tried = {r["tokens"]: r["fits"] for r in self.rows if r.get("provider") == name and "fits" in r}
        if any(fit and tokens > case.tokens for tokens, fit in tried.items()):
            return {"fits": True, "follows": True}
        if any(not fit and tokens < case.tokens for tokens, fit in tried.items()):
            return {"fits": False, "follows": True}
        try:
            return {"fits": True, **self.memory(self.step(name, case, checkpointing=True)), **state(self.device)}
        except Exception as error:
            why, too_long = reason(error), is_out_of_memory(error)
        self.recover()  # only now: the error's traceback held what is freed
        return {"fits": False, "why": why} if too_long else {"absent": why}

    def recover(self) -> None:
        """After a step that failed half-way, or before there was a model, which is not made here."""
        if pair := self.__dict__.get("pair"):
            pair.student.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def summary(rows: list[Row]) -> Iterator[str]:
    for name, tokens in longest(rows).items():
        all_fit = all(row["fits"] for row in rows if row.get("provider") == name and "fits" in row)
        yield f"longest context, {name}: {'at least ' if all_fit else ''}{tokens} tokens"
    yield from map(line, verdicts(rows))


def run(
    path: Path,
    device: torch.device,
    budget: float,
    *,
    resume: bool = False,
    commit: str | None = None,
    only: Iterable[str] = (),
) -> bool:
    """Measures the cases into `path`, case by case. True: every case is there and our implementation is right."""
    rows: list[Row] = []
    where = environment(device, commit, PACKAGES)
    measure = Bench(device, rows).measure
    return run_cases(
        path, device, budget, where, CASES, measure, verdicts, summary, resume=resume, only=only, rows=rows
    )


main = partial(command, __doc__, CASES, "e2e", run)


if __name__ == "__main__":
    sys.exit(main())
