"""The built-in task through the package's own stages: select, score, prune, verify, distil, evaluate, for every arm."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich.console
import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from .. import report
from ..attention import Marked, attention_to_marked
from ..data import Encoder, Row, Sample, Skip
from ..pack import Group, build_groups
from ..prune import PruneConfig, prune
from ..rows import read_rows
from ..run import Silent, Ui
from ..score import score_samples
from ..select import select_rows
from ..trainer import LeafArguments, LeafTrainer
from ..verify import verify_rows
from .arms import ARMS, COMPARISONS, RECIPES, Arm, Recipe
from .detection import detection, marked, oracle
from .models import CPU, WINDOW, accuracy, outside_window, train_student, train_teacher
from .task import TEST_SETS, make_rows, make_tokenizer

MAX_TOKENS = 16384
GRADING: dict[str, Any] = {"grader": "exact", "max_new_tokens": 12, "max_tokens": MAX_TOKENS}
ATTENTION_ROWS = 200

Rows = list[dict[str, Any]]


def run(
    preset: str = "fast",
    output_dir: str | Path = "out",
    *,
    seeds: Sequence[int] | None = None,
    ui: Ui | None = None,
) -> dict[str, Any]:
    """Trains the models of the built-in task and compares the arms of `preset`.

    Into `output_dir`: `results.json`, `report.html`, `plots/`, `models/teacher`, `models/student` (before distillation) and
    `rows.jsonl` (ten rows of the corpus), the files from the first seed.

    Args:
        preset: "fast" (one seed; student, KD, random, LeaF) or "full" (five seeds, every arm).
        seeds: other seeds than the preset's.
        ui: where progress goes; nowhere if None.

    Returns:
        The content of `results.json`: `arms` {arm: {metric: [per seed]}}, `detection`, `paired` differences, `window`,
        `counts` and `seconds`.
    """
    if preset not in RECIPES:
        raise ValueError(f"demo: preset must be one of {', '.join(RECIPES)}, got {preset!r}")
    ui, recipe, folder = ui or Silent(), RECIPES[preset], Path(output_dir)
    measured = []
    for seed in seeds if seeds is not None else recipe.seeds:
        ran = run_seed(recipe, seed, ui)
        measured.append(ran.numbers())
        if len(measured) == 1:
            first = ran
            _save_inputs(folder, ran)
        results = summarise(preset, measured)
        write_json(folder / "results.json", results)  # after every seed: a run that is stopped keeps what it has
    tables: dict[str, Any] = {"scores": first.scores, "counterfactuals": first.counterfactuals.get("leaf", [])}
    report.save_plots(folder / "plots", results=results, **tables)
    report.write_report(folder / "report.html", results=results, title=f"leaf demo, preset {preset}", **tables)
    return results


@contextmanager
def one_thread() -> Iterator[None]:
    """A second thread brings models this small nothing, costs much where cores are shared, and changes the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class NothingToLearn(ValueError):
    """An arm has no group."""


@dataclass
class Seed:
    """The models of a seed, what all of its arms share, and what was found of those that ran."""

    recipe: Recipe
    number: int
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    student: PreTrainedModel
    student_steps: int
    tests: dict[str, Rows]
    watched: list[Marked]
    rows: list[Row]  # those of the corpus that the teacher solves
    student_wrong: set[str]  # of them those that the student does not solve
    scores: Rows
    seconds: dict[str, float]
    arms: dict[str, dict[str, float]] = field(default_factory=dict)
    counterfactuals: dict[str, Rows] = field(default_factory=dict)  # of the arms that have some

    @property
    def inside(self) -> bool:
        return outside_window(self.arms["student"]) == 0

    def measure(self, name: str, model: PreTrainedModel, ui: Ui) -> None:
        """Accuracy on every test set, and the attention mass on the confounder."""
        with clock(self.seconds, "evaluate"):
            scores = {test: accuracy(model, self.tokenizer, rows) for test, rows in self.tests.items()}
            attention = list(attention_to_marked(model, self.watched, max_tokens=MAX_TOKENS))
        ui.say(f"seed {self.number}, {name}: " + ", ".join(f"{test} {score:.3f}" for test, score in scores.items()))
        self.arms[name] = {**scores, "attention_to_confounder": sum(attention) / len(attention)}

    def run(self, name: str, arm: Arm, ui: Ui) -> None:
        """Distils a copy of the student, and measures it."""
        encoder, kept = Encoder(self.tokenizer), list[dict[str, Any]]()
        selected = [row for row in self.scores if arm.select == "teacher_right" or row["id"] in self.student_wrong]
        if arm.prune or arm.oracle:
            records, answers = ({row.id: getattr(row, name) for row in self.rows} for name in ("record", "answer"))
            with clock(self.seconds, "prune"):
                made = list(prune(selected, arm.prune) if arm.prune else oracle(selected, records))
            with clock(self.seconds, "verify"):
                models = loaders(self.teacher, self.student)
                kept = list(verify_rows(made, answers, encoder, models, verify=arm.verify, **GRADING))
            self.counterfactuals[name] = kept
        groups = build_groups(selected, kept, encoder.encode_text, originals=arm.originals)
        with clock(self.seconds, "distil"):
            model = distil(self.student, self.teacher, groups, self.recipe, self.number)
        self.measure(name, model, ui)

    def numbers(self) -> dict[str, Any]:
        """In the nesting of `results.json` with a number in place of each list."""
        corpus, right, wrong = self.recipe.corpus_rows, len(self.rows), len(self.student_wrong)
        counts: dict[str, Any] = {"rows": corpus, "teacher_right": right, "student_wrong": wrong}
        for name, kept in self.counterfactuals.items():
            counts[name] = {"made": len(kept), "kept": sum(row["verified"] for row in kept)}
        found = detection(self.scores, {row.id: row.record for row in self.rows}, self.student_wrong)
        if "leaf" in counts:
            found["teacher_accuracy_on_counterfactuals"] = counts["leaf"]["kept"] / counts["leaf"]["made"]
        result = {
            "seed": self.number,
            "arms": self.arms,
            "detection": found,
            "window": {"inside": self.inside, "student_steps": self.student_steps},
            "counts": counts,
            "seconds": dict(self.seconds),
        }
        return rounded(result)


def prepare(recipe: Recipe, seed: int, ui: Ui, *, perplexity: bool = False, device: torch.device = CPU) -> Seed:
    """Trains both models on `device`, measures them, asks them the corpus and scores it.

    perplexity: also what the control of that name needs.
    """
    seconds: dict[str, float] = defaultdict(float)
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer)
    rate = recipe.first_learning_rate
    training: dict[str, Any] = {"learning_rate": rate, "device": device, "track": ui.track}
    with clock(seconds, "teacher"):
        steps, spare = recipe.teacher_steps, recipe.spare_operands
        teacher = train_teacher(tokenizer, seed, steps=steps, spare_operands=spare, size=recipe.teacher, **training)
    with clock(seconds, "student"):
        student, student_steps = train_student(
            tokenizer, seed, max_steps=recipe.student_max_steps, size=recipe.student, **training
        )
        ui.say(f"seed {seed}, student: stopped after {student_steps} steps, where its shortcut is strongest")
    tests = {name: make_rows(name, recipe.test_rows, seed) for name in TEST_SETS}
    watched = _watched(tests["adversarial"][:ATTENTION_ROWS], encoder)
    with clock(seconds, "select"):
        models, corpus = loaders(teacher, student), read(make_rows("corpus", recipe.corpus_rows, seed))
        asked = list(select_rows(corpus, encoder, models, select="student_wrong", **GRADING))
        rows = [row for row, one in zip(corpus, asked) if one.teacher and one.teacher.right]
        student_wrong = {one.id for one in asked if one.status == "ok"}  # and teacher right
    with clock(seconds, "score"):
        samples = [encode(encoder, row) for row in rows]
        scores = list(score_samples(samples, *models.values(), max_tokens=MAX_TOKENS, perplexity=perplexity))
    shared = Seed(
        recipe, seed, tokenizer, teacher, student, student_steps, tests, watched, rows, student_wrong, scores, seconds
    )
    for name, model in (("teacher", teacher), ("student", student)):
        shared.measure(name, model, ui)
    if not shared.inside:
        ui.say(f"seed {seed}: the student lies outside the useful window {WINDOW}; its comparison says little")
    return shared


def loaders(teacher: PreTrainedModel, student: PreTrainedModel) -> dict[str, Callable[[], PreTrainedModel]]:
    """Copies, as the stages change what they load."""
    return {"teacher": lambda: copy.deepcopy(teacher), "student": lambda: copy.deepcopy(student)}


@one_thread()
def run_seed(recipe: Recipe, seed: int, ui: Ui) -> Seed:
    """Every arm of one seed."""
    began = time.perf_counter()
    perplexity = any(ARMS[arm].prune == PruneConfig(signal="perplexity") for arm in recipe.arms)
    shared = prepare(recipe, seed, ui, perplexity=perplexity)
    for name in recipe.arms:
        shared.run(name, ARMS[name], ui)
    shared.seconds["total"] = time.perf_counter() - began
    return shared


def distil(
    student: PreTrainedModel, teacher: PreTrainedModel, groups: list[Group], recipe: Recipe, seed: int
) -> PreTrainedModel:
    """A copy of the student after stage 2.

    A step holds 2 · `recipe.groups` sequences whatever the groups hold: of KD as many originals, where every group has a
    counterfactual half as many groups, and in between (on average) where some have one.
    """
    if not groups:
        raise NothingToLearn("demo: no group is left to train on; the models are not what this recipe expects")
    paired = sum(bool(group["counterfactuals"]) for group in groups) / len(groups)
    batch = int(2 * recipe.groups / (1 + paired))
    with tempfile.TemporaryDirectory() as folder:
        arguments = LeafArguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=batch,
            learning_rate=recipe.learning_rate,
            warmup_steps=20,
            adam_beta2=0.98,
            weight_decay=0.01,
            max_tokens=MAX_TOKENS,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=student.device.type == "cpu",
            seed=seed,
        )
        model = copy.deepcopy(student).requires_grad_(True)
        trainer = LeafTrainer(model, copy.deepcopy(teacher), arguments, train_dataset=groups)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.set_attn_implementation("sdpa")
    return model.eval()


def summarise(preset: str, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`results.json` from the numbers of each seed."""
    stacked = stack(measured)
    arms = stacked["arms"]
    paired = {
        f"{a} - {b}": {test: [round(x - y, 4) for x, y in zip(arms[a][test], arms[b][test])] for test in TEST_SETS}
        for a, b in COMPARISONS
        if a in arms and b in arms
    }
    return {"preset": preset, "seeds": stacked.pop("seed"), **stacked, "paired": paired}


def summary(results: dict[str, Any]) -> rich.console.Group:
    """The arms and their paired differences, for `rich`."""
    names = [test.replace("_", " ") for test in TEST_SETS]
    arms = Table("arm", *names, "attention to Z", title=f"exact match, {len(results['seeds'])} seed(s)")
    for arm, metrics in results["arms"].items():
        arms.add_row(arm, *(mean_sd(metrics[name]) for name in (*TEST_SETS, "attention_to_confounder")))
    paired = Table("difference", *names, "worst (adversarial)", title="seed by seed")
    for name, values in results["paired"].items():
        worst = f"{min(values['adversarial']):+.3f}"
        paired.add_row(name, *(mean_sd(values[test], "+") for test in TEST_SETS), worst)
    outside = [str(seed) for seed, ok in zip(results["seeds"], results["window"]["inside"]) if not ok]
    if outside:
        paired.caption = f"seed {', '.join(outside)}: student outside the useful window; its comparison says little"
    return rich.console.Group(arms, paired)


def _watched(rows: Rows, encoder: Encoder) -> list[Marked]:
    """Test rows with the confounder marked."""
    watched = []
    for row in read(rows):
        sample = encode(encoder, row)
        confounder = marked(sample.text, sample.offsets, [row.record["confounder"]], row.record["prompt"])
        watched.append(Marked(sample.input_ids, sample.response_start, confounder.tolist()))
    return watched


def read(rows: Rows) -> list[Row]:
    return [row for row in read_rows(rows) if isinstance(row, Row)]


def encode(encoder: Encoder, row: Row, level: str = "instruction") -> Sample:
    (sample,) = encoder.encode(row, level=level)
    if isinstance(sample, Skip):
        raise ValueError(f"demo: row {row.id} cannot be rendered: {sample.detail}")
    return sample


def _save_inputs(folder: Path, seed: Seed) -> None:
    for name, model in (("teacher", seed.teacher), ("student", seed.student)):
        model.save_pretrained(folder / "models" / name)
        seed.tokenizer.save_pretrained(folder / "models" / name)
    records = sorted((row.record for row in seed.rows), key=lambda record: not record["misleading"])
    chosen = records[:5] + records[-5:]
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))


@contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began


def stack(items: Sequence[Any]) -> Any:
    """Dicts of numbers to one dict of lists."""
    if isinstance(items[0], dict):
        return {key: stack([item[key] for item in items]) for key in items[0]}
    return list(items)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def mean_sd(values: Sequence[float], sign: str = "") -> str:
    x = torch.tensor(values, dtype=torch.float64)
    return f"{float(x.mean()):{sign}.3f}" + (f" ± {float(x.std()):.3f}" if len(values) > 1 else "")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
