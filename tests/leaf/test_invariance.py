"""The invariance contract: one step has one loss and one gradient, whatever engine, cut and teacher it is computed with.

Two gloo ranks on a CPU, in one process group. FSDP2 is accelerate's own, see `distributed.engine`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import engine, on_ranks
from training import assert_same, cached, groups, plain_e7, train

from leaf.teacher import TeacherCache
from leaf_kernels.testing.covering import pairwise

GROUPS, STEP = 11, 8  # a step of 8 groups and one of 3: there a rank has less to do than the other, or nothing
FACTORS: dict[str, list[Any]] = {
    "engine": ["one process", "ddp", "fsdp2"],
    "accumulation": [1, 2, 4],
    "max_tokens": [10**6, 1],  # one pack, and a pack for each group
    "checkpointing": [False, True],
    "teacher": ["online", "cached_hidden"],
}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


def name(case: dict[str, Any]) -> str:
    return ", ".join(f"{factor} {value}" for factor, value in case.items())


def run(case: dict[str, Any], output: str, cache: str) -> Any:
    ranks = 1 if case["engine"] == "one process" else 2
    options: dict[str, Any] = dict(FSDP) if case["engine"] == "fsdp2" else {}
    with engine():
        return train(
            output,
            groups(GROUPS),
            TeacherCache(cache) if case["teacher"] == "cached_hidden" else None,
            per_device_train_batch_size=STEP // ranks // case["accumulation"],
            gradient_accumulation_steps=case["accumulation"],
            max_tokens=case["max_tokens"],
            activation_checkpointing=case["checkpointing"],
            **options,
        )


def run_all(cases: list[dict[str, Any]], output: str, cache: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {name(case): run(case, output, cache) for case in cases}


@pytest.fixture(scope="module")
def definition():
    """Losses and gradients of the two steps, from E7 itself: a forward per sequence, full logits."""
    expected = [plain_e7(groups(GROUPS)[:STEP]), plain_e7(groups(GROUPS)[STEP:])]
    return [loss for loss, _ in expected], [gradient for _, gradient in expected]


def check(cases: list[dict[str, Any]], definition: Any, folder: Path) -> None:
    output, cache = str(folder / "output"), str(cached(folder, groups(GROUPS)).folder)
    alone = [case for case in cases if case["engine"] == "one process"]
    together = [case for case in cases if case not in alone]
    results = [run_all(alone, output, cache), *on_ranks(run_all, together, output, cache)]
    assert sum(map(len, results)) == len(alone) + 2 * (len(cases) - len(alone))
    for case, (losses, gradients) in itertools.chain.from_iterable(result.items() for result in results):
        try:  # the loss is logged by the first rank alone
            assert_same((losses or definition[0], gradients), definition)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
    assert all(losses for losses, _ in results[1].values())


def test_every_pair_of_choices(definition, tmp_path):
    check(pairwise(**FACTORS), definition, tmp_path)


@pytest.mark.slow
def test_every_combination(definition, tmp_path):
    check([dict(zip(FACTORS, values)) for values in itertools.product(*FACTORS.values())], definition, tmp_path)
