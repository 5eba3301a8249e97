"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

README = (Path(__file__).parents[1] / "README.md").read_text()


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


def test_commands_and_options_exist():
    from leaf.cli import main

    for line in re.findall(r"^(?:accelerate launch -m )?(leaf .*?)(?:\s+#.*)?$", README, re.MULTILINE):
        command = line.split()[1]
        assert command in main.__globals__["STAGE_COMMANDS"] or command in ("demo", "doctor", "export"), line


def test_links_lead_somewhere():
    for target in re.findall(r"(?:\]\(|src=\")([^)#:\"]+)[)\"]", README):
        assert (Path(__file__).parents[1] / target).exists(), target


def test_numbers_are_those_of_the_committed_results():
    import runpy

    tables = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "tables.py"))
    for path, blocks in tables["documents"]().items():
        text = path.read_text()
        assert tables["filled"](text, blocks) == text, f"{path.name}: run python benchmarks/tables.py"
        assert any(f"<!-- {name} -->" in text for name in blocks), path.name
