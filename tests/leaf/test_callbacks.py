"""Accuracy and attention measured during training, and the student given back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_trainer import arguments

from leaf.attention import Marked, attention_to_marked
from leaf.callbacks import AttentionToFlagged, GradedEvaluation
from leaf.data import Encoder, Row, Skip, read_rows
from leaf.evaluate import attention_to_flagged
from leaf.prune import PruneConfig
from leaf.trainer import LeafTrainer

NEW = 4


def student(seed: int = 0) -> Any:
    return tiny.model(tiny.tokenizer(), seed=seed, initializer_range=0.5)


def rows() -> list[Row]:
    """Four, of which the untrained student answers the first two and the fourth as their answers say."""
    prompts = ["How many?", "Eva has 2 books.", "The sign says 9.", "Tom doubles his coins."]
    encoder = Encoder(tiny.tokenizer())
    plain = [{"prompt": prompt, "completion": "9", "answer": "never"} for prompt in prompts]
    for n in (0, 1, 3):
        (row,) = read_rows([plain[n]])
        plain[n]["answer"] = greedy(encoder, row)
    unchecked = {"prompt": "Eva?", "completion": "9", "answer": None}
    return list(read_rows([*plain, unchecked]))


@torch.no_grad()
def greedy(encoder: Encoder, row: Row) -> str:
    """One prompt, no padding, no cache."""
    rendered = encoder.render(row)
    ids = encoder.tokenizer(rendered.text[: rendered.prompt_chars], add_special_tokens=False).input_ids
    start, model = len(ids), student()
    while len(ids) < start + NEW:
        ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return encoder.tokenizer.decode(ids[start:])


def same(response: str, answer: str) -> bool:
    return response == answer


def groups() -> list[dict[str, Any]]:
    original = {"input_ids": [7, 8, 9, 10, 11, 12], "response_start": 4}
    return [
        {
            "id": str(n),
            "original": original,
            "counterfactuals": [{"input_ids": [7, 9 + n, 10, 11, 12], "response_start": 3}],
        }
        for n in range(4)
    ]


def make_trainer(output: Any, **overrides: Any) -> LeafTrainer:
    options = {"per_device_train_batch_size": 1, **overrides}
    return LeafTrainer(student(), student(1), arguments(output, **options), groups(), groups()[:1])


def graded(trainer: LeafTrainer, **options: Any) -> GradedEvaluation:
    return GradedEvaluation(
        trainer,
        [Skip("s", "too_long", ""), *rows()],
        Encoder(tiny.tokenizer()),
        grader=same,
        max_new_tokens=NEW,
        max_tokens=60,
        **options,
    )


def of_history(trainer: LeafTrainer, name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def test_accuracy_every_so_many_steps(tmp_path) -> None:
    trainer = make_trainer(tmp_path)
    assert len({row.answer for row in rows()}) == 5, "the student's answers differ"
    trainer.add_callback(graded(trainer, every=2))
    trainer.model.model.layers[0].eval()  # a user's own
    trainer.train()
    assert of_history(trainer, "eval_accuracy") == [(2, 0.75), (4, 0.75)]


def test_the_student_is_given_back_as_it_was(tmp_path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    trainer.model.model.layers[0].eval()  # a user's own
    own = trainer.model.generation_config
    assert graded(trainer).accuracy() == 0.75
    scores = [{"status": "ok", "input_ids": [7, 8, 9, 10], "response_start": 3, "score": [0.0, 0.5, 1.0, None]}]
    scores[0] |= {"level": "instruction", "offsets": [(i, i + 1) for i in range(4)], "text": "abcd", "prompt_chars": 3}
    scores[0] |= {"scored": [True] * 3 + [False]}
    AttentionToFlagged(trainer, scores, PruneConfig(q=0.5)).attention()
    assert trainer.model.config._attn_implementation == "leaf"
    assert trainer.model.generation_config is own
    layer, other = trainer.model.model.layers
    assert trainer.model.training
    assert other.mlp.training
    assert not layer.training
    assert not layer.mlp.training


def test_accuracy_is_a_metric_of_each_evaluation(tmp_path) -> None:
    """The best checkpoint by it: training moves the answers away from those of the start."""
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy", "eval_on_start": True}
    trainer = make_trainer(tmp_path, **steps, **best)
    trainer.add_callback(graded(trainer))
    assert trainer.evaluate()["eval_accuracy"] == 0.75
    trainer.train()
    history = of_history(trainer, "eval_accuracy")
    assert [step for step, _ in history[-2:]] == [2, 4]
    assert history[-1][1] < 0.75
    assert trainer.state.best_metric == max(value for _, value in history[-2:])


def test_lora_is_measured_with_its_adapter(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(student(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = LeafTrainer(lora, student(1), arguments(tmp_path), groups())
    assert graded(trainer).accuracy() == 0.75
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert graded(trainer).accuracy() < 0.75


def accuracy_of_this_rank(output: str) -> float:
    """For a test with several ranks: three checkable rows of four are right, whoever gets which."""
    return graded(make_trainer(output)).accuracy()


def table() -> list[dict[str, Any]]:
    encoder = Encoder(tiny.tokenizer())
    made = []
    for n, row in enumerate(rows()[:3]):
        (sample,) = encoder.encode(row)
        values = [((i * 7 + n) % 10) / 10 if scored else None for i, scored in enumerate(sample.scored)]
        made.append({**sample.__dict__, "status": "ok", "score": values})
    return made


def test_attention_before_and_after(tmp_path) -> None:
    config = PruneConfig(q=0.3)
    trainer = make_trainer(tmp_path, learning_rate=0.1)
    trainer.add_callback(AttentionToFlagged(trainer, table(), config, max_tokens=1))
    trainer.train()
    (first, before), (last, after) = of_history(trainer, "attention/flagged")
    assert (first, last) == (0, 4)
    for model, logged in ((student(), before), (trainer.model, after)):
        shares = list(attention_to_flagged(model, table(), config))
        assert logged == pytest.approx(sum(shares) / 3, rel=1e-5)
    assert before != pytest.approx(after, rel=1e-3)


def test_what_cannot_be_measured_says_so(tmp_path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="nothing is flagged in the 3 rows"):
        AttentionToFlagged(trainer, table(), PruneConfig(rule="threshold", tau=-1.0)).attention()
    lone = GradedEvaluation(trainer, rows()[-1:], Encoder(tiny.tokenizer()))
    with pytest.raises(ValueError, match="none of the 1 rows has an answer that grader 'math' can check"):
        lone.accuracy()
    with pytest.raises(ValueError, match="every must be a positive number of steps, or None, got 0"):
        graded(trainer, every=0)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="AttentionToFlagged: each rank runs the student by itself"):
        AttentionToFlagged(trainer, table(), PruneConfig())


def test_attention_leaves_the_modes_alone() -> None:
    model = student().train()
    list(attention_to_marked(model, [Marked([7, 8, 9], 2, [True, False, False])], max_tokens=10))
    assert all(module.training for module in model.modules())
