"""The arms that are compared, and how the presets train them."""

from __future__ import annotations

from dataclasses import dataclass

from ..prune import PruneConfig
from .models import STUDENT, TEACHER, Size


@dataclass(frozen=True)
class Arm:
    """A way to distil. `prune` says which counterfactuals; without it the arm is KD: originals only, twice as many per step.

    select: "teacher_right", or "student_wrong" of them (the paper's choice). verify: who must answer a counterfactual.
    originals: "paired" trains on the rows that have a counterfactual, "all" on every selected row.
    oracle: delete the planted confounder and nothing else.
    """

    prune: PruneConfig | None = None
    select: str = "teacher_right"
    verify: str = "teacher"
    originals: str = "paired"
    oracle: bool = False


ARMS: dict[str, Arm] = {
    "kd": Arm(originals="all"),
    "random": Arm(PruneConfig(signal="random")),
    "perplexity": Arm(PruneConfig(signal="perplexity")),
    "student_gradient": Arm(PruneConfig(signal="student_gradient")),
    "teacher_gradient": Arm(PruneConfig(signal="teacher_gradient")),
    "leaf": Arm(PruneConfig()),
    "leaf_collective": Arm(PruneConfig(mode="collective")),
    # All originals: few rows that the student had wrong give a counterfactual that it has right.
    "leaf_paper": Arm(PruneConfig(rule="threshold", tau=0.05), select="student_wrong", verify="both", originals="all"),
    "kd_student_wrong": Arm(select="student_wrong", originals="all"),
    "oracle": Arm(oracle=True),
}


@dataclass(frozen=True)
class Recipe:
    """Sizes of a preset. A step of every arm holds 2 · `groups` sequences.

    steps, learning_rate: of distillation; `first_learning_rate` is that of the training before it, of both models.
    """

    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    teacher_steps: int
    corpus_rows: int
    steps: int
    learning_rate: float
    groups: int
    test_rows: int = 500
    spare_operands: bool = True  # of the words that are deleted from the teacher's training prompts
    teacher: Size = TEACHER
    student: Size = STUDENT
    student_max_steps: int = 400  # if it does not show its shortcut before
    first_learning_rate: float = 3e-3


RECIPES = {
    "fast": Recipe((0,), ("kd", "random", "leaf"), 450, 1500, 200, 3e-3, 24),
    # The settings were chosen on seeds 0 and 1: what is reported comes from others. The student of seed 5 learns to
    # compute before it learns to copy, so that it never lies in the useful window: see `benchmarks/results/demo`.
    "full": Recipe((2, 3, 4, 6, 7), tuple(ARMS), 600, 3000, 300, 2e-3, 32),
}

# Which arm is compared with which, seed by seed, on every test set.
COMPARISONS = (
    ("leaf", "kd"),
    ("leaf", "random"),
    ("leaf", "perplexity"),
    ("leaf", "student_gradient"),
    ("leaf", "teacher_gradient"),
    ("leaf_collective", "leaf"),
    ("leaf_paper", "kd_student_wrong"),
    ("oracle", "leaf"),
)
