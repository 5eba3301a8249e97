"""The built-in task at a larger scale, with the paper's ablations: a teacher of 52M parameters. On an NVIDIA GPU:

    python -m benchmarks.demo_gpu --budget 540
    python -m benchmarks.demo_gpu --budget 540 --continue   # where the first run was cut
    python benchmarks/plot.py && python benchmarks/tables.py

The short task of `leaf demo`, 5 seeds, a student of 23M parameters, in fp32. Arms:

    kd, random, student_gradient    controls: no deletion, random spans, flags by the student's gradient alone
    leaf, leaf_collective           one counterfactual per flagged span (q = 0.05), or one without any of them
    q_..., tau_...                  leaf with other quantiles, or with a fixed threshold
    oracle                          the planted token deleted and nothing else

Instruction level only: the task has no confounder in its responses, and the long one, which has, distils nothing.

Written to benchmarks/results/<gpu>/demo/seed-NN.json after every arm, and summed up over the seeds that are complete in
benchmarks/results/<gpu>/demo.json. The models of a seed that is not complete lie beside its file as seed-NN.pt: its
other arms are of the same models, or of none. Without that file `--continue` starts the seed anew.

Sizes and learning rates of this scale were set without a GPU and never tried at this size: a student outside the useful
window says so in the results. On a CPU, `--output DIR` runs the sizes of `leaf demo --preset fast`, some minutes a seed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.demo_seeds import Ui, read_seeds
from benchmarks.timing import Deadline, OutOfTime, Row, environment, parser, place, reason, write_json
from leaf.demo.arms import ARMS, RECIPES, Arm, Recipe
from leaf.demo.comparison import NothingToLearn, Seed, one_thread, prepare, summarise
from leaf.demo.models import Size
from leaf.prune import PruneConfig

SEEDS = (2, 3, 4, 6, 7)  # those of the full preset
COMPARED: dict[str, Arm] = {
    **{name: ARMS[name] for name in ("kd", "random", "student_gradient", "leaf", "leaf_collective", "oracle")},
    **{f"q_{q}": Arm(PruneConfig(q=q)) for q in (0.02, 0.1, 0.2)},
    **{f"tau_{tau}": Arm(PruneConfig(rule="threshold", tau=tau)) for tau in (0.05, 0.1, 0.15, 0.3)},
}
RECIPE = dataclasses.replace(
    RECIPES["full"],
    teacher=Size(768, layers=8, heads=12, initializer_range=0.02),
    student=Size(512, layers=8, heads=8, initializer_range=0.02),
    first_learning_rate=5e-4,
    learning_rate=3e-4,
)


class Run:
    """Seeds in the folder of a machine's results."""

    def __init__(self, folder: Path, device: torch.device, recipe: Recipe, where: Row, arms: Mapping[str, Arm]):
        self.folder, self.device, self.recipe, self.where, self.arms = folder, device, recipe, where, arms
        self.ui = Ui(Console())

    def path(self, seed: int) -> Path:
        return self.folder / "demo" / f"seed-{seed:02d}.json"

    def written(self, seed: int) -> Row:
        """What the file of a seed says, if it was measured by the same code on the same machine."""
        path = self.path(seed)
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("environment") == self.where else {}

    def missing(self, seed: int) -> list[str]:
        """Arms that neither ran nor could not."""
        found = self.written(seed)
        return [arm for arm in self.arms if arm not in {**found.get("arms", {}), **found.get("absent", {})}]

    def seed(self, number: int, deadline: Deadline) -> None:
        """The missing arms of a seed. Raises OutOfTime."""
        models, found = self.path(number).with_suffix(".pt"), self.written(number)
        deadline.check()
        if found and models.exists():
            shared: Seed = torch.load(models, map_location=self.device, weights_only=False)  # our own file
            absent = found["absent"]
        else:
            shared, absent = prepare(self.recipe, number, self.ui, device=self.device), {}
            found = {}
            self.write(shared, absent)
        for name in [name for name in self.arms if name not in {**shared.arms, **absent}]:
            deadline.check()
            try:
                shared.run(name, self.arms[name], self.ui)
            except NothingToLearn as error:
                shared.counterfactuals.pop(name, None)
                absent[name] = reason(error)
            self.write(shared, absent)
        models.unlink()

    def write(self, shared: Seed, absent: dict[str, str]) -> None:
        path = self.path(shared.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        models, partial = path.with_suffix(".pt"), path.with_suffix(".pt.partial")
        torch.save(shared, partial)
        os.replace(partial, models)
        write_json(path, {**shared.numbers(), "absent": absent, "environment": self.where})

    def summarise(self, seeds: Iterable[int]) -> None:
        """Over complete seeds, of the arms that all of them have."""
        complete = [seed for seed in seeds if not self.missing(seed)]
        if not complete:
            return
        every, environments = read_seeds([self.path(seed) for seed in complete])
        absent: dict[str, str] = {}
        for one in every:
            absent |= one.pop("absent")
        for one in every:
            for part in ("arms", "counts"):
                one[part] = {name: value for name, value in one[part].items() if name not in absent}
        write_json(
            self.folder / "demo.json", {**summarise("gpu", every), "absent": absent, "environments": environments}
        )


@one_thread()
def run(
    folder: Path,
    device: torch.device,
    budget: float,
    *,
    resume: bool = False,
    commit: str | None = None,
    seeds: Iterable[int] = SEEDS,
    recipe: Recipe = RECIPE,
    arms: Mapping[str, Arm] = COMPARED,
) -> bool:
    """Measures arm by arm below `folder`. True: every arm of every seed is there."""
    seeds, deadline = list(seeds), Deadline(budget)
    own = Run(folder, device, recipe, environment(device, commit, ("transformers",)), arms)
    if not resume:
        for seed in seeds:
            own.path(seed).unlink(missing_ok=True)
    try:
        for seed in seeds:
            if own.missing(seed):
                own.seed(seed, deadline)
                own.summarise(seeds)
    except OutOfTime:
        print(f"out of time after {budget:.0f} s; --continue goes on")
    missing = {seed: own.missing(seed) for seed in seeds}
    left = [f"seed {seed} ({len(names)} arms)" for seed, names in missing.items() if names]
    print(f"{folder / 'demo.json'}: " + (f"still to measure: {', '.join(left)}" if left else "complete"))
    return not left


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__, (f"seed-{seed}" for seed in SEEDS))
    chosen = options.parse_args(arguments)
    device, folder = place(options, chosen.output)
    recipe = RECIPE if device.type == "cuda" else RECIPES["fast"]
    seeds = [int(case.removeprefix("seed-")) for case in chosen.cases] or SEEDS
    done = run(folder, device, chosen.budget, resume=chosen.resume, commit=chosen.commit, seeds=seeds, recipe=recipe)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
