"""Measurements during training, for `trainer.add_callback`: accuracy by generation, and attention on flagged tokens.

Both ask the student itself, between two steps, and give it back as it was. Rows are dealt to the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from .data import Encoder, Row, Skip
from .evaluate import ScoreRow, attention_to_flagged, summary
from .generate import asker
from .graders import Grader
from .prune import PruneConfig
from .select import answer_rows
from .trainer import LeafTrainer


class _OfStudent(TrainerCallback):
    def __init__(self, trainer: LeafTrainer):
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                f"{type(self).__name__}: each rank runs the student by itself, but here they share its weights (FSDP, "
                "ZeRO-3): train with DDP, or measure what was saved (`leaf eval`)"
            )
        self.trainer = trainer

    @property
    def student(self) -> Any:
        """Without wrappers: generating, ranks are not in step."""
        model: Any = self.trainer.model
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def share(self, rows: Sequence[Any]) -> list[Any]:
        """The rows of this rank."""
        return list(rows[self.trainer.args.process_index :: self.trainer.args.world_size])

    def mean(self, total: float, count: int) -> float | None:
        """Over all ranks; None of nothing. Collective."""
        sums = torch.tensor([total, count], dtype=torch.float64, device=self.trainer.args.device)
        total, n = self.trainer.accelerator.reduce(sums, "sum").tolist()
        return total / n if n else None


class GradedEvaluation(_OfStudent):
    """Logs `eval_accuracy`, which trackers show as `eval/accuracy`: the share of rows that the student answers rightly,
    generating greedily. It is among the metrics of `evaluate()`, so `metric_for_best_model="eval_accuracy"` works.

    Args:
        rows: of `leaf.data.read_rows`, with answers that the grader can check; others are left out.
        encoder: `leaf.data.Encoder(tokenizer)`, with the options that the training data were rendered with.
        grader: see `leaf.graders.grade`.
        every: after so many steps; default: at each evaluation of the Trainer.
        max_new_tokens, max_tokens: see `leaf.generate.generate`.

    Raises:
        ValueError: the ranks share the student's weights; or, when it runs, no row has an answer that can be checked.
    """

    def __init__(
        self,
        trainer: LeafTrainer,
        rows: Iterable[Row | Skip],
        encoder: Encoder,
        *,
        grader: str | Grader = "math",
        every: int | None = None,
        max_new_tokens: int = 512,
        max_tokens: int = 16384,
    ):
        super().__init__(trainer)
        if every is not None and every < 1:
            raise ValueError(f"GradedEvaluation: every must be a positive number of steps, or None, got {every}")
        self.rows = [row for row in rows if isinstance(row, Row)]
        self.encoder, self.grader, self.every = encoder, grader, every
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_tokens": max_tokens}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.trainer.log({"eval_accuracy": self.accuracy()})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if not self.every:
            metrics["eval_accuracy"] = self.accuracy()
            self.trainer.log({"eval_accuracy": metrics["eval_accuracy"]})

    def accuracy(self) -> float:
        """Of the student as it is now. Collective."""
        ask = asker(lambda: self.student, self.encoder, **self.options)
        with self.trainer.interval.paused():
            with self.trainer.accelerator.autocast():
                answers = answer_rows(ask, self.encoder, self.share(self.rows), grader=self.grader)
            result = summary(answers)
            checked = int(result["checked"] or 0)
            mean = self.mean((result["accuracy"] or 0.0) * checked, checked)
        if mean is None:
            raise ValueError(
                f"GradedEvaluation: none of the {len(self.rows)} rows has an answer that grader {self.grader!r} can check"
            )
        return mean


class AttentionToFlagged(_OfStudent):
    """Logs `attention/flagged` before and after training: the share of the student's attention that falls on flagged
    tokens while it answers (mean over response tokens, heads and layers, then over rows).

    Args:
        rows: of a scores table (`leaf.score.score_samples`, or `leaf.tables.open_table("run/score")`).
        config: what flags them.
        max_tokens: of a pack.

    Raises:
        ValueError: the ranks share the student's weights; or, when it runs, nothing is flagged in any row.
    """

    def __init__(self, trainer: LeafTrainer, rows: Sequence[ScoreRow], config: PruneConfig, *, max_tokens: int = 16384):
        super().__init__(trainer)
        self.rows, self.config, self.max_tokens = list(rows), config, max_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.log({"attention/flagged": self.attention()})

    on_train_end = on_train_begin

    def attention(self) -> float:
        """Of the student as it is now. Collective."""
        with self.trainer.interval.paused(), self.trainer.accelerator.autocast():
            each = attention_to_flagged(self.student, self.share(self.rows), self.config, max_tokens=self.max_tokens)
            shares = [share for share in each if share is not None]
        mean = self.mean(sum(shares), len(shares))
        if mean is None:
            raise ValueError(
                f"AttentionToFlagged: nothing is flagged in the {len(self.rows)} rows: flag more with a larger q or tau"
            )
        return mean
