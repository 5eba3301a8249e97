"""LeafTrainer: E7 exactly, however a step is cut into micro-batches, packs and ranks."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from distributed import on_ranks
from torch.utils.data import IterableDataset
from training import VOCAB, Stream, arguments, assert_same, cached, groups, model, plain_e7, train
from transformers import AutoModelForCausalLM

from leaf.pack import Collator
from leaf.trainer import LeafTrainer, NonFiniteLoss


@pytest.fixture(scope="module")
def whole_steps(tmp_path_factory):
    """Two steps, of 4 and of 3 groups, each in one pack on one rank."""
    return train(tmp_path_factory.mktemp("whole"))


def test_equals_the_definition(whole_steps):
    expected = [plain_e7(groups()[:4]), plain_e7(groups()[4:])]
    assert_same(whole_steps, ([e[0] for e in expected], [e[1] for e in expected]))


CUTS = {
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "one row at a time": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_tokens": 1},
    "small packs": {"max_tokens": 30},
    "checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("cut", CUTS)
def test_cut_of_a_step_changes_nothing(cut: str, whole_steps, tmp_path):
    assert_same(train(tmp_path, **CUTS[cut]), whole_steps)


@pytest.mark.slow
def test_a_compiled_student_has_the_same_gradient_in_one_graph(whole_steps, tmp_path):
    from torch._dynamo.utils import counters

    counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}
    assert_same(train(tmp_path, **options), [each[:1] for each in whole_steps])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_stream_equals_sequence(whole_steps, tmp_path):
    assert_same(train(tmp_path, Stream(), max_steps=2), whole_steps)


def _on_two_ranks(output: str) -> dict[str, Any]:
    from test_callbacks import accuracy_of_this_rank  # which imports from here

    torch.set_num_threads(1)
    cases = {
        "batch": train(output, per_device_train_batch_size=2),
        "accumulation": train(output, per_device_train_batch_size=1, gradient_accumulation_steps=2),
        "packs": train(output, per_device_train_batch_size=2, max_tokens=20),
        "stream": train(output, Stream(), per_device_train_batch_size=2, max_steps=2),
    }
    trainer = LeafTrainer(
        model(0), model(1, hidden=32), arguments(output, per_device_eval_batch_size=2), eval_dataset=groups()
    )
    trained = LeafTrainer(
        model(0), model(1, hidden=32), arguments(output, learning_rate=1e-2, num_train_epochs=3), groups(5)
    )
    trained.train()
    weights = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    (log,) = interval_logs(output, per_device_train_batch_size=2, logging_steps=2)
    measured = {"evaluate": trainer.evaluate(), "accuracy": accuracy_of_this_rank(output)}
    return {"cases": cases, "weights": weights, "log": log, **measured}


def interval_logs(output: str, **overrides: Any) -> list[dict[str, float]]:
    """What is logged beside the loss; the clock ticks when it is looked at."""
    trainer = LeafTrainer(model(0), model(1, hidden=32), arguments(output, **overrides), groups())
    with mock.patch("leaf.metrics.time", SimpleNamespace(perf_counter=itertools.count().__next__)):
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_ranks_change_nothing(whole_steps, tmp_path):
    """Two gloo ranks. With 4 groups a step the second rank's first share has no counterfactual; of the last 3 it has one."""
    alone = LeafTrainer(model(0), model(1, hidden=32), arguments(tmp_path), eval_dataset=groups()).evaluate()
    first, second = on_ranks(_on_two_ranks, str(tmp_path))
    for result in (first, second):
        for case in result["cases"].values():
            assert_same((case[0] or whole_steps[0], case[1]), whole_steps)
        for name in ("eval_loss", "eval_kl_original", "eval_kl_counterfactual"):
            assert result["evaluate"][name] == pytest.approx(alone[name], rel=1e-6)
        assert result["accuracy"] == 0.75
    (log,) = interval_logs(str(tmp_path), logging_steps=2)
    for name in ("kl/original", "kl/counterfactual", "pruned_fraction", "tokens_per_second"):
        assert first["log"][name] == second["log"][name] == pytest.approx(log[name], rel=1e-6), name
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), f"{name} differs between the ranks"
    assert not torch.equal(first["weights"]["lm_head.weight"], model(0).lm_head.weight), "the head was not trained"


def test_evaluate_is_a_token_mean_whatever_the_packs(tmp_path):
    results = [
        LeafTrainer(
            model(0),
            model(1, hidden=32),
            arguments(tmp_path, max_tokens=max_tokens, per_device_eval_batch_size=batch, lambda_=lambda_),
            eval_dataset=groups(),
        ).evaluate()
        for max_tokens, batch, lambda_ in ((1000, 8, 0.5), (1, 1, 0.5), (30, 3, 0.5), (1000, 8, 1.0))
    ]
    expected, _ = plain_e7(groups())
    for result in results[:3]:
        assert result["eval_loss"] == pytest.approx(expected, rel=1e-5)
    for result in results[1:]:
        assert result["eval_kl_original"] == pytest.approx(results[0]["eval_kl_original"], rel=1e-6)
        assert result["eval_kl_counterfactual"] == pytest.approx(results[0]["eval_kl_counterfactual"], rel=1e-6)
    assert results[3]["eval_loss"] == pytest.approx(results[3]["eval_kl_original"], rel=1e-6)
    assert results[0]["eval_kl_counterfactual"] > 0


def test_concat_is_one_mean_over_all_response_tokens(tmp_path):
    batch = groups()[:4]
    losses, _ = train(tmp_path, batch, loss_mode="concat")
    student, teacher = model(0), model(1, hidden=32)
    total, tokens = 0.0, 0
    for member in (m for g in batch for m in (g["original"], *g["counterfactuals"])):
        ids = torch.tensor(member["input_ids"])
        rows = slice(member["response_start"] - 1, len(ids) - 1)
        p, q = (F.log_softmax(m(input_ids=ids[None]).logits[0, rows], -1) for m in (teacher, student))
        total += F.kl_div(q, p, reduction="sum", log_target=True).item()
        tokens += len(ids) - member["response_start"]
    assert losses[0] == pytest.approx(total / tokens, rel=1e-5)


def test_cross_entropy_on_shared_rows_keeps_every_label(tmp_path):
    """The counterfactual's first target is predicted by a row of the original's prompt, under another label."""
    original = {"input_ids": [3, 4, 5, 6, 7], "response_start": 2}
    counterfactual = {"input_ids": [3, 4, 9, 7], "response_start": 2}  # shares 3 4: row 1 predicts 5 and 9
    group = [{"id": "0", "original": original, "counterfactuals": [counterfactual]}]
    without, _ = train(tmp_path, group)
    with_ce, _ = train(tmp_path, group, ce_weight=2.0)
    expected = 0.0
    for member in (original, counterfactual):
        ids = torch.tensor(member["input_ids"])
        logits = model(0)(input_ids=ids[None]).logits[0, 1:-1]
        expected += 0.5 * F.cross_entropy(logits, ids[2:]).item()
    assert with_ce[0] - without[0] == pytest.approx(2.0 * expected, rel=1e-5)


def test_counterfactuals_cycle_over_epochs(tmp_path):
    """One a step: over three epochs each of a row's three counterfactuals is used once."""
    group = next(g for g in groups() if len(g["counterfactuals"]) == 3)
    losses, _ = train(tmp_path, [group], counterfactuals_per_sample="1", num_train_epochs=3)
    expected = [plain_e7([{**group, "counterfactuals": [c]}])[0] for c in group["counterfactuals"]]
    assert sorted(losses) == pytest.approx(sorted(expected), rel=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_resume_equals_an_uninterrupted_run(stream: bool, tmp_path):
    """Stopped in the middle of the second epoch, of a stream: of its second pass."""
    options: dict[str, Any] = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "random",
        "counterfactuals_per_sample": "1",
        "save_strategy": "steps",
        "save_steps": 5,
    }
    options.update({"max_steps": 8} if stream else {"num_train_epochs": 2})
    data = Stream() if stream else groups()

    def trainer(folder: str) -> LeafTrainer:
        return LeafTrainer(model(0), model(1, hidden=32), arguments(tmp_path / folder, **options), data)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.state.global_step == whole.state.global_step == 8
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name


def test_best_checkpoint_and_plain_loading(tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        max_steps=3,
    )
    student = model(0)
    before = {k: v.shape for k, v in student.state_dict().items()}
    trainer = LeafTrainer(student, model(1, hidden=32), args, groups(), groups())
    trainer.train()
    assert trainer.model is student
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    loaded = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert {k: v.shape for k, v in loaded.state_dict().items()} == before
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), "the best checkpoint was not loaded back"
    assert loaded(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()


def test_padded_vocabularies_share_their_first_columns(tmp_path):
    trainer = LeafTrainer(model(0), model(1, vocab=VOCAB + 8), arguments(tmp_path), groups())
    assert trainer.vocab_size == VOCAB
    assert math.isfinite(trainer.train().training_loss)


def test_nan_stops_before_the_update(tmp_path):
    student = model(0)
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    head = student.lm_head.weight.detach().clone()
    trainer = LeafTrainer(student, model(1, hidden=32), arguments(tmp_path, learning_rate=1e-2), groups())
    with pytest.raises(NonFiniteLoss, match="loss is nan at step 0"):
        trainer.train()
    assert torch.equal(student.lm_head.weight, head)


def test_a_stream_cycles_its_counterfactuals_and_must_start_again(tmp_path):
    group = next(g for g in groups() if len(g["counterfactuals"]) == 3)

    class One(IterableDataset):
        def __iter__(self):
            return iter([group])

    options = {"max_steps": 3, "counterfactuals_per_sample": "1"}
    losses, _ = train(tmp_path, One(), **options)
    expected = [plain_e7([{**group, "counterfactuals": [c]}])[0] for c in group["counterfactuals"]]
    assert sorted(losses) == pytest.approx(sorted(expected), rel=1e-5)
    with pytest.raises(ValueError, match="starts again"):
        train(tmp_path, (g for g in [group]), **options)
    with pytest.raises(ValueError, match="dataloader_num_workers=0"):
        train(tmp_path, One(), **options, dataloader_num_workers=2)


def test_a_teacher_in_another_dtype_with_a_bias(tmp_path):
    """What the command line does on a GPU: the student in fp32, the teacher in bf16."""
    teacher = model(1, hidden=32)
    teacher.lm_head = torch.nn.Linear(32, VOCAB, bias=True)
    teacher = teacher.to(torch.bfloat16)
    for options in ({}, {"bf16": True}):
        result = LeafTrainer(model(0).float(), teacher, arguments(tmp_path, **options), groups()).train()
        assert math.isfinite(result.training_loss)


def test_attention_dropout_is_refused_before_training(tmp_path):
    student = model(0)
    student.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        LeafTrainer(student, model(1), arguments(tmp_path), groups())


def test_a_head_that_is_not_plain_is_refused(tmp_path):
    student = model(0)
    student.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"plain torch\.nn\.Linear without hooks"):
        LeafTrainer(student, model(1), arguments(tmp_path), groups())


def test_lora_on_the_body_trains_and_on_the_head_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    student = peft.get_peft_model(model(0), lora)
    LeafTrainer(student, model(1, hidden=32), arguments(tmp_path, learning_rate=1e-2), groups()).train()
    trained = [p for n, p in student.named_parameters() if "lora_B" in n]
    assert trained
    assert all(p.abs().sum() > 0 for p in trained)
    on_head = peft.get_peft_model(model(0), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="leave lm_head out of target_modules"):
        LeafTrainer(on_head, model(1), arguments(tmp_path), groups())


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_config_with_a_scale_that_the_class_does_not_apply_is_refused(which, tmp_path):
    models = {"student": model(0), "teacher": model(1)}
    models[which].config.logit_scale = 0.25
    with pytest.raises(ValueError, match=r"are not those of its output head with logit_scale=0\.25"):
        LeafTrainer(models["student"], models["teacher"], arguments(tmp_path), groups())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lambda_": 1.5}, "lambda_ must lie in"),
        ({"loss_mode": "sum"}, "loss_mode must be 'pair' or 'concat'"),
        ({"counterfactuals_per_sample": "many"}, "must be a positive number or 'all'"),
        ({"counterfactuals_per_sample": "0"}, "must be a positive number or 'all'"),
        ({"train_sampling_strategy": "group_by_length"}, "must be 'random' or 'sequential'"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last False"),
    ],
)
def test_bad_arguments_are_named(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **overrides)


@pytest.mark.parametrize("mode", ["cached_hidden", "cached_topk"])
def test_a_cached_teacher_is_the_teacher(mode, whole_steps, tmp_path):
    """Of a cache of the most probable tokens where it holds all of them; packs, workers and an idle pack change nothing."""
    cache = cached(tmp_path, groups(), mode)
    assert_same(train(tmp_path / "one", teacher=cache), whole_steps)
    assert_same(train(tmp_path / "packs", teacher=cache, max_tokens=1, dataloader_num_workers=1), whole_steps)
    (idle,) = Collator(10, answers=cache)([])["packs"]
    assert len(idle["rows"]) == 0
    trainer = LeafTrainer(model(0), cache, arguments(tmp_path / "idle"), groups(), groups())
    loss = trainer.compute_loss(trainer.model, idle, num_items_in_batch=torch.tensor([1.0, 1.0]))
    loss.backward()
    assert loss.item() == 0
    online = LeafTrainer(
        model(0), model(1, hidden=32), arguments(tmp_path / "online"), eval_dataset=groups()
    ).evaluate()
    assert trainer.evaluate()["eval_kl_counterfactual"] == pytest.approx(online["eval_kl_counterfactual"], rel=1e-5)


def test_what_a_cache_of_the_most_probable_tokens_cannot_do(tmp_path):
    cache = cached(tmp_path, groups(), "cached_topk")
    with pytest.raises(ValueError, match="use divergence='forward_kl'"):
        LeafTrainer(model(0), cache, arguments(tmp_path, divergence="reverse_kl"), groups())
    with pytest.raises(ValueError, match="cached log-probabilities are at 1: use that"):
        LeafTrainer(model(0), cache, arguments(tmp_path, temperature=2.0), groups())
    with pytest.raises(ValueError, match="cached probabilities are over the first 24 tokens: use that"):
        LeafTrainer(model(0), cache, arguments(tmp_path), groups(), vocab_size=16)
    for data in ([groups(12), None], [None, groups(12)]):
        with pytest.raises(LookupError, match="holds nothing for a sequence of"):
            LeafTrainer(model(0), cache, arguments(tmp_path), *data)


def test_groups_are_dealt_to_the_ranks_by_tokens():
    """Every group once, about as many tokens on each rank, equally many packs."""
    many = groups(40)
    packs = [Collator(40, rank=rank, ranks=3)(many)["packs"] for rank in range(3)]
    assert len({len(each) for each in packs}) == 1
    for each in packs:  # ranks that wait for each other run packs of like size
        sizes = [int(pack["layout"].num_tokens) for pack in each]
        assert sizes == sorted(sizes, reverse=True)
    tokens = [sum(int(pack["layout"].num_tokens) for pack in each) for each in packs]
    largest = max(len(g["original"]["input_ids"]) * (1 + len(g["counterfactuals"])) for g in many)
    assert max(tokens) - min(tokens) <= largest
    alone = Collator(40)(many)["packs"]
    for weight in ("weight_original", "weight_counterfactual"):
        total = sum(pack[weight].sum() for each in packs for pack in each)
        torch.testing.assert_close(total, sum(pack[weight].sum() for pack in alone))
    (first, second) = (Collator(40, rank=rank, ranks=2)(many[:1])["packs"] for rank in range(2))
    assert [len(p["rows"]) > 0 for p in (*first, *second)] == [True, False], "one group: the other rank idles"
