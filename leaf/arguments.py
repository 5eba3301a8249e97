"""The command line and YAML files of `RunConfig`, made from its fields."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from .config import TRAINING_DEFAULTS, RunConfig, convert, option_types

# Short flags for the fields of LeafArguments that are set most; all others go into `training:` of the YAML file.
TRAINING_FLAGS: dict[str, tuple[str, type]] = {
    "learning_rate": ("learning_rate", float),
    "epochs": ("num_train_epochs", float),
    "batch_size": ("per_device_train_batch_size", int),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", int),
    "max_steps": ("max_steps", int),
    "bf16": ("bf16", bool),
}


def load_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file of options.

    Raises:
        ValueError: the file is missing, is not YAML, or holds something other than a mapping.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path} must hold a mapping of options, got {type(values).__name__}")
    return values


def add_arguments(parser: argparse.ArgumentParser, stages: Iterable[str]) -> None:
    """Add `--config` and a flag for every option that one of `stages` reads. Absent flags leave no attribute."""
    stages = set(stages)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same options; flags override it")
    for f in fields(RunConfig):
        if f.name == "training" or not stages.intersection(f.metadata["stages"]):
            continue
        accepts = option_types()[f.name]
        flag = "--" + f.name.rstrip("_").replace("_", "-")
        if accepts.kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=f.metadata["help"])
            continue
        shown = "" if f.default in (None, ()) else f" (default: {f.default})"
        parser.add_argument(
            flag,
            dest=f.name,
            default=argparse.SUPPRESS,
            help=(f.metadata["help"] + shown).replace("%", "%%"),
            metavar="{" + ",".join(map(str, accepts.words)) + "}" if accepts.closed else accepts.kind.__name__.upper(),
            nargs="+" if accepts.many else None,
        )
    if "distill" in stages:
        for flag, (name, kind) in TRAINING_FLAGS.items():
            option: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if kind is not bool:
                option = {"type": kind, "metavar": kind.__name__.upper()}
            parser.add_argument(
                "--" + flag.replace("_", "-"),
                dest=f"training.{name}",
                default=argparse.SUPPRESS,
                help=f"training: {name}"
                + (f" (default: {TRAINING_DEFAULTS[name]})" if name in TRAINING_DEFAULTS else ""),
                **option,
            )


def from_arguments(arguments: argparse.Namespace) -> RunConfig:
    """The `RunConfig` of a parsed command line: flags over `--config` over the defaults."""
    values = load_yaml(arguments.config) if arguments.config else {}
    training = dict(convert("training", values.pop("training", None) or {}))
    names = {f.name for f in fields(RunConfig)}
    for name, value in vars(arguments).items():
        if name.startswith("training."):
            training[name.removeprefix("training.")] = value
        elif name in names:
            if name == "prompt_template":  # a shell passes \n on as two characters; \neq and \nabla stay what they are
                value = re.sub(r"\\n(?![a-z])", "\n", value)
            values.pop("lambda" if name == "lambda_" else name, None)
            values[name] = value
    return RunConfig.from_mapping({**values, "training": training})
