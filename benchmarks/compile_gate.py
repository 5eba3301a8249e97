"""Every shipped kernel configuration, compiled for GPUs that are not there: registers, spills, memory, instructions.

    make compile-gate                          # the cases of continuous integration, as tests
    python -m benchmarks.compile_gate --ci     # the same, into benchmarks/results/compile/triton-<version>.csv
    python -m benchmarks.compile_gate          # all sizes, options and dtypes, into triton-<version>-all.csv: an hour

Kernels are launched by the code that launches them on a GPU, on tensors of device "meta". The command exits with 1 if a case
has a problem.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from leaf_kernels import SharedPrefixLayout
from leaf_kernels.ops.attention_mass import op as mass_op
from leaf_kernels.ops.linear_kl.head import LogitMap
from leaf_kernels.ops.linear_kl.rows_torch import Target
from leaf_kernels.ops.linear_kl.rows_triton import TritonRows, tile_of_rows
from leaf_kernels.ops.pruned_attention import op
from leaf_kernels.ops.pruned_attention.configs import Tile, fused_tile, tile_for
from leaf_kernels.ops.pruned_attention.schedule import key_tiles, query_tiles
from leaf_kernels.ops.token_scores import op as scores_op
from leaf_kernels.testing.offline import SHARED_LIMIT, TENSOR_MEMORY_COLUMNS, Compiled, compile_offline

RESULTS = Path(__file__).parent / "results" / "compile"
KERNELS = ("forward", "row_terms", "backward_q", "backward_kv", "backward_fused", "mass")
# Query heads per key head: a power of two, and one that no tile is a multiple of
GROUPS = {"none": 4, "window+sinks": 6, "all": 6}
FUSED = ("sm_90", "sm_100")
# Launchers over a pack: gradients of `size` columns; scores, "all" being quantile and flaggable; flags
SCORES = ("token_scores", "flag_tokens", "flagged_spans")
# Passes over logits; their size is the vocabulary, their options are bias and softcap or none
ROW_PASSES = ("forward_kl", "reverse_kl", "jsd", "tail")
VOCABULARIES = (128256, 50257)  # a multiple of 16, and not


@dataclass(frozen=True)
class Case:
    arch: str
    kernel: str
    size: int  # of a head, of the vocabulary, of the hidden states, or of the pack
    options: str = "none"  # of GROUPS; "all" is keep, window, softcap, sinks and lse gradient
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return "-".join(str(v) for v in asdict(self).values())


def all_cases() -> Iterator[Case]:
    for arch, kernel, head_dim, options in itertools.product(
        SHARED_LIMIT, KERNELS, (64, 80, 96, 128, 192, 256), GROUPS
    ):
        if kernel != "backward_fused" or (arch in FUSED and head_dim <= 128):
            yield Case(arch, kernel, head_dim, options)
    for arch, kernel, head_dim, dtype in itertools.product(
        SHARED_LIMIT, KERNELS, (64, 128, 256), ("float16", "float32")
    ):
        if kernel != "backward_fused" or (arch in FUSED and head_dim <= 128):
            yield Case(arch, kernel, head_dim, "all", dtype)
    for arch, kernel, vocab, options, dtype in itertools.product(
        SHARED_LIMIT, ROW_PASSES, VOCABULARIES, ("none", "all"), ("bfloat16", "float16", "float32")
    ):
        yield Case(arch, kernel, vocab, options, dtype)
    for arch, dtype in itertools.product(SHARED_LIMIT, ("bfloat16", "float16", "float32")):
        yield Case(arch, "token_scores", 4096, "all", dtype)
    for arch in SHARED_LIMIT:
        for options, dtype in itertools.product(("none", "all"), ("float32", "float64")):
            yield Case(arch, "flag_tokens", 64, options, dtype)
        yield Case(arch, "flagged_spans", 64, dtype="bool")


def ci_cases() -> Iterator[Case]:
    """About a hundred compilations."""
    for arch, kernel, head_dim, options in itertools.product(
        ("sm_80", "sm_90", "sm_100"), ("forward", "backward_q", "backward_kv"), (64, 128, 256), ("none", "all")
    ):
        yield Case(arch, kernel, head_dim, options)
    for arch, head_dim, options in itertools.product(FUSED, (64, 128), ("none", "all")):
        yield Case(arch, "backward_fused", head_dim, options)
    for arch, kernel, head_dim in itertools.product(
        ("sm_86", "sm_89", "sm_120"), ("forward", "backward_q", "backward_kv"), (64, 128, 256)
    ):
        yield Case(arch, kernel, head_dim, "all")
    for arch in ("sm_90", "sm_100", "sm_86"):
        yield Case(arch, "mass", 128, "all")
    for kernel in ("forward", "backward_kv"):
        yield Case("sm_90", kernel, 128, "all", "float32")
    yield Case("sm_100", "row_terms", 128)
    for arch, kernel in itertools.product(("sm_80", "sm_90", "sm_100"), ("forward_kl", "tail")):
        yield Case(arch, kernel, 128256, "all")
    # Of the same tile as "all" and fewer registers: one architecture shows that it compiles
    for kernel in ("forward_kl", "tail"):
        yield Case("sm_90", kernel, 128256)
    for kernel in ("reverse_kl", "jsd", "tail"):
        yield Case("sm_90", kernel, 50257, "all")
    for arch in ("sm_86", "sm_120"):
        yield Case(arch, "forward_kl", 50257, "all")
    yield Case("sm_90", "reverse_kl", 128256, "all", "float16")
    for arch in ("sm_90", "sm_120"):
        yield Case(arch, "token_scores", 4096, "all")
        yield Case(arch, "flag_tokens", 64, "all", "float32")
    yield Case("sm_90", "flagged_spans", 64, dtype="bool")


def tile_of(case: Case) -> Tile | None:
    """The configuration that a launch of this case takes; inside `compile_offline`."""
    if case.kernel in ("row_terms", *SCORES):
        return Tile(0, 0, 0, 0)
    if case.kernel in ROW_PASSES:
        rows = tile_of_rows(torch.device("meta"))
        return Tile(1, rows["BLOCK"], rows["num_warps"], 0)
    find = fused_tile if case.kernel == "backward_fused" else functools.partial(tile_for, case.kernel)
    return find(case.size, getattr(torch, case.dtype), torch.device("meta"), extras=case.options == "all")


def compile_case(case: Case, tile: Tile | None = None) -> tuple[Tile | None, list[Compiled]]:
    """The kernels of one case, and the tile that they were compiled with: that of a launch, unless one is given."""
    run = {**dict.fromkeys(ROW_PASSES, run_row_pass), **dict.fromkeys(SCORES, run_scores)}.get(case.kernel)
    layout = SharedPrefixLayout.from_lengths([100] * 10).to("meta")
    plan = attention_launch(case, layout) if run is None else lambda _: functools.partial(run, case)
    with compile_offline(case.arch) as compiled:
        tile = tile or tile_of(case)
        if tile is not None:
            plan(tile)()
    return tile, compiled


def attention_launch(case: Case, layout: SharedPrefixLayout) -> Callable[[Tile], Callable[[], Any]]:
    """Given a tile, what launches the attention kernel of `case` on `layout` and its device; values are random."""
    N, Hk, D, device = layout.num_tokens, 2, case.size, layout.segment_starts.device
    group = GROUPS[case.options]
    Hq, everything = Hk * group, case.options == "all"
    kind = {"dtype": getattr(torch, case.dtype), "device": device}
    q, k, v, out = (torch.randn(N, heads, D, **kind) for heads in (Hq, Hk, Hk, Hq))
    mask = torch.ones(N, dtype=torch.bool, device=device)
    keep = mask if everything else None
    sinks = torch.zeros(Hq, **kind) if case.options != "none" else None
    row, lse = (torch.full(shape, 8.0, device=device) for shape in ((Hk, N * group), (Hq, N)))
    starts = (layout.segment_starts, layout.prefix_starts, layout.prefix_lens)

    def plan(tile: Tile) -> Callable[[], Any]:
        if case.kernel == "row_terms":
            return functools.partial(op.row_terms, out, out, lse, lse if everything else None, sinks, Hk)
        options = (1.0, 128 if case.options != "none" else None, 30.0 if everything else None, list(tile))
        saved = (q, k, v, keep, out, row, row, *starts)
        rows, keys = query_tiles(layout, group, tile.block_m), key_tiles(layout, tile.block_n)
        if case.kernel == "forward":
            return functools.partial(op.forward, q, k, v, keep, sinks, *starts, rows, *options)
        if case.kernel == "backward_q":
            return functools.partial(op.backward_q, *saved, rows, *options)
        if case.kernel == "mass":
            chosen = mass_op.chosen_ranges(layout, mask)
            return functools.partial(mass_op.mass, q, k, mask, chosen, keep, sinks, *starts, rows, *keys, *options)
        return functools.partial(op.backward_kv, *saved, *keys, *options, case.kernel == "backward_fused")

    return plan


def run_scores(case: Case) -> None:
    starts, mask = (torch.empty(n, dtype=d, device="meta") for n, d in ((5, torch.int32), (64, torch.bool)))
    values = torch.empty(64, case.size, dtype=getattr(torch, case.dtype), device="meta")
    if case.kernel == "token_scores":
        scores_op.scores(values, values, starts, mask)
    elif case.kernel == "flagged_spans":
        scores_op.spans(mask, starts)
    elif case.options == "all":
        scores_op.flags(values[0], starts, 0.1, 0.5, mask)
    else:
        scores_op.flags(values[0], starts, None, 0.5, None)


def run_row_pass(case: Case) -> None:
    row = torch.empty(8, device="meta")
    full = case.options == "all"
    logit_map = LogitMap(torch.empty(case.size, device="meta") if full else None, 30.0 if full else None, 1.0, 1.0)
    rows = TritonRows(
        (len(row), case.size), logit_map, like=row, operand_dtype=getattr(torch, case.dtype), want_gradient=True
    )
    if case.kernel == "tail":
        rows.tail(rows.new_products(), row, row, row)
    else:
        rows.divergence(rows.new_products(), rows.new_products(), row, Target(logit_map, case.kernel, 0.5))


def problems(case: Case, tile: Tile | None, kernel: Compiled) -> list[str]:
    """What is wrong with a compiled kernel. Where fp32 is there for correctness only, it may spill."""
    found = []
    if kernel.shared > SHARED_LIMIT[case.arch]:
        found.append(f"shared memory {kernel.shared} > {SHARED_LIMIT[case.arch]}")
    if kernel.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"tensor memory {kernel.tensor_memory} > {TENSOR_MEMORY_COLUMNS} columns")
    if case.dtype == "float32" and case.kernel not in SCORES:
        return found
    if kernel.stack:
        found.append(f"{kernel.stack} bytes of registers spilled per thread")
    if case.kernel in ROW_PASSES:
        found += [f"no {name} instruction" for name in ("LDG.E.128", "STG.E.128") if name not in kernel.instructions]
    elif kernel.kernel == "row_norms":
        found += [] if "LDG.E.128" in kernel.instructions else ["no LDG.E.128 instruction"]
    elif tile is not None and case.kernel not in ("row_terms", *SCORES):
        wanted = tensor_core(case.arch, tile, kernel.kernel)
        if not any(name.startswith(wanted) for name in kernel.instructions):
            found.append(f"no {wanted} instruction")
    if case.kernel == "backward_fused" and not any(name.startswith("UTMAREDG") for name in kernel.instructions):
        found.append("no UTMAREDG instruction (TMA reduce)")
    return found


def tensor_core(arch: str, tile: Tile, kernel: str) -> str:
    """The tensor-core instruction that a configuration counts on: the wide ones need 64 rows of the left operand."""
    rows = tile.block_n if kernel in ("backward_kv", "column_sums") else tile.block_m
    return {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(arch, "HMMA") if rows >= 64 else "HMMA"


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--ci", action="store_true", help="only the cases that continuous integration compiles")
    arguments = parser.parse_args()
    output = arguments.output or RESULTS / f"triton-{triton.__version__}{'' if arguments.ci else '-all'}.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arch", "case", "size", "options", "dtype", *Tile._fields, *Compiled._fields[:-1], "problems"])
        for case in ci_cases() if arguments.ci else all_cases():
            tile, compiled = compile_case(case)
            for kernel in compiled:
                wrong = problems(case, tile, kernel)
                failed += bool(wrong)
                writer.writerow([*asdict(case).values(), *(tile or ()), *kernel[:-1], "; ".join(wrong)])
                file.flush()
                print(case, *kernel[1:5], *wrong)
    print(f"{output}: {failed} kernels with problems")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
