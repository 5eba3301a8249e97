"""Tiles of the attention kernels, searched on the GPU at hand. On a machine with an NVIDIA GPU:

    python -m benchmarks.tune --budget 540
    python -m benchmarks.tune --budget 540 --continue     # where the first run was cut

For each kernel and head size, plain and with all options, every tile that compiles for this GPU without a problem (spilled
registers, too much memory, no tensor cores: see benchmarks/compile_gate.py) and gives what the shipped one gives takes turns
with it, on a pack of 32768 tokens in sequences of 300 to 1000. All times go into benchmarks/results/<gpu>/tune.json. Tiles
that are faster by more than twice the A-A spread go into leaf_kernels/_runtime/tuned/<gpu>.json, where launches on a GPU of
this name find them. On a CPU, in Triton's interpreter, `--output DIR` tries it out on two tiles; nothing is compiled.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.compile_gate import Case, attention_launch, compile_case, problems
from benchmarks.timing import Call, Deadline, Row, environment, interleave, parser, place, run_cases, state, write_json
from leaf_kernels import SharedPrefixLayout
from leaf_kernels._runtime import launch
from leaf_kernels.ops.pruned_attention.configs import TILES, Tile
from leaf_kernels.testing.offline import CAPABILITY

KERNELS = ("forward", "backward_q", "backward_kv", "backward_fused", "mass")
CANDIDATES = [Tile(*numbers) for numbers in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4))]
TINY = [Tile(16, 16, 1, 1), Tile(16, 32, 1, 1)]
TOLERANCE = 0.02  # of the largest value: two tiles round differently in bf16


class Search(NamedTuple):
    name: str
    kernel: str
    size: int  # of a head
    lengths: tuple[int, int] = (300, 1000)
    tokens: int = 32768
    dtype: str = "bfloat16"

    def tiny(self) -> Search:
        return self._replace(lengths=(5, 9), tokens=16, dtype="float32", size=16)

    def layout(self) -> SharedPrefixLayout:
        generator, lengths = torch.Generator().manual_seed(0), list[int]()
        while sum(lengths) < self.tokens:
            lengths.append(int(torch.randint(*self.lengths, (1,), generator=generator)))
        return SharedPrefixLayout.from_lengths(lengths)


SEARCHES = [
    Search(f"{kernel}-{size}", kernel, size)
    for kernel in KERNELS
    for size in (64, 128, 256)
    if (kernel, size) != (KERNELS[3], 256)
]


def compiles(case: Case, tile: Tile) -> bool:
    """Whether the kernel of `case` compiles for its architecture without a problem. Needs no GPU."""
    try:
        _, kernels = compile_case(case, tile)
    except Exception:  # Triton's compiler raises whatever it fails with, on tiles that no hardware can run too
        return False
    return not any(problems(case, tile, kernel) for kernel in kernels)


def same(one: torch.Tensor | Sequence[torch.Tensor], other: torch.Tensor | Sequence[torch.Tensor]) -> bool:
    """Whether two results of a launcher are equal up to rounding."""
    pairs = [(one, other)] if isinstance(one, torch.Tensor) else zip(one, other)
    return all(a.numel() == 0 or bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in pairs)


def measure(
    search: Search, deadline: Deadline, *, arch: str, device: torch.device, compilers: ProcessPoolExecutor | None
) -> Iterator[Row]:
    """Rows of one search, a tile each. Without `compilers`, in the interpreter, on two tiles. Raises OutOfTime."""
    layout = search.layout().to(device)
    for options in ("none", "all"):
        deadline.check()
        case = Case(arch, search.kernel, search.size, options, search.dtype)
        shipped, candidates = TINY[0], TINY
        if compilers:  # of the shipped table: what was tuned before is a candidate like all others
            shipped = TILES[launch.architecture(device)][search.kernel][search.size][options == "all"]
            fine = list(compilers.map(functools.partial(compiles, case), CANDIDATES))
            candidates = list(itertools.compress(CANDIDATES, fine))
        candidates = [tile for tile in candidates if tile != shipped]
        plan = attention_launch(case, layout)
        launches = {tile: plan(tile) for tile in (shipped, *candidates)}
        expected = launches[shipped]()
        right = {tile: run for tile, run in launches.items() if same(run(), expected)}
        times, spread = interleave(
            {str(list(tile)): Call(lambda _, run=run: run()) for tile, run in right.items()}, device, deadline
        )
        for tile in right:
            timing = times[str(list(tile))].columns(spread)
            row = {"case": search.name, "provider": "leaf", "options": options, "tile": list(tile)}
            yield {**row, "shipped": tile == shipped, **timing, **state(device)}


def fastest(rows: Iterable[Row]) -> Row:
    """The row to ship: the shipped one, unless another is faster by more than noise."""
    rows = list(rows)
    (shipped,) = (row for row in rows if row["shipped"])
    best = min(rows, key=lambda row: row["ms"])
    return best if shipped["ms"] / best["ms"] - 1 > 2 * shipped["aa_spread"] else shipped


def verdicts(rows: list[Row]) -> list[Row]:
    """For each kernel, head size and options the tile to ship, and the time of the shipped one over its own."""
    searched = [row for row in rows if "tile" in row]
    found = []
    for case, options in dict.fromkeys((row["case"], row["options"]) for row in searched):
        own = [row for row in searched if (row["case"], row["options"]) == (case, options)]
        best, (shipped,) = fastest(own), (row for row in own if row["shipped"])
        found.append({"case": case, "options": options, "tile": best["tile"], "ratio": shipped["ms"] / best["ms"]})
    return found


def table(chosen: list[Row]) -> dict[str, dict[str, list[list[int]]]]:
    """{kernel: {head size: [plain, with options]}} of what `verdicts` found, where either is faster than what is shipped."""
    tiles: dict[str, dict[str, list[list[int]]]] = {}
    for plain, extras in zip(chosen[::2], chosen[1::2]):
        if plain["ratio"] > 1 or extras["ratio"] > 1:
            kernel, size = plain["case"].rsplit("-", 1)
            tiles.setdefault(kernel, {})[size] = [plain["tile"], extras["tile"]]
    return tiles


def summary(rows: list[Row]) -> Iterator[str]:
    for one in verdicts(rows):
        gain = f"{one['ratio']:.2f} times as fast as the shipped one" if one["ratio"] > 1 else "the shipped one"
        yield f"{one['case']}, options {one['options']}: {one['tile']}, {gain}"


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__, (search.name for search in SEARCHES))
    arguments = options.parse_args(argv)
    device, folder = place(options, arguments.output)
    where = environment(device, arguments.commit)
    arch, name, tuned_folder, compilers = "sm_90", "cpu", folder, None
    if device.type == "cuda":
        arch, name = "sm_{}{}".format(*torch.cuda.get_device_capability(device)), torch.cuda.get_device_name(device)
        tuned_folder, compilers = launch.TUNED, ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
        if arch not in CAPABILITY:
            options.error(f"kernels cannot be compiled ahead for {arch}, only for {', '.join(CAPABILITY)}")
    searches = [search for search in SEARCHES if search.kernel in TILES.get(launch.architecture(device), KERNELS)]
    path = folder / "tune.json"
    complete = run_cases(
        path, device, arguments.budget, where, searches,
        functools.partial(measure, arch=arch, device=device, compilers=compilers), verdicts, summary,
        resume=arguments.resume, only=arguments.cases,
    )  # fmt: skip
    if path.exists():
        update(tuned_folder / f"{launch.slug(name)}.json", json.loads(path.read_text())["goals"], where)
    return 0 if complete else 1


def update(tuned: Path, found: list[Row], where: Row) -> None:
    """Puts what was found into a tuned table; kernels and head sizes that were not searched stay as they are."""
    before = json.loads(tuned.read_text())["tiles"] if tuned.exists() else {}
    chosen, searched = table(found), {tuple(one["case"].rsplit("-", 1)) for one in found}
    tiles = {
        kernel: {
            **{size: pair for size, pair in before.get(kernel, {}).items() if (kernel, size) not in searched},
            **chosen.get(kernel, {}),
        }
        for kernel in KERNELS
    }
    write_json(tuned, {"environment": where, "tiles": {kernel: sizes for kernel, sizes in tiles.items() if sizes}})
    print(f"{tuned}: {sum(map(len, chosen.values()))} of {len(searched)} faster than what is shipped")


if __name__ == "__main__":
    sys.exit(main())
