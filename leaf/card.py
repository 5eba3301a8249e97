"""The model card (README.md) of a distilled model."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import __version__

if TYPE_CHECKING:
    from .trainer import LeafTrainer

PICTURE = "pruned_sample.png"
NO_EVALUATION = "Not evaluated yet: `leaf eval` measures accuracy, and attention on flagged tokens, before and after."
_MARKS = ("<!-- evaluation -->", "<!-- /evaluation -->")
_SHORT = 300  # prompt tokens that make a picture of readable size


def model_card(
    trainer: LeafTrainer,
    *,
    student: str | None = None,
    teacher: str | None = None,
    sections: Sequence[str] = (),
    tags: str | Sequence[str] | None = None,
    **metadata: Any,
) -> ModelCard:
    """What the trainer knows of its model.

    Args:
        student, teacher: names; default: those that the models were loaded by. Of a folder only its own name is used.
        sections: Markdown, in front of how to use the model.
        tags: beside those of the method.
        metadata: fields of `huggingface_hub.ModelCardData`.
    """
    args = trainer.args
    model: Any = trainer.model
    base = name_of(student or model.name_or_path)
    own = ["leaf", "knowledge-distillation", "arxiv:2506.07851"]
    defaults: dict[str, Any] = {
        "base_model": base or None,
        "library_name": "peft" if hasattr(model, "peft_config") else "transformers",
        "pipeline_tag": "text-generation",
    }
    added = [tags] if isinstance(tags, str) else [*(tags or ())]
    data = ModelCardData(**{**defaults, **metadata}, tags=[*own, *(tag for tag in added if tag not in own)])
    adapter: Any = getattr(model, "active_peft_config", None)
    settings = {
        "teacher's answers": "computed on the fly"
        if trainer.answers is None
        else f"from a cache ({trainer.answers.says})",
        **(
            {"adapters": f"LoRA, rank {adapter.r}, alpha {adapter.lora_alpha:g}"}
            if hasattr(adapter, "lora_alpha")
            else {}
        ),
        "loss": "one mean over all response tokens" if args.loss_mode == "concat" else f"λ = {args.lambda_:g}",
        "divergence": args.divergence + (f", β = {args.beta:g}" if args.beta is not None else ""),
        "temperature": f"{args.temperature:g}",
        "weight of the cross-entropy": f"{args.ce_weight:g}",
        "counterfactuals of a sample per epoch": args.counterfactuals_per_sample,
        "columns of the vocabulary": "all" if trainer.vocab_size is None else f"{trainer.vocab_size:,}",
        "steps": trainer.state.global_step,
        "groups in a step, at most": args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size,
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "seed": args.seed,
    }
    online: Any = trainer.teacher
    taught = name_of(str(teacher or getattr(online, "name_or_path", ""))) or (
        "a cached teacher" if online is None else type(online).__name__
    )
    body = [
        f"# {metadata.get('model_name') or Path(str(args.output_dir)).name}",
        f"{f'`{base}`' if base else 'A model'} distilled from `{taught}` with LeaF, causal attention distillation "
        "([arXiv 2506.07851](https://arxiv.org/abs/2506.07851)): tokens of the prompt that the student's loss reacts to and "
        "the teacher's does not are deleted, and the student learns the teacher's distribution on the original prompts and "
        "on those without them.",
        "## Training",
        _table(("", ""), settings.items()),
        *sections,
        "## Use",
        '```python\nfrom transformers import pipeline\n\npipeline("text-generation", model="PATH")\n```',
        f"leaf-kernels {__version__}, transformers {transformers.__version__}, torch {torch.__version__}.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def run_card(
    trainer: LeafTrainer,
    folder: Path,
    *,
    scores: Iterable[Mapping[str, Any]],
    counterfactuals: Iterable[Mapping[str, Any]],
    data: str | None = None,
    **names: str,
) -> None:
    """Writes README.md and a picture of a pruned sample beside the model in `folder`.

    Args:
        scores, counterfactuals: the tables that the model was trained on.
        data: what the rows were read from.
        names: `student` and `teacher`.
    """
    table, example = _pruning(scores, counterfactuals)
    sections = ["## Pruning", table]
    if example:
        from .plots import plot_tokens

        plot_tokens(*example)[0].savefig(folder / PICTURE, dpi=160)
        sections.append(
            f"Row `{example[0]['id']}`: how much teacher and student react to each token of the prompt, their difference, "
            f"and what was deleted.\n\n![A pruned prompt]({PICTURE})"
        )
    sections += ["## Evaluation", "\n".join((_MARKS[0], NO_EVALUATION, _MARKS[1]))]
    hub = data is not None and not os.path.exists(data) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:.*)?", data)
    metadata = {"datasets": data.partition(":")[0]} if data and hub else {}
    card = model_card(trainer, sections=sections, model_name=f"{name_of(names['student'])}-leaf", **names, **metadata)
    card.save(folder / "README.md")


def add_evaluation(path: Path, rows: Iterable[Mapping[str, Any]], data: str, *, unseen: bool) -> None:
    """Puts the rows of the evaluation table into a card of `run_card`; a card without their place is left alone.

    data: what the models were evaluated on. unseen: they were not trained on it; only then is it a result in the metadata.
    """
    if not path.exists() or not all(mark in path.read_text(encoding="utf-8") for mark in _MARKS):
        return
    card, rows = ModelCard.load(path), list(rows)
    names = ("accuracy", "attention_to_flagged", "checked", "unchecked", "skipped")
    shown = [(row["model"], *("–" if row[n] is None else f"{row[n]:.4g}" for n in names)) for row in rows]
    table = _table(("student", *(name.replace("_", " ") for name in names)), shown)
    before, _, rest = card.text.partition(_MARKS[0])
    trained = "" if unseen else ", **rows that the student was trained on**"
    said = (
        f"Accuracy on `{name_of(data)}`{trained}: of the rows whose answers could be checked. Attention to flagged tokens "
        f"is that on the rows of the training data that were scored.\n\n{table}"
    )
    card.text = f"{before}{_MARKS[0]}\n{said}\n{_MARKS[1]}{rest.partition(_MARKS[1])[2]}"
    accuracy = next((row["accuracy"] for row in rows if row["model"] == "after"), None)
    card.data.eval_results = None
    if accuracy is not None and unseen:
        card.data.eval_results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=name_of(data),
                dataset_name=name_of(data),
                metric_type="accuracy",
                metric_value=round(accuracy, 4),
            )
        ]
    card.save(path)


def name_of(name: str) -> str:
    """A hub id as it is; of a file or folder its own name: where it lay is nobody's business."""
    return Path(name).resolve().name if os.path.exists(name) else name


def _pruning(
    scores: Iterable[Mapping[str, Any]], counterfactuals: Iterable[Mapping[str, Any]]
) -> tuple[str, tuple[Mapping[str, Any], list[Any]] | None]:
    """The statistics, level by level, as a table; and a scored row with what was deleted from it."""
    from .plots import deleted_tokens

    used = collections.defaultdict(list)
    levels: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for cf in counterfactuals:
        levels[cf["level"]]["dropped" if cf["verified"] is False else "used"] += 1
        if cf["verified"] is not False:
            used[cf["source_id"], cf["level"], cf["cut"]].append(cf["removed"])
    example = None
    for row in scores:
        count, removed = levels[row["level"]], used[row["id"], row["level"], row["cut"]]
        count[row["status"]] += 1
        count["pruned"] += bool(removed)
        count["tokens"] += len(removed) * (row["response_start"] or 0)
        count["deleted"] += sum(len(deleted_tokens(row, spans)) for spans in removed)
        if removed and (example is None or row["response_start"] <= _SHORT < example[0]["response_start"]):
            example = (row, [span for spans in removed for span in spans])
    head = ("level", "scored", "skipped", "pruned", "counterfactuals used", "dropped by verification", "tokens deleted")
    lines = [
        (
            level,
            *(f"{count[name]:,}" for name in ("ok", "skipped", "pruned", "used", "dropped")),
            f"{count['deleted'] / count['tokens']:.2%}" if count["tokens"] else "–",
        )
        for level, count in levels.items()
    ]
    note = "Tokens deleted: of the tokens before the target, over the counterfactuals that were used."
    return f"{_table(head, lines)}\n\n{note}", example


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))
