"""What importing costs, and who may import whom (DESIGN.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(p.relative_to(ROOT) for package in ("leaf_kernels", "leaf") for p in (ROOT / package).rglob("*.py"))
HEAVY = {"transformers", "accelerate", "datasets", "pyarrow", "peft", "matplotlib", "rich"}


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cold_import_without_triton_and_transformers():
    run_python("""
import sys
for name in ("triton", "transformers", "leaf"):
    sys.modules[name] = None  # importing it raises
import leaf_kernels
for name in leaf_kernels.__all__:
    getattr(leaf_kernels, name)
import leaf_kernels.testing
import torch
assert not torch.cuda.is_initialized()
assert sys.modules["triton"] is None
starts = torch.tensor([0, 3], dtype=torch.int32)
leaf_kernels.flag_tokens(leaf_kernels.token_scores(torch.rand(3, 2), torch.rand(3, 2), starts).score, starts, q=0.1)
leaf_kernels.linear_kl(*[torch.rand(3, 2)] * 4)
""")


def test_importing_loads_neither_torch_nor_triton():
    run_python("""
import sys
import leaf_kernels
assert "torch" not in sys.modules
leaf_kernels.Impl
assert "triton" not in sys.modules
""")


def test_names_are_functions_whatever_was_touched_before():
    run_python("""
import leaf_kernels
from leaf_kernels import SharedPrefixLayout, attention_mass, pruned_attention, token_scores
import leaf_kernels.ops.linear_kl.api
from leaf_kernels import linear_kl, linear_cross_entropy
assert linear_kl is leaf_kernels.linear_kl is leaf_kernels.ops.linear_kl.api.linear_kl
assert all(callable(f) for f in (pruned_attention, attention_mass, token_scores, linear_cross_entropy))
assert set(leaf_kernels.__all__) <= set(dir(leaf_kernels))
""")


def imports(path: Path, *, typing_only: bool = False) -> set[str]:
    """Absolute dotted names of what a module imports anywhere in it, without what stands under `if TYPE_CHECKING`."""
    package = path.with_suffix("").parts[:-1]
    tree = ast.parse((ROOT / path).read_text())
    hidden = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module]
            )
            base = base.rstrip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_nothing_that_is_read_can_run(path):
    """Tensors come from safetensors, and no model brings code of its own."""
    text = (ROOT / path).read_text()
    assert not re.search(r"torch\.load\(|pickle\.loads?\(|import (c|cloud)?pickle|trust_remote_code\s*=\s*True", text)


def under(names: set[str], *prefixes: str) -> list[str]:
    return sorted(n for n in names if any(n == p or n.startswith(f"{p}.") for p in prefixes))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_import_direction(path):
    names, parts = imports(path), path.with_suffix("").parts
    if parts[0] == "leaf":
        inner = [n for n in under(names, "leaf_kernels") if n.split(".")[1:2] not in ([], ["integrations"])]
        public = {
            "leaf_kernels._version",
            "leaf_kernels.testing",
            "leaf_kernels.layout",
            "leaf_kernels.types",
            *(f"leaf_kernels.{n}" for n in public_names()),
        }
        assert under(set(inner), *public) == inner, "leaf uses the public names of leaf_kernels only"
        return
    assert not under(names, "leaf"), "leaf_kernels never imports leaf"
    if path != Path("leaf_kernels/integrations/transformers.py"):
        assert not under(names, *HEAVY, "leaf_kernels.integrations")
    if parts[1] != "ops":
        assert not under(names, "leaf_kernels.ops") or parts[1] == "integrations", "only the ops know the ops"
    if parts[1:2] == ("_runtime",):
        assert not under(names, "leaf_kernels.layout", "leaf_kernels.testing")
    if parts[1:2] == ("ops",) and len(parts) == 4:
        op = ".".join(parts[:3])
        others = [n for n in under(names, "leaf_kernels.ops") if not under({n}, op)]
        shared = ["reference", "checks", "arguments", "configs", "schedule", "kernels"]
        assert all(n.split(".")[3:4] == [] or n.split(".")[3] in shared for n in others), (
            "an op may use what another one is made of, not its operators or its public function"
        )
        if parts[3] == "reference":
            assert not under(names, *(f"{op}.{m}" for m in ("api", "chunked", "sdpa", "vendor", "op", "kernels")))
        elif parts[3] != "api":
            assert not under(names, f"{op}.api")


def public_names() -> list[str]:
    import leaf_kernels

    return leaf_kernels.__all__


def test_the_parser_sees_what_it_should():
    assert "leaf_kernels.types.Impl" in imports(Path("leaf_kernels/ops/linear_kl/api.py"))
    assert "leaf_kernels.ops.linear_kl.head" in imports(Path("leaf_kernels/ops/linear_kl/reference.py"))
    assert len(MODULES) > 15
