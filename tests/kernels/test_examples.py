"""The examples run, and would notice if they were wrong."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from leaf_kernels import SharedPrefixLayout
from leaf_kernels.integrations.transformers import register


@pytest.fixture
def grpo() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "grpo_shared_prompt.py"))


def test_grpo_shared_prompt(grpo, capsys):
    prompt, (first, *others), _ = grpo["rollouts"]()
    common = [next(i for i in range(len(c)) if i == len(c) - 1 or first[i] != c[i]) for c in others]
    at_once = [c[0] for c, n in zip(others, common) if n == 0]
    assert len(set(at_once)) > 1, "several labels at the prompt's last row"
    assert max(common) == len(first) - 1
    grpo["main"]()
    tokens = len(prompt) + len(first) + sum(len(c) - n for c, n in zip(others, common))
    assert f" {tokens} packed: 80% saved" in capsys.readouterr().out


def test_grpo_gradients_of_each_completion_alone(grpo):
    """With one advantage at a time, no completion can make up for another."""
    register()
    prompt, completions, _ = grpo["rollouts"]()
    model = grpo["small_llama"]()
    for one in torch.eye(len(completions)):
        differences, _, _ = grpo["compare"](model, prompt, completions, one)
        assert max(differences.values()) <= grpo["TOLERANCE"]


def next_row(self: SharedPrefixLayout, m: int) -> torch.Tensor:
    """A token's own row in place of the one before it, which predicts it."""
    start, end, prefix_start, prefix_len = self.spans()[m]
    rows = torch.cat([torch.arange(prefix_start, prefix_start + prefix_len), torch.arange(start, end)])
    return rows.roll(-1)


def own_rows_only(self: SharedPrefixLayout, m: int) -> torch.Tensor:
    """The row before a completion's first own token as it lies in the pack: the end of another completion."""
    start, end, _, prefix_len = self.spans()[m]
    return torch.arange(start - prefix_len, end).clamp(min=0)


@pytest.mark.parametrize("member_rows", [next_row, own_rows_only])
def test_grpo_notices_wrong_rows(grpo, monkeypatch, member_rows):
    monkeypatch.setattr(SharedPrefixLayout, "member_rows", member_rows)
    with pytest.raises(SystemExit, match="packed and padded differ by more than"):
        grpo["main"]()
