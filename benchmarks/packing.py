"""Packs GSM8K's rows with their counterfactuals: how full the packs are, and how many tokens shared prefixes save.

    LEAF_TEST_DATA=folder python benchmarks/packing.py       # a few minutes on one core; folder/gsm8k/{train,test}.jsonl
    python benchmarks/tables.py                              # puts the figures into docs/packing.md

Every row goes through the recipe's own read → encode → score → prune → group, with the default flags and one counterfactual
per span. *Which* tokens are flagged needs pretrained models to mean anything: here all rows get random scores, and the test
rows also the scores of two tiny models with random weights, which flag other places. The lengths are those of a byte-level
BPE of 4000 tokens trained on these rows. Writes results/packing/gsm8k.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from leaf import __version__
from leaf.data import Encoder, Row, Sample
from leaf.pack import Group, build_groups, choose, sequences
from leaf.prune import PruneConfig, prune
from leaf_kernels import SharedPrefixLayout, pack_groups

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "leaf"))  # the rows and tiny models are those of the tests

import gsm8k  # noqa: E402 - found by the line above

RESULTS = ROOT / "benchmarks" / "results" / "packing" / "gsm8k.json"
BUDGETS = (2048, 4096, 8192, 16384)
LEVELS = {"instruction": ("instruction",), "response": ("response",), "both": ("instruction", "response")}


def sequential_cut(sizes: Iterable[int], max_tokens: int) -> int:
    """The number of packs that are closed as soon as the next group does not fit."""
    packs, room = 0, -1
    for size in sizes:
        if size > room:
            packs, room = packs + 1, max_tokens
        room -= size
    return packs


def measure(groups: Sequence[Group]) -> dict[str, Any]:
    """Tokens apart and packed, and how full the packs of every budget are; a group above the budget is counted apart."""
    members = [sequences(group) for group in groups]
    sizes = [SharedPrefixLayout.from_groups([group])[0].num_tokens for group in members]
    separate, packed = sum(len(ids) for group in members for ids in group), sum(sizes)
    budgets = {}
    for budget in BUDGETS:
        inside = [index for index, size in enumerate(sizes) if size <= budget]  # the others are alone in any case
        packs = {
            "pack_groups": len(pack_groups([members[index] for index in inside], budget)),
            "sequential": sequential_cut([sizes[index] for index in inside], budget),
        }
        tokens = sum(sizes[index] for index in inside)
        budgets[budget] = {
            "larger_groups": len(sizes) - len(inside),
            **{name: {"packs": n, "fill": tokens / (n * budget)} for name, n in packs.items()},
        }
    return {
        "groups": len(groups),
        "sequences": sum(map(len, members)),
        "largest_group": max(sizes),
        "separate_tokens": separate,
        "packed_tokens": packed,
        "ratio": separate / packed,
        "budgets": budgets,
    }


def cases(rows: Sequence[Row], encoder: Encoder, kind: str) -> Iterable[dict[str, Any]]:
    """Every level, with one counterfactual per sample and with all."""
    tables = {}
    for level in LEVELS["both"]:
        samples = [sample for row in rows for sample in encoder.encode(row, level=level)]
        usable = [sample for sample in samples if isinstance(sample, Sample)]
        generator = torch.Generator().manual_seed(0)
        if kind == "random":
            scores = [gsm8k.random_scores(sample, generator) for sample in usable]
        else:
            scores = gsm8k.model_scores(usable, encoder.tokenizer)
        tables[level] = scores, list(prune(scores, PruneConfig()))
    for name, levels in LEVELS.items():
        scores = [row for level in levels for row in tables[level][0]]
        counterfactuals = [row for level in levels for row in tables[level][1]]
        groups = build_groups(scores, counterfactuals, encoder.encode_text)
        for count in ("1", "all"):
            chosen = [choose(group, index, epoch=0, seed=0, count=count) for index, group in enumerate(groups)]
            measured = {"scores": kind, "level": name, "counterfactuals": count, "rows": len(rows), **measure(chosen)}
            print({key: value for key, value in measured.items() if key != "budgets"})
            yield measured


def main() -> None:
    folder = os.environ.get("LEAF_TEST_DATA")
    if not folder:
        sys.exit("LEAF_TEST_DATA is not set: it names the folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    torch.set_num_threads(1)  # the models are tiny
    encoder = Encoder(gsm8k.tokenizer(Path(folder)))
    results = {
        "leaf": __version__,
        "torch": torch.__version__,
        "vocabulary": len(encoder.tokenizer),
        "cases": [
            *cases(gsm8k.rows(Path(folder), "train", "test"), encoder, "random"),
            *cases(gsm8k.rows(Path(folder), "test"), encoder, "tiny random models"),
        ],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
