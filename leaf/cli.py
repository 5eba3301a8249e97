"""The command line: `leaf demo | doctor | estimate | run | select | score | prune | cache | distill | eval | report |
export`.

Only the standard library is imported until a command runs, so `leaf --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from . import __version__
from .arguments import add_arguments, from_arguments
from .config import CACHED, STAGES, did_you_mean

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .run import Run

T = TypeVar("T")

PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # gloo, gloo, NCCL
# command -> (help, the stages it runs)
STAGE_COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "run": ("all stages, from rows to a report; finished stages are skipped, killed ones go on", STAGES),
    "select": ("read the rows and keep those worth pruning", ("select",)),
    "score": ("gradient sensitivity of teacher and student, token by token", ("score",)),
    "prune": ("delete the flagged spans, then verify what is left with the models", ("prune", "verify")),
    "cache": ("write down what the teacher says, for a distillation without it", ("cache",)),
    "distill": ("train the student on originals and counterfactuals", ("distill",)),
    "eval": ("accuracy, and attention on flagged tokens, before and after", ("eval",)),
    "report": ("one HTML file, plots and CSV", ("report",)),
}


class Terminal:
    """Messages and progress bars on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # loading weights has one of its own
        self.console = Console(stderr=True, highlight=False)

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        self.console.print(renderable)

    def track(
        self, items: Iterable[T], total: int, description: str, tokens: Sequence[int] | None = None
    ) -> Iterator[T]:
        from rich import progress
        from rich.text import Text

        class Speed(progress.ProgressColumn):
            def render(self, task: progress.Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text("" if speed is None else f"{speed:,.0f} tokens/s")

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            *([Speed()] if tokens else []),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
        )
        with progress.Progress(*columns, console=self.console) as bar:
            task = bar.add_task(description, total=sum(tokens) if tokens else total)
            for n, item in enumerate(items):
                bar.advance(task, tokens[n] if tokens else 1)
                yield item


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 1 when more rows were skipped than `--max-skip-fraction`, or 2 for bad options or input.
    """
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        arguments.parser.error(f"unknown option {flag}{did_you_mean(flag, arguments.parser.flags())}")
    expected = () if arguments.debug else (ValueError, OSError, ImportError, ArithmeticError, MemoryError)
    try:
        return arguments.command(arguments)
    except expected as error:
        missing = isinstance(error, ModuleNotFoundError)
        hint = " (`pip install 'leaf-kernels[distill]'` installs it)" if missing else ""
        print(f"leaf {arguments.name}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if arguments.debug or not any(words in str(error) for words in PEER_IS_GONE):
            raise
        print(f"leaf {arguments.name}: another process of this run ended; its own message says why", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"leaf {arguments.name}: interrupted; the same command goes on from the last whole shard", file=sys.stderr
        )
        return 130


class _Parser(argparse.ArgumentParser):
    """An error is one line; the usage of a command with forty options would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")

    def flags(self) -> list[str]:
        return list(self._option_string_actions)


def _parser() -> _Parser:
    parser = _Parser(prog="leaf", description="Find distracting tokens, delete them, distil.")
    parser.add_argument("--version", action="version", version=f"leaf {__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def command(name: str, help: str, function: Any) -> _Parser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(command=function, parser=sub)
        return sub

    demo = command("demo", "the whole method on a built-in task, on a CPU, without downloads", _demo)
    demo.add_argument(
        "--task",
        choices=("short", "long"),
        default="short",
        help="short: distil on prompts of 35 tokens, arm by arm; long: how detection depends on the length of the prompt, "
        "50 to 2000 tokens with several signs, without distillation (default: short)",
    )
    demo.add_argument(
        "--preset",
        choices=("fast", "full"),
        help="of --task short: one seed and four arms (default: fast), or everything",
    )
    demo.add_argument("--output-dir", default="out", help="where results, report and models go (default: out)")
    demo.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="other seeds than the task's")
    add_arguments(
        command(
            "doctor", "check this machine and, when given, a pair of models and rows, before hours are spent", _doctor
        ),
        ("doctor",),
    )
    estimate = command(
        "estimate", "memory and time of every stage, from two configs, before weights are loaded", _estimate
    )
    add_arguments(estimate, ("estimate",))
    estimate.add_argument("--length", type=int, help="tokens of a row (default: those of --data, else --max-length)")
    for name, (help, stages) in STAGE_COMMANDS.items():
        sub = command(name, help, _stages)
        add_arguments(sub, stages)
        if name == "score":
            sub.add_argument("--dry-run", action="store_true", help="count samples and skips, estimate, write nothing")
    export = command("export", "write the tables in other formats", _export)
    export.add_argument("--output", default="leaf-run", help="the run directory (default: leaf-run)")
    export.add_argument(
        "--format", choices=("released", "trl"), default="released", help="the authors' files, or TRL's"
    )
    export.add_argument("--to", default=None, help="folder to write into (default: OUTPUT/export)")
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    if arguments.task == "long" and arguments.preset:
        raise ValueError("--preset is for --task short; --task long has one size, and --seeds for more seeds")
    terminal = Terminal()
    shared: dict[str, Any] = {"seeds": arguments.seeds, "ui": terminal}
    if arguments.task == "long":
        shown = demo.lengths.summary(demo.lengths.run(arguments.output_dir, **shared))
    else:
        shown = demo.summary(demo.run(arguments.preset or "fast", arguments.output_dir, **shared))
    terminal.console.print(shown)
    terminal.say(f"demo: {arguments.output_dir}/report.html and {arguments.output_dir}/results.json")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from . import doctor

    return 0 if doctor.check(from_arguments(arguments), Console()) else 2


def _estimate(arguments: argparse.Namespace) -> int:
    config = from_arguments(arguments)
    if arguments.length is not None:
        if arguments.length < 2 or config.data:
            raise ValueError(f"--length must be at least 2 and comes without --data, got {arguments.length}")
        config = dataclasses.replace(config, max_length=arguments.length)
    from rich.console import Console

    from . import estimate, run, stages

    console, workload = Console(highlight=False), None
    if config.data:
        units = stages.encoded(run.Run(config), run.read(config, config.data))
        estimate.count(units, config.max_tokens, console)
        if all(isinstance(unit, run.Skip) for unit in units):
            raise ValueError("none of the rows of --data can be used; see --max-length")
        workload = estimate.Workload.of(units, "student", config.max_tokens)
    estimator = estimate.estimator_of(config, workload)
    estimate.report(estimator, estimator.all(), console)
    if workload and config.teacher_mode in CACHED:
        console.print(estimate.cache_size(estimator, units))
    return 0


def _stages(arguments: argparse.Namespace) -> int:
    config = from_arguments(arguments)
    from . import run

    if getattr(arguments, "dry_run", False):
        return _dry_run(run.Run(config, Terminal()))

    ui = Terminal() if os.environ.get("RANK", "0") == "0" else run.Silent()
    problems = run.run_stages(config, STAGE_COMMANDS[arguments.name][1], ui)
    for problem in problems:
        ui.say(problem)
    return 1 if problems else 0


def _dry_run(run: Run) -> int:
    from rich.console import Console

    from .stages import preview_score

    preview_score(run, Console(highlight=False))
    for problem in run.problems:
        run.ui.say(problem)
    return 1 if run.problems else 0


def _export(arguments: argparse.Namespace) -> int:
    from . import stages

    for name, count in stages.export(arguments.output, arguments.format, arguments.to).items():
        print(f"{name}: {count} records")
    return 0
