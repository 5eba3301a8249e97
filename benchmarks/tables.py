"""Writes the tables of README.md and docs/ between their markers:  python benchmarks/tables.py

Numbers in the documentation come from `benchmarks/results/` and from nowhere else; a test holds that they are up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEST_SETS = ("in_distribution", "adversarial", "clean")
NAMES = {
    "teacher": "teacher",
    "student": "student before",
    "kd": "KD, no deletion",
    "random": "random spans",
    "perplexity": "perplexity mask",
    "teacher_gradient": "teacher gradient only",
    "student_gradient": "student gradient only",
    "leaf": "**LeaF**, span",
    "leaf_collective": "**LeaF**, collective",
    "kd_student_wrong": "KD, student-wrong rows",
    "leaf_paper": "LeaF, paper's preset",
    "oracle": "oracle",
}
NOT_MEASURED = "Not measured yet: nobody has run this on a GPU and committed the result."
PACKING_CASE = ("scores", "rows", "prompts pruned at", "counterfactuals per row")
PACKERS = ("pack_groups", "sequential")


def mean_sd(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def seeds(results: dict[str, Any]) -> str:
    inside = sum(results["window"]["inside"])
    students = "every student" if inside == len(results["seeds"]) else f"{inside} students"
    return f"seeds {', '.join(map(str, results['seeds']))} ({students} inside the useful window)"


def arms(results: dict[str, Any]) -> str:
    """In the order of NAMES, and what has no name there after that."""
    order = [*NAMES, *results["arms"]]
    rows = [
        [
            NAMES.get(arm, arm.replace("_", " ")),
            *(mean_sd(metrics[name]) for name in (*TEST_SETS, "attention_to_confounder")),
        ]
        for arm, metrics in sorted(results["arms"].items(), key=lambda item: order.index(item[0]))
    ]
    return markdown(["arm", "in distribution", "adversarial", "clean", "attention to the confounder"], rows)


def paired(results: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{mean_sd(values[test], '+')}, worst {min(values[test]):+.3f}" for test in TEST_SETS)]
        for name, values in results["paired"].items()
    ]
    return markdown(["difference, seed by seed", "in distribution", "adversarial", "clean"], rows)


def detection(results: dict[str, Any]) -> str:
    """Means over the seeds that have rows of that kind."""
    measured = {name: [v for v in values if v is not None] for name, values in results["detection"].items()}
    rows = [[name.replace("_", " "), mean_sd(values)] for name, values in measured.items() if values]
    return markdown(["detection of the planted token", "mean ± sd"], rows)


def by_length(results: dict[str, Any]) -> str:
    """Every table of the long task, a column per length."""
    minutes, training = statistics.mean(results["seconds"]["processor"]) / 60, results["training"]
    parts = [
        f"Mean ± sd over seeds {', '.join(map(str, results['seeds']))}, `leaf demo --task long`; a seed takes "
        f"{minutes:.1f} minutes of one core. Steps of training and validation rows then solved, seed by seed:",
        markdown(
            ["", "short prompts", "mixed prompts"],
            [[role, *(trained(outcome, stage) for stage in ("short", "mixed"))] for role, outcome in training.items()],
        ),
    ]
    for name, metrics in results["per_length"].items():
        header = [name.replace("_", " "), *(f"{length} tokens" for length in next(iter(metrics.values())))]
        rows = [[metric.replace("_", " "), *map(mean_sd, values.values())] for metric, values in metrics.items()]
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def trained(outcome: dict[str, list[float]], stage: str) -> str:
    every = zip(outcome[f"{stage}_steps"], outcome[f"{stage}_solved"])
    return ", ".join(f"{steps} ({share:.0%})" for steps, share in every)


def long_readme(results: dict[str, Any]) -> str:
    """AUROC on misleading rows at the shortest and the longest prompts, for the README."""

    def between(level: str, metric: str) -> str:
        values = list(results["per_length"][f"{level}_level_detection"][metric].values())
        return f"{statistics.mean(values[0]):.2f} → {statistics.mean(values[-1]):.2f}"

    lengths = list(results["per_length"]["instruction_level_detection"]["auroc"])
    return (
        f"`leaf demo --task long` buries the same problems among up to {lengths[-1]} tokens, with several signs, and "
        f"measures detection only. From {lengths[0]} to {lengths[-1]} tokens the AUROC of misleading signs goes "
        f"{between('instruction', 'auroc_misleading')}, by the student's gradient alone "
        f"{between('instruction', 'auroc_student_gradient_misleading')}; that of a sign in the response "
        f"{between('response', 'auroc_misleading')} (mean of {len(results['seeds'])} seeds)."
    )


def gpu_figures(results: Path = RESULTS) -> str:
    """Every figure of every GPU, as `plot.py` left them."""
    kinds = {
        "goals": "Goals",
        "roofline": "Fractions of the roofline",
        "e2e": "Memory of a step",
        "demo": "Arms of the demo",
    }
    found = [
        f"![{title}, {path.parent.name}](../benchmarks/results/{path.parent.name}/{path.name})"
        for path in sorted(results.glob("*/*.png"))
        if (title := kinds.get(path.stem)) and path.parent.name != "demo"
    ]
    return "\n\n".join(found) or "No figure yet: nothing has been measured."


BOUNDED = ["goal", "case", "what", "got", "wanted", "stretch", "roofline", "verdict"]


def gpu_attention(results: Path = RESULTS) -> str:
    header = ["goal", "case", "mode", "against", "split", "fused", "wanted", "stretch", "roofline", "verdict"]
    return gpu_goals(results, "attention", header, goal_row)


def gpu_linear_kl(results: Path = RESULTS) -> str:
    return gpu_goals(results, "linear_kl", BOUNDED, bounded_row)


def gpu_token_scores(results: Path = RESULTS) -> str:
    return gpu_goals(results, "token_scores", BOUNDED, bounded_row)


def gpu_e2e(results: Path = RESULTS) -> str:
    return gpu_goals(results, "e2e", BOUNDED, bounded_row)


def gpu_cross_entropy(results: Path = RESULTS) -> str:
    return per_gpu(results, "cross_entropy", provider_table)


def gpu_attention_mass(results: Path = RESULTS) -> str:
    return per_gpu(results, "attention_mass", provider_table)


def gpu_scoring(results: Path = RESULTS) -> str:
    """The goals, and of every implementation and row how fast and with how much memory."""
    rows = []
    for path in sorted(results.glob("*/scoring.json")):
        for row in json.loads(path.read_text())["rows"]:
            if row["case"] != "anchors":
                peak = row.get("peak_bytes")
                found = ["–", "–", row.get("absent", "")]
                if peak is not None:
                    found = [f"{row['tokens_per_second']:.0f}", f"{peak / 2**30:.1f}", ""]
                rows.append([row["gpu"], row["case"], row["provider"], *found])
    table = markdown(["GPU", "tokens", "", "tokens/s", "peak, GiB", ""], rows)
    return "\n\n".join([gpu_goals(results, "scoring", BOUNDED, bounded_row), *([table] if rows else [])])


def gpu_first_calls(results: Path = RESULTS) -> str:
    """D4, and the seconds of every call, of the GPUs whose check came to it."""
    parts = []
    for path in sorted(results.glob("*/check.json")):
        found = json.loads(path.read_text())
        if measured := found.get("first_calls"):
            where, compiled = found["environment"], ", ".join(measured["compiled_though_carried"])
            rows = [
                [name, *(f"{own[kind]:.2f}" for kind in ("carried", "compiled"))]
                for name, own in measured["seconds"].items()
            ]
            parts += [
                f"{where['gpu']}, torch {where['torch']}, triton {where['triton']}, commit `{where['commit'][:12]}`; "
                f"compiled though the wheel carries it: {compiled or 'nothing'}.",
                markdown(BOUNDED, [bounded_row(goal) for goal in found["goals"]]),
                markdown(["seconds of the first call", "carried by the wheel", "compiled"], rows),
            ]
    return "\n\n".join(parts) or NOT_MEASURED


def gpu_demo(results: Path = RESULTS) -> str:
    """Arms, paired differences and detection, GPU by GPU."""
    parts = []
    for path in sorted(results.glob("*/demo.json")):
        measured = json.loads(path.read_text())
        where = measured["environments"][-1]
        absent = "".join(f"; {arm} is absent ({why})" for arm, why in measured["absent"].items())
        parts += [
            f"{where['gpu']}, torch {where['torch']}, commit `{where['commit'][:12]}`; exact match, mean ± sd over "
            f"{seeds(measured)}{absent}:",
            arms(measured),
            paired(measured),
            detection(measured),
        ]
    return "\n\n".join(parts) or NOT_MEASURED


def gpu_goals(results: Path, name: str, header: list[str], row: Callable[[dict[str, Any]], list[str]]) -> str:
    return per_gpu(results, name, lambda measured: markdown(header, [row(goal) for goal in measured["goals"]]))


def provider_table(measured: dict[str, Any]) -> str:
    """Every implementation beside ours, and why one is absent."""
    found = [row for row in measured["rows"] if "provider" in row]
    ours = {row["case"]: row["ms"] for row in found if row["provider"] == "leaf" and "ms" in row}
    rows = []
    for row in found:
        head = [row["case"], "**ours**" if row["provider"] == "leaf" else row["provider"]]
        if "absent" in row:
            rows.append([*head, *["–"] * 6, f"absent: {row['absent']}"])
            continue
        memory = [mib(row, column) for column in ("peak_bytes", "largest_bytes")]
        error = max(value for column, value in row.items() if column.endswith("_error"))
        times = [f"{row['ms']:.2f}", f"{row['ms'] / ours[row['case']]:.2f}", f"{row['aa_spread']:.0%}"]
        rows.append([*head, *times, fraction(row), *memory, f"{error:.0e}"])
    header = ["case", "", "ms", "÷ ours", "noise", "roofline", "peak, MiB", "largest, MiB", "error"]
    return markdown(header, rows)


def per_gpu(results: Path, name: str, table: Callable[[dict[str, Any]], str]) -> str:
    """One table per GPU that was measured."""
    parts = []
    for path in sorted(results.glob(f"*/{name}.json")):
        measured = json.loads(path.read_text())
        where = measured["rows"][0]
        (anchor,) = (row for row in measured["rows"] if row["case"] == "anchors")
        parts.append(
            f"{where['gpu']} (driver {where['driver']}, {where['power_limit_w']} W; copy {anchor['copy_gb_s']:.0f} GB/s, "
            f"matmul {anchor['matmul_tflop_s']:.0f} TFLOP/s), torch {where['torch']}, triton {where['triton']}, commit "
            f"`{where['commit'][:12]}`:"
        )
        parts.append(table(measured))
    return "\n\n".join(parts) or NOT_MEASURED


def mib(row: dict[str, Any], column: str) -> str:
    return "–" if row.get(column) is None else f"{row[column] / 2**20:.0f}"


def fraction(row: dict[str, Any]) -> str:
    """Of the roofline; files of before it was measured have none."""
    return f"{row['roofline']:.0%}" if row.get("roofline") else "–"


def goal_row(goal: dict[str, Any]) -> list[str]:
    if goal["passed"] is None:
        return [goal["goal"], goal["case"], goal["mode"], *["–"] * 6, goal["reason"]]
    verdict = "reached" if goal["passed"] else "missed"
    ratios = [f"{goal['ratios'][name]:.2f}×" if name in goal["ratios"] else "–" for name in ("leaf", "leaf fused")]
    return [
        *(goal[name] for name in ("goal", "case", "mode", "peer")),
        *ratios,
        f"{goal['wanted']:.2f}×",
        f"{goal['stretch']:.2f}×",
        fraction(goal),
        verdict + (", within noise of 1" if goal["noise"] else ""),
    ]


def bounded_row(goal: dict[str, Any]) -> list[str]:
    if goal["passed"] is None:
        return [goal["goal"], goal["case"], goal["what"], *["–"] * 4, goal["reason"]]
    sign, verdict = "≤" if goal["at_most"] else "≥", "reached" if goal["passed"] else "missed"
    bounds = ["–" if goal[name] is None else f"{sign} {goal[name]:.2f}" for name in ("wanted", "stretch")]
    noise = ", within noise" if goal["noise"] else ""
    return [goal["goal"], goal["case"], goal["what"], f"{goal['value']:.2f}", *bounds, fraction(goal), verdict + noise]


def cpu_suite(results: dict[str, Any], *ops: str) -> str:
    """The rows of some ops, or of all: times beside ours in the same case, peak, the largest of the errors against fp64."""
    rows, last = [], dict[str, Any]()
    for run in results["benchmarks"]:
        arms = {row["provider"]: row for row in run["extra_info"].get("rows", ())}
        for name, row in arms.items():
            if ops and row["op"] not in ops:
                continue
            last, error = row, max(value for column, value in row.items() if column.endswith("_error"))
            rows.append(
                [
                    f"`{row['op']}`",
                    f"{row['case']}, {row['mode']}",
                    "**ours**" if name == "leaf" else name,
                    f"{row['ms']:.0f}",
                    f"{row['p20_ms']:.0f}–{row['p80_ms']:.0f}",
                    f"{row['ms'] / arms['leaf']['ms']:.2f}",
                    f"{row['aa_spread']:.0%}",
                    *(mib(row, column) for column in ("peak_bytes", "largest_bytes")),
                    f"{error:.0e}",
                ]
            )
    cpu = results["machine_info"]["cpu"]["brand_raw"]
    caption = (
        f"{last['threads']} thread of {cpu}, torch {last['torch']}, commit `{last['commit'][:12]}`; medians of "
        f"{last['rounds']} interleaved rounds, the machine not otherwise idle. *noise* is how far two medians of ours are "
        "apart, *peak* what is allocated beyond the inputs, *largest* the largest single allocation."
    )
    header = ["op", "case", "", "ms", "20–80 %", "÷ ours", "noise", "peak, MiB", "largest", "error"]
    return "\n\n".join([caption, markdown(header, rows)])


def cpu_estimates(results: dict[str, Any]) -> str:
    found = [run["extra_info"]["estimate"] for run in results["benchmarks"] if "estimate" in run["extra_info"]]
    rows = [
        [each["case"], f"{each['predicted_mib']:.0f}", f"{each['measured_mib']:.0f}", f"{each['error']:+.1%}"]
        for each in found
    ]
    return markdown(["`leaf estimate`", "predicted, MiB", "measured, MiB", "error"], rows)


def gradient_sparsity(results: dict[str, Any]) -> str:
    """Medians of K(δ) before, midway and after distillation, and over the third of rows on which the teacher is surest."""
    deltas = results["settings"]["deltas"]
    rows = []
    for point in results["points"]:
        for name, found in (("all", point), ("surest third", point["terciles"][0])):
            medians = [f"{found['K'][str(delta)]['median']:,}" for delta in deltas]
            rows.append([point["point"], f"{name}, {found['rows']:,}", f"{found['kl']:.2f}", *medians])
    header = ["distillation", "rows", "mean KL", *(f"K({delta:g})" for delta in deltas)]
    return markdown(header, rows)


def scoring_cpu(results: dict[str, Any]) -> str:
    rows = []
    for arm, medians in results["medians"].items():
        own = results["ratios"][arm]
        rows.append(
            [arm, f"{medians['mib']:.0f}", f"{own['mib']:.2f}", f"{medians['seconds']:.1f}", f"{own['seconds']:.2f}"]
        )
    caption = f"Medians of {len(results['rounds'])} interleaved rounds; imports took {{:.0f}} MiB of every peak."
    table = markdown(["", "peak, MiB", "of released", "seconds", "of released"], rows)
    return f"{caption.format(results['medians']['ours']['imported_mib'])}\n\n{table}"


def scoring_memory(results: dict[str, Any]) -> str:
    model = results["model"]
    rows = [
        [
            f"{row['tokens'] // 1024}k",
            f"{row['ours'] / 2**20:.0f}",
            f"{row['released'] / 2**20:.0f}" if "released" in row else "",
        ]
        for row in results["rows"]
    ]
    table = markdown(["tokens", "ours, MiB", "released, MiB"], rows)
    hidden = model["hidden"] * 4  # bytes of a token's hidden state
    checkpoints, all_of_it = results["checkpoint_bytes_per_token"] // hidden, results["bytes_per_token"] / hidden
    return (
        f"{table}\n\n{model['layers']} layers of {model['hidden']}, V = {model['vocabulary']}, a response of "
        f"{model['response']} tokens. At the end of the table a token takes {all_of_it:.1f} hidden states: "
        f"{checkpoints} are checkpoints, the rest is what one layer works with."
    )


def packing_case(case: dict[str, Any]) -> list[str]:
    level = "both levels" if case["level"] == "both" else f"{case['level']} level"
    count = "one" if case["counterfactuals"] == "1" else "all"
    return [case["scores"], f"{case['rows']:,}", level, count]


def packing_ratio(results: dict[str, Any]) -> str:
    rows = [
        [
            *packing_case(case),
            *(f"{case[name]:,}" for name in ("sequences", "separate_tokens", "packed_tokens")),
            f"**{case['ratio']:.2f}**",
        ]
        for case in results["cases"]
    ]
    return markdown([*PACKING_CASE, "sequences", "tokens apart", "packed", "ratio"], rows)


def packing_fill(results: dict[str, Any]) -> str:
    rows = [
        [
            *packing_case(case),
            *(" / ".join(f"{b[name]['fill']:.1%}" for name in PACKERS) for b in case["budgets"].values()),
        ]
        for case in results["cases"]
    ]
    return markdown([*PACKING_CASE, *results["cases"][0]["budgets"]], rows)


def documents() -> dict[Path, dict[str, str]]:
    """Text of every marker of every document."""
    full, fast = load("demo/full"), load("demo/fast")
    caption = "Exact match, mean ± sd over {}, `leaf demo --preset {}`, on a CPU."
    blocks = {
        "demo-full": "\n\n".join([caption.format(seeds(full), "full"), arms(full)]),
        "demo-full-paired": paired(full),
        "demo-full-detection": detection(full),
        "demo-fast": "\n\n".join([caption.format(seeds(fast), "fast"), arms(fast), paired(fast)]),
    }
    if (RESULTS / "demo" / "fast_any_word.json").exists():
        any_word = load("demo/fast_any_word")
        blocks["demo-any-word"] = "\n\n".join(
            [
                f"The same, {seeds(any_word)}, with a teacher whose training prompts may lack *any* word.",
                paired(any_word),
            ]
        )
    long = load("demo/long")
    blocks |= {"demo-long": by_length(long), "demo-long-readme": long_readme(long)}
    gsm8k = load("packing/gsm8k")
    docs, suite = ROOT / "docs", load("cpu_suite")
    return {
        ROOT / "README.md": blocks,
        docs / "method-notes.md": blocks,
        docs / "packing.md": {"packing-ratio": packing_ratio(gsm8k), "packing-fill": packing_fill(gsm8k)},
        docs / "linear_kl.md": {
            "cpu-linear-kl": cpu_suite(suite, "linear_kl", "linear_cross_entropy"),
            "gradient-sparsity": gradient_sparsity(load("gradient_sparsity")),
        },
        ROOT / "benchmarks" / "README.md": {"cpu-suite": cpu_suite(suite), "cpu-estimates": cpu_estimates(suite)},
        docs / "scoring.md": {
            "scoring-cpu": scoring_cpu(load("scoring_cpu")),
            "scoring-memory": scoring_memory(load("scoring_memory")),
        },
        docs / "gpu.md": {
            "gpu-figures": gpu_figures(),
            "gpu-attention": gpu_attention(),
            "gpu-linear-kl": gpu_linear_kl(),
            "gpu-cross-entropy": gpu_cross_entropy(),
            "gpu-token-scores": gpu_token_scores(),
            "gpu-attention-mass": gpu_attention_mass(),
            "gpu-scoring": gpu_scoring(),
            "gpu-e2e": gpu_e2e(),
            "gpu-first-calls": gpu_first_calls(),
            "gpu-demo": gpu_demo(),
        },
    }


def filled(text: str, blocks: dict[str, str]) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, blocks in documents().items():
        path.write_text(filled(path.read_text(), blocks))
