"""Runs a preset of `leaf demo` on many seeds, one JSON file per seed, and sums them up.

    python -m benchmarks.demo_seeds --preset fast --seeds 0-11
    python -m benchmarks.demo_seeds --preset full --seeds 2,3,4,6,7
    python -m benchmarks.demo_seeds --preset fast --seeds 2,3,4,6,7 --any-word
    python -m benchmarks.demo_seeds --task long --seeds 0-4

Seeds that have a file are not run again, so several processes can share the work and a killed one goes on. The summary
(`<name>.json` beside the folder of the seeds, in the form of the demo's results.json) is written after every seed;
`python benchmarks/plot.py` draws it. `--arms` measures only those arms again, and puts them into the files that are
there. `--any-word` trains the teacher on prompts from which any word may be missing, operands included: its deletions
then tell it nothing about which words matter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.timing import environment as environment_of
from leaf import __version__
from leaf.demo import lengths
from leaf.demo.arms import ARMS, RECIPES
from leaf.demo.comparison import run_seed, summarise, summary, write_json

RESULTS = Path(__file__).parent / "results" / "demo"


class Ui:
    """Messages, but no bars: several of these run side by side, into log files."""

    def __init__(self, console: Console):
        self.console = console

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

    def track(self, items, total, description):
        return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("short", "long"), default="short")
    parser.add_argument("--preset", choices=tuple(RECIPES), default="fast")
    parser.add_argument("--seeds", default="0-11", help="e.g. 0-11 or 2,3,7 (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=())
    parser.add_argument("--any-word", action="store_true")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    seeds = range(int(first), int(last) + 1) if last else [int(seed) for seed in arguments.seeds.split(",")]

    recipe, name, console = RECIPES[arguments.preset], arguments.preset, Console()
    if arguments.any_word:
        arms = ("kd", "random", "student_gradient", "leaf")
        recipe, name = dataclasses.replace(recipe, arms=arms, spare_operands=False), f"{name}_any_word"
    environment = {
        "leaf": __version__,
        **environment_of(torch.device("cpu"), packages=["transformers"]),
        "threads": 1,  # run_seed's
    }
    if arguments.task == "long":
        if arguments.any_word or arguments.arms or arguments.preset != "fast":
            parser.error("--preset, --arms and --any-word are for --task short")
        write_long(seeds, environment, console)
        return
    folder = RESULTS / name
    for seed in seeds:
        path = folder / f"seed-{seed:02d}.json"
        if not path.exists():
            measured = run_seed(recipe, seed, Ui(console)).numbers()
            del measured["seconds"]  # of processes side by side: they say nothing
            write_json(path, {**measured, "environment": environment})
        elif arguments.arms:
            again = run_seed(dataclasses.replace(recipe, arms=tuple(arguments.arms)), seed, Ui(console)).numbers()
            measured = json.loads(path.read_text())
            for part in ("arms", "counts"):
                measured[part] |= again[part]
            write_json(path, measured)
        every, distinct = read_seeds(folder.glob("seed-*.json"))
        results = {**summarise(name, every), "environments": distinct}
        write_json(RESULTS / f"{name}.json", results)
    console.print(summary(results))


def read_seeds(paths: Iterable[Path]) -> tuple[list[dict], list[dict]]:
    """The numbers of each seed, and the distinct environments that they come from."""
    every = [json.loads(path.read_text()) for path in sorted(paths)]
    environments = [one.pop("environment") for one in every]
    return every, [one for i, one in enumerate(environments) if one not in environments[:i]]


def write_long(seeds: Iterable[int], environment: dict, console: Console) -> None:
    for seed in seeds:
        path = RESULTS / "long" / f"seed-{seed:02d}.json"
        if not path.exists():
            began = time.process_time()
            measured, _ = lengths.run_seed(lengths.RECIPE, seed, Ui(console))
            measured["seconds"] = {"processor": round(time.process_time() - began)}  # also right where cores are shared
            write_json(path, {**measured, "environment": environment})
        every, distinct = read_seeds(path.parent.glob("seed-*.json"))
        results = {**lengths.summarise(every), "environments": distinct}
        write_json(RESULTS / "long.json", results)
    console.print(lengths.summary(results))


if __name__ == "__main__":
    main()
