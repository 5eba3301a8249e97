"""What benchmarks/gradient_sparsity.py calls K(δ), on rows that can be counted by hand; what it wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gradient_sparsity as sparsity
from leaf_kernels import linear_kl

V = 1024
KEYS = [str(delta) for delta in sparsity.DELTAS]
RESULT = sparsity.RESULTS / "gradient_sparsity.json"


def K(row: Iterable[float] | torch.Tensor, *deltas: float) -> list[int]:
    return sparsity.entries_needed(torch.as_tensor(row, dtype=torch.float32)[None], deltas)[:, 0].tolist()


def measured(gradient_entries: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of `measure_rows` with the same K for every δ."""
    zeros = torch.zeros(len(entropy))
    means = dict.fromkeys(("kl", "l1", "teacher_nll", "student_nll"), zeros)
    return {"K": gradient_entries.expand(len(sparsity.DELTAS), -1), "teacher_entropy": entropy, **means}


# -- K(δ) --------------------------------------------------------------------------------------------------------------


def test_few_entries():
    one, two = torch.zeros(V), torch.zeros(V)
    one[7] = -3.0
    two[7], two[90] = 1.0, -1.0  # both models sure, of different tokens
    assert K(one, 0.1, 0.01, 0.001) == [1, 1, 1]
    assert K(two, 0.6, 0.5, 0.49, 0.001) == [1, 1, 2, 2]  # a share of exactly δ may be dropped
    assert K(torch.zeros(V), 0.1) == [0]


@pytest.mark.parametrize("delta", [0.5, 0.25, 0.1, 0.01, 0.001])
def test_uniform(delta):
    assert K(torch.full((V,), 1 / V), delta) == [math.ceil((1 - delta) * V)]


def test_sure_student_of_a_flat_teacher():
    """One entry has half of the L1 norm, V − 1 equal ones the rest: sparse to the eye, dense to K."""
    gradient = torch.full((V,), -1 / V)
    gradient[3] += 1
    assert K(gradient, 0.5, 0.1, 0.01) == [1, *(1 + math.ceil((V - 1) * (1 - 2 * delta)) for delta in (0.1, 0.01))]


def test_ties_signs_and_order():
    row = torch.tensor([4.0, 4.0, 2.0, 2.0, 2.0, 2.0] + 4 * [0.0])
    expected = [6, 5, 4, 2, 0]  # 16 in all: dropped are none, 2, 4, 8, all
    for n in range(5):
        generator = torch.Generator().manual_seed(n)
        shuffled = row[torch.randperm(len(row), generator=generator)]
        signs = torch.randint(2, row.shape, generator=generator) * 2 - 1
        assert K(shuffled * signs, 0.12, 0.125, 0.25, 0.5, 1.0) == expected


def test_rows_are_independent():
    rows = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    together = sparsity.entries_needed(rows, (0.1, 0.01))
    assert together.T.tolist() == [K(row, 0.1, 0.01) for row in rows]


def test_a_small_share_is_not_rounded_away():
    """Summed from the largest down in fp32, the small entries would not count at all."""
    row = torch.full((2**15,), 1e-9)
    row[0] = 1.0
    share = (2**15 - 1) * 1e-9
    assert K(row, 0.5 * share / (1 + share)) == pytest.approx([2**14], abs=1)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_linear_kl():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 50, generator=generator).mul(3)
    labels = torch.arange(6)
    found = sparsity.measure_rows(student, teacher, labels)

    eye = torch.eye(50)  # the logits are the hidden states, dX is the logit gradient
    leaf = student.clone().requires_grad_()
    out = linear_kl(leaf, eye, teacher, eye)
    out.loss.backward()
    assert torch.equal(found["K"], sparsity.entries_needed(leaf.grad))
    torch.testing.assert_close(found["l1"], leaf.grad.abs().sum(1))
    torch.testing.assert_close(found["kl"], out.per_token)
    p = torch.distributions.Categorical(logits=teacher)
    torch.testing.assert_close(found["teacher_entropy"], p.entropy())
    torch.testing.assert_close(found["teacher_nll"], -p.log_prob(labels))
    torch.testing.assert_close(found["student_nll"], F.cross_entropy(student, labels, reduction="none"))


@pytest.mark.parametrize(("entries", "within"), [(256, True), (257, False)])
def test_the_median_decides(entries, within):
    rows = measured(torch.tensor([1, 2, entries, 5000, 9000]), torch.zeros(5))
    found = sparsity.summary(rows)
    assert found["within_limit"] is within
    assert found["share_within_limit"] == pytest.approx(0.6 if within else 0.4)
    assert found["K"]["0.01"] == {"p10": 1, "median": entries, "p90": 9000}
    # only δ = 0.01 counts
    other = {**rows, "K": torch.tensor([[1], [entries], [9000]]).expand(3, 5)}
    assert sparsity.summary(other)["within_limit"] is within


def test_terciles_are_by_entropy():
    entropy = torch.tensor([5.0, 0.0, 3.0, 1.0, 4.0, 2.0])
    found = sparsity.point("before", 0, measured((entropy * 100).long(), entropy))
    assert [third["teacher_entropy_range"] for third in found["terciles"]] == [[0, 1], [2, 3], [4, 5]]
    assert [third["K"]["0.1"]["p90"] for third in found["terciles"]] == [100, 300, 500]


def test_rows_predict_the_response():
    samples = [sample([5, 6, 7, 8], 2), sample([5, 9], 1), sample([1, 2, 3], 1)]
    batch = sparsity.collate(samples)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0], [1, 2, 3, 0]]
    assert batch.rows.tolist() == [1, 2, 4, 8, 9]
    assert batch.labels.tolist() == [7, 8, 9, 2, 3]


def sample(ids: list[int], start: int) -> sparsity.Sample:
    return sparsity.Sample("0", "instruction", 0, "", 0, ids, [], start, [])


# -- the command and its result ----------------------------------------------------------------------------------------


def check(result: dict) -> None:
    """The schema, and verdicts that follow from the medians."""
    assert set(result) == {"environment", "wall_s", "settings", "vocabulary", "points"}
    assert {"torch", "transformers", "tokenizers", "commit", "processor"} <= set(result["environment"])
    settings = result["settings"]
    assert set(sparsity.Settings._fields) < set(settings)
    assert settings["deltas"] == list(sparsity.DELTAS)
    assert (settings["limit"], settings["limit_delta"]) == (256, 0.01)
    assert 0 < result["vocabulary"]["in_use"] <= result["vocabulary"]["size"] == settings["vocab_size"]
    assert [point["point"] for point in result["points"]] == ["before", "midway", "after"]
    total = settings["distillation_steps"]
    assert [point["distillation_steps"] for point in result["points"]] == [0, total // 2, total]
    assert len({point["rows"] for point in result["points"]}) == 1
    for point in result["points"]:
        assert sum(third["rows"] for third in point["terciles"]) == point["rows"]
        for part in (point, *point["terciles"]):
            assert part["within_limit"] is (part["K"]["0.01"]["median"] <= 256)
            assert part["within_limit"] is (part["share_within_limit"] >= 0.5) or part["share_within_limit"] == 0.5
            for name in ("p10", "median", "p90"):
                counts = [part["K"][key][name] for key in KEYS]
                assert all(isinstance(count, int) for count in counts)
                assert 0 <= counts[0] <= counts[1] <= counts[2] <= settings["vocab_size"]  # a smaller δ needs more
            assert all(values["p10"] <= values["median"] <= values["p90"] for values in part["K"].values())
            assert all(part[name] >= 0 for name in ("kl", "l1", "teacher_entropy", "teacher_nll", "student_nll"))
            assert part["l1"] <= 2
        (_, a), (b, c), (d, _) = (third["teacher_entropy_range"] for third in point["terciles"])
        assert a <= b <= c <= d


def test_the_committed_result():
    result = json.loads(RESULT.read_text())
    check(result)
    assert result["settings"]["vocab_size"] >= 32768
    assert result["points"][0]["rows"] >= 5000
    assert "+changes" not in result["environment"]["commit"]
    kls = [point["kl"] for point in result["points"]]
    assert kls[0] > kls[1] > kls[2]  # it did distil


def test_a_tiny_run(tmp_path, capsys):
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        records = [
            {"question": f"What is {n} plus {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(9)
        ]
        lines = "\n".join(map(json.dumps, records))
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(lines)
    settings = sparsity.Settings(1024, (16, 1), (8, 1), 4, 1e-2, 2, 2, 4, held_out_samples=5)
    sparsity.main(["--data", str(tmp_path), "--output", str(tmp_path / "out.json")], settings)
    result = json.loads((tmp_path / "out.json").read_text())
    check(result)
    assert result["vocabulary"]["in_use"] < 1024  # so little text: the rest is padding
    kls = [point["kl"] for point in result["points"]]
    assert len(set(kls)) == 3
    assert "after: " in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "files"), [([], ("train", "test")), (["--data", "."], ("train",))])
def test_missing_data_is_named(arguments, files, tmp_path, monkeypatch, capsys):
    """No folder given, whatever the current one holds; a folder with half of the files."""
    monkeypatch.delenv("LEAF_TEST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    for name in files:
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("")
    with pytest.raises(SystemExit):
        sparsity.main([*arguments, "--output", "out.json"])
    assert "must hold gsm8k/train.jsonl and gsm8k/test.jsonl" in capsys.readouterr().err
    assert not Path("out.json").exists()
