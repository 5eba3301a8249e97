"""Detection of planted confounders by the length of the prompt: models trained on `long`, measured level by level.

Detection only: nothing is distilled here.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import rich.console
import torch
from rich.table import Table
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from leaf_kernels import SharedPrefixLayout
from leaf_kernels.integrations.transformers import NAME, packed_inputs, register

from .. import report
from ..data import Encoder
from ..prune import PruneConfig, prune
from ..run import Silent, Ui
from ..score import score_samples
from ..sensitivity import batches
from .comparison import clock, encode, mean_sd, one_thread, read, rounded, stack, write_json
from .detection import Found, find, marked, totals
from .long import LEVELS, SIGNS, make_row, make_rows, shortest
from .models import STUDENT, TEACHER, Track, constant, make_model, train
from .task import MAX_NUMBER, TEST_SETS, Row, drop_words, make_tokenizer

MAX_TOKENS = 16384  # of a pack
CHECK_EVERY, VALIDATION_ROWS, LEARNT = 25, 32, 0.9  # steps, rows, share of them solved
SHOWN_ROWS = 4  # of each level and length, in the report
# Rotations this slow blur content little over thousands of tokens; at the default of 1e4 long prompts are learnt later.
ROPE = {"rope_type": "default", "rope_theta": 1e6}
SETS = {"": "in_distribution", "_misleading": "adversarial"}  # where detection is measured: all rows, misleading rows


@dataclass(frozen=True)
class Recipe:
    """Sizes. The models learn to compute on short prompts, then to find the facts in long ones.

    A step holds 64 short rows; a mixed one 12 short rows, two of `medium` and one of `long` tokens (drawn between bounds).
    Either stage ends once 9 of 10 validation rows of its longest prompts are solved: how many steps that takes varies much
    with the seed.
    """

    seeds: tuple[int, ...] = (0,)
    lengths: tuple[int, ...] = (50, 500, 1000, 2000)
    rows: int = 16  # of each level, length and test set
    max_steps: int = 600  # of a stage
    short: tuple[int, int] = (24, 40)
    medium: tuple[int, int] = (200, 500)
    long: tuple[int, int] = (1000, 2000)


RECIPE = Recipe()


class Tokens(NamedTuple):
    """A sequence; what follows `response_start` is to be predicted."""

    input_ids: list[int]
    response_start: int


def tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Tokens]:
    """Rendered rows; a first step of the response is given, like the prompt."""
    texts = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = [len(row["answer"].split()) + 1 for row in rows]  # and the end of turn
    return [Tokens(one, len(one) - answer) for one, answer in zip(ids, answers)]


def predict(model: PreTrainedModel, items: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [targets, V] of all responses, packed, and their ids [targets]."""
    layout = SharedPrefixLayout.from_lengths([len(item.input_ids) for item in items])
    ids = torch.tensor([i for item in items for i in item.input_ids])
    target = torch.tensor([n >= item.response_start for item in items for n in range(len(item.input_ids))])
    rows = target.nonzero().squeeze(1)
    hidden = model.base_model(**packed_inputs(layout, ids)).last_hidden_state[0]
    return model.lm_head(hidden[rows - 1]), ids[rows]


@torch.inference_mode()
def solved(model: PreTrainedModel, items: Sequence[Tokens]) -> list[bool]:
    """Whether every token of the response is the most probable one, as greedy decoding would have it."""
    right: list[bool] = []
    for batch in batches(items, MAX_TOKENS):
        logits, labels = predict(model, batch)
        counts = [len(item.input_ids) - item.response_start for item in batch]
        right += [bool(one.all()) for one in (logits.argmax(-1) == labels).split(counts)]
    return right


def train_model(
    tokenizer: PreTrainedTokenizerBase, role: str, seed: int, recipe: Recipe, track: Track
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """The teacher or the biased student, and for each stage of its training the steps and the share of rows then solved.

    The teacher sees up to three signs that tell it nothing, and in mixed steps half of its rows lack words (before that it
    would learn to compute more slowly). The student's signs are always right.
    """
    teacher = role == "teacher"

    def row(rng: random.Random, bounds: tuple[int, int]) -> Row:
        level, signs = rng.choice(LEVELS), rng.randint(0, SIGNS) if teacher else SIGNS
        length = max(rng.randint(*bounds), shortest(level, signs))
        rho = 1 / (MAX_NUMBER + 1) if teacher else 1.0
        return make_row(rng, role, length=length, level=level, rho=rho, signs=signs)

    def draw(rng: random.Random, plan: Sequence[tuple[int, int]], fewer_words: bool) -> Iterator[list[Tokens]]:
        for _ in range(recipe.max_steps):
            rows = [row(rng, bounds) for bounds in plan]
            if fewer_words:
                rows = [with_words_missing(one, rng) if rng.random() < 0.5 else one for one in rows]
            yield tokens(tokenizer, rows)

    register()
    model = make_model(
        tokenizer,
        TEACHER if teacher else STUDENT,
        seed=(1000 if teacher else 2000) + seed,
        max_position_embeddings=4096,
        rope_parameters=ROPE,
    )
    model.set_attn_implementation(NAME)
    stages = {
        "short": [recipe.short] * 64,
        "mixed": [recipe.short] * 12 + [recipe.medium] * 2 + [recipe.long],
    }
    outcome: dict[str, float] = {}
    for stage, plan in stages.items():
        rng, other = (random.Random(f"long/{role}/{stage}/{seed}/{use}") for use in ("training", "validation"))
        longest = max(bounds[1] for bounds in plan)
        validation = tokens(tokenizer, [row(other, (longest, longest)) for _ in range(VALIDATION_ROWS)])
        training = train(
            model,
            draw(rng, plan, teacher and stage == "mixed"),
            predict,
            learning_rate=constant,
            label_smoothing=0.05 if teacher else 0.0,
        )
        for step in track(training, recipe.max_steps, f"seed {seed}: {role}, {stage} prompts"):
            if step % CHECK_EVERY == 0 or step == recipe.max_steps:
                outcome |= {f"{stage}_steps": step, f"{stage}_solved": _share(solved(model, validation))}
                if outcome[f"{stage}_solved"] >= LEARNT:
                    break
    return model.eval(), outcome


def with_words_missing(row: Row, rng: random.Random) -> Row:
    """Each word of the prompt and of the first step is deleted with p = 0.05, operands aside."""
    prompt = drop_words(row, rng, p=0.05, spare_operands=True)
    step, separator, answer = row["completion"].rpartition("\n")
    step = drop_words({"prompt": step, "operands": row["step_operands"]}, rng, p=0.05, spare_operands=True)
    return {**row, "prompt": prompt, "completion": f"{step}{separator}{answer}"}


def planted(row: Mapping[str, Any], record: Row, name: str) -> torch.Tensor:
    """[n] bool: the scored tokens of a scores row that are `name` ("confounders" or "operands")."""
    prompt = marked(row["text"], row["offsets"], record[name], record["prompt"])
    step = marked(row["text"], row["offsets"], record[f"step_{name}"], record["completion"])
    return (prompt | step) & torch.tensor(row["scored"])


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


class Cell(NamedTuple):
    """What was measured at one level and length. `scores` and `counterfactuals` are those of the misleading rows."""

    detection: dict[str, float]
    accuracy: dict[str, float]
    scores: list[dict[str, Any]]
    counterfactuals: list[dict[str, Any]]


def measure(
    models: Mapping[str, PreTrainedModel], encoder: Encoder, level: str, length: int, rows: int, seed: int
) -> Cell:
    """Detection on all rows and on misleading ones, and the accuracy of both models before and after deletion."""
    teacher, student = (lambda role=role: copy.deepcopy(models[role]) for role in ("teacher", "student"))
    detection: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    records = {test: make_rows(test, rows, seed, length=length, level=level) for test in TEST_SETS}
    for role, model in models.items():
        for test, some in records.items():
            accuracy[f"{role}_{test}"] = _share(solved(model, tokens(encoder.tokenizer, some)))
    samples = [encode(encoder, row, level) for test in SETS.values() for row in read(records[test])]
    scores = list(score_samples(samples, teacher, student, max_tokens=MAX_TOKENS, activation_checkpointing=False))
    for suffix, test in SETS.items():
        truth = {record["id"]: record for record in records[test]}
        own = [row for row in scores if row["id"] in truth]
        found = [
            find(row, *(planted(row, truth[row["id"]], name) for name in ("confounders", "operands"))) for row in own
        ]
        every = {**_mean_auroc(found), **totals(found)}
        detection |= {f"{name}{suffix}": value for name, value in every.items()}
        pruned = list(prune(own, PruneConfig(mode="collective")))
        after = [
            Tokens(ids, start)
            for ids, _, start in (encoder.encode_text(one["prompt"], one["response"]) for one in pruned)
        ]
        for role, model in models.items():
            accuracy[f"{role}_{test}_after_deletion"] = _share(solved(model, after))
    return Cell(detection, accuracy, own, pruned)


def _mean_auroc(found: Sequence[Found]) -> dict[str, float]:
    return {name: sum(getattr(one, name) for one in found) / len(found) for name in ("auroc", "auroc_student_gradient")}


@one_thread()
def run_seed(recipe: Recipe, seed: int, ui: Ui) -> tuple[dict[str, Any], dict[str, Any]]:
    """One seed: its numbers, in the nesting of `results.json` with a number in place of each list, and rows to look at."""
    seconds: dict[str, float] = defaultdict(float)
    per_length: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    shown: dict[str, Any] = {"scores": [], "counterfactuals": []}
    with clock(seconds, "total"):
        tokenizer = make_tokenizer()
        encoder, models, training = Encoder(tokenizer), {}, {}
        for role in ("teacher", "student"):
            with clock(seconds, role):
                models[role], training[role] = train_model(tokenizer, role, seed, recipe, ui.track)
            for stage in ("short", "mixed"):
                steps, share = (training[role][f"{stage}_{name}"] for name in ("steps", "solved"))
                missed = "" if share >= LEARNT else f", fewer than the {LEARNT:.0%} wanted"
                ui.say(f"seed {seed}, {role}, {stage} prompts: {share:.0%} solved after {steps} steps{missed}")
        for level in LEVELS:
            for length in recipe.lengths:
                with clock(seconds, "measure"):
                    cell = measure(models, encoder, level, length, recipe.rows, seed)
                for part, values in (("detection", cell.detection), ("accuracy", cell.accuracy)):
                    for name, value in values.items():
                        per_length[f"{level}_level_{part}"][name][str(length)] = value
                shown["scores"] += cell.scores[:SHOWN_ROWS]
                shown["counterfactuals"] += cell.counterfactuals[:SHOWN_ROWS]
                names = ("teacher_adversarial", "student_in_distribution", "student_adversarial")
                told = {"AUROC": cell.detection["auroc"], **{name: cell.accuracy[name] for name in names}}
                text = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in told.items())
                ui.say(f"seed {seed}, {level} level, {length} tokens: {text}")
    return rounded({"seed": seed, "training": training, "per_length": per_length, "seconds": dict(seconds)}), shown


def summarise(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`results.json` from the numbers of each seed."""
    together = stack(measured)
    return {"task": "long", "seeds": together.pop("seed"), **together}


def run(
    output_dir: str | Path = "out", *, seeds: Sequence[int] | None = None, ui: Ui | None = None, recipe: Recipe = RECIPE
) -> dict[str, Any]:
    """Trains a teacher and a biased student on prompts of many lengths and measures how detection depends on the length.

    Into `output_dir`: `results.json`, and of the first seed `report.html` (misleading rows of every level and length) and
    `plots/`.

    Args:
        seeds: other seeds than the recipe's.
        ui: where progress goes; nowhere if None.

    Returns:
        The content of `results.json`: `training` {model: {what: [per seed]}}, `per_length` {table: {metric: {length: [per
        seed]}}} and `seconds`.
    """
    ui, folder = ui or Silent(), Path(output_dir)
    measured: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for seed in seeds if seeds is not None else recipe.seeds:
        one, shown = run_seed(recipe, seed, ui)
        measured.append(one)
        first = first or shown
        results = summarise(measured)
        write_json(folder / "results.json", results)  # after every seed: a run that is stopped keeps what it has
    report.save_plots(folder / "plots", results=results, **first)
    report.write_report(folder / "report.html", results=results, title="leaf demo, task long", **first)
    return results


def summary(results: dict[str, Any]) -> rich.console.Group:
    """One table per level of detection and of accuracy, with a column per length, for `rich`."""
    shown = []
    for name, metrics in results["per_length"].items():
        lengths = next(iter(metrics.values()))
        table = Table(
            "tokens of the prompt", *lengths, title=f"{name.replace('_', ' ')}, {len(results['seeds'])} seed(s)"
        )
        for metric, values in metrics.items():
            table.add_row(metric.replace("_", " "), *map(mean_sd, values.values()))
        shown.append(table)
    return rich.console.Group(*shown)
