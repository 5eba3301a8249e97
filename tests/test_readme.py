"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def model() -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        return LlamaForCausalLM(config)

    names = {
        "student": model(),
        "teacher": model(),
        "model": model(),
        "mask": torch.tensor([1.0, 0.0, 1.0]),
        "student_hidden": torch.randn(3, 4, requires_grad=True),
        "student_head": torch.randn(9, 4, requires_grad=True),
        "teacher_hidden": torch.randn(3, 5),
        "teacher_head": torch.randn(9, 5),
    }
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["counterfactual"].shape == (5, 16)


def test_python_block_of_docs_packing_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "packing.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "docs/packing.md", "exec"), names)
    assert names["input_ids"].tolist() == [1, 9, 9, 2, 3, 2], "9 and 3 tokens fill the first pack, 6 are left"


def test_python_block_of_docs_linear_kl_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "linear_kl.md").read_text(), re.DOTALL)
    names: dict[str, object] = {
        "mask": torch.tensor([1.0, 0.0, 1.0]),
        "rows": torch.tensor([0, 2]),
        "shift_labels": torch.tensor([1, -100, 2]),
        "student_hidden": torch.randn(3, 4),
        "student_head": torch.randn(9, 4),
        "teacher_hidden": torch.randn(3, 5),
        "teacher_head": torch.randn(9, 5),
    }
    exec(compile(block, "docs/linear_kl.md", "exec"), names)
    assert names["covered_mass"][1] == 0
    assert names["loss"] > 0


def test_commands_and_options_exist():
    from leaf.cli import main

    for line in re.findall(r"^(?:accelerate launch -m )?(leaf .*?)(?:\s+#.*)?$", README, re.MULTILINE):
        command = line.split()[1]
        assert command in main.__globals__["STAGE_COMMANDS"] or command in ("demo", "doctor", "estimate", "export"), (
            line
        )


@pytest.mark.parametrize("document", ["README.md", "docs/packing.md", "docs/linear_kl.md", "docs/integrations.md"])
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"(?:\]\(|src=\")([^)#:\"]+)[)\"]", path.read_text()):
        assert (path.parent / target).exists(), target


def test_numbers_are_those_of_the_committed_results():
    import runpy

    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    for path, blocks in tables["documents"]().items():
        text = path.read_text()
        assert tables["filled"](text, blocks) == text, f"{path.name}: run python benchmarks/tables.py"
        markers = set(re.findall(r"<!-- ([\w-]+) -->", text))
        assert markers, f"{path.name} has no marker"
        assert markers <= blocks.keys(), f"{path.name}: benchmarks/tables.py knows nothing of some markers"
