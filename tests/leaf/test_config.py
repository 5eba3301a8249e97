"""Options: defaults of the method, YAML and flags, presets, and errors that name the remedy."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import pathlib

import pytest

from leaf.arguments import add_arguments, from_arguments
from leaf.config import STAGES, RunConfig


def parse(*argv: str, stages: tuple[str, ...] = STAGES) -> RunConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser, stages)
    return from_arguments(parser.parse_args(argv))


def write(folder: pathlib.Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_the_methods() -> None:
    c = RunConfig()
    assert (c.rule, c.q, c.cap, c.mode, c.level, c.loss, c.lambda_) == (
        "quantile", 0.05, 0.5, "span", "instruction", "pair", 0.5,
    )  # fmt: skip
    assert (c.temperature, c.divergence, c.counterfactuals_per_sample, c.originals) == (1.0, "forward_kl", 1, "all")
    assert (c.max_length, c.training["learning_rate"], c.training["num_train_epochs"]) == (4096, 1e-5, 3)
    assert c.training["per_device_train_batch_size"] == 32
    assert c.training["lr_scheduler_type"] == "cosine"


@pytest.mark.parametrize(
    ("values", "verify"),
    [({}, "teacher"), ({"select": "student_wrong"}, "both"), ({"select": "student_wrong", "verify": "none"}, "none")],
)
def test_verify_follows_select(values: dict[str, str], verify: str) -> None:
    assert RunConfig.from_mapping(values).verify == verify


def test_presets_lie_under_explicit_values() -> None:
    c = RunConfig.from_mapping({"preset": "paper", "tau": 0.1})
    assert (c.rule, c.tau, c.select, c.verify) == ("threshold", 0.1, "student_wrong", "both")
    assert c.counterfactuals_per_sample == "all"
    assert RunConfig.from_mapping({"compat": "released"}).loss == "concat"
    assert RunConfig.from_mapping({"preset": "paper", "rule": "quantile"}).tau is None
    assert RunConfig.from_mapping({"preset": "paper", "compat": "released"}).rule == "quantile"


def test_flags_override_the_file(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path,
        "q: 0.1\nlambda: 0.3\ntemplate_date: 2026-05-04\nprotect: '\\d+'\n"
        "training: {learning_rate: 1e-4, max_steps: 7}\n",
    )
    c = parse("--config", path, "--q", "0.2", "--max-steps", "9", "--no-bf16", "--counterfactuals-per-sample", "3")
    assert (c.q, c.lambda_, c.template_date, c.protect) == (0.2, 0.3, datetime.date(2026, 5, 4).isoformat(), ("\\d+",))
    assert c.training["learning_rate"] == 1e-4  # PyYAML reads 1e-4 as a string
    assert (c.training["max_steps"], c.training["bf16"], c.counterfactuals_per_sample) == (9, False, 3)
    assert parse("--config", path, "--lambda", "0.9").lambda_ == 0.9
    assert parse("--protect", "a", "b").protect == ("a", "b")


def test_running_code_is_off_until_it_is_allowed(tmp_path: pathlib.Path) -> None:
    assert RunConfig().allow_code_execution is False
    assert parse("--allow-code-execution").allow_code_execution is True
    path = write(tmp_path, "allow_code_execution: true\n")
    assert parse("--config", path).allow_code_execution is True
    assert parse("--config", path, "--no-allow-code-execution").allow_code_execution is False


def test_every_option_has_help_and_a_reader() -> None:
    for f in dataclasses.fields(RunConfig):
        assert f.metadata["help"], f.name
        assert f.metadata["stages"], f.name
        assert set(f.metadata["stages"]) <= {*STAGES, "doctor", "estimate"}, f.name


def test_a_stage_takes_only_what_it_reads() -> None:
    with pytest.raises(SystemExit):
        parse("--lambda", "0.3", stages=("score",))
    assert "lambda_" not in RunConfig().stage_key("score")
    assert "lambda_" in RunConfig().stage_key("distill")
    assert "output" not in RunConfig().stage_key("distill")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lamda": 0.3}, "unknown option 'lamda'; did you mean 'lambda'"),
        ({"max-lenght": 3}, "did you mean 'max_length'"),
        ({"tau": 0.1}, "tau has no effect with rule=quantile: add --rule threshold"),
        ({"rule": "threshold"}, "rule=threshold needs --tau"),
        ({"rule": "median"}, "rule must be quantile | threshold, got 'median'"),
        ({"beta": 0.5}, "beta has no effect"),
        ({"divergence": "jsd"}, "needs --beta"),
        ({"q": "much"}, "q must be float, got 'much'"),
        ({"max_length": 1.5}, "max_length must be int, got 1.5"),
        ({"q": True}, "q must be float, got True"),
        ({"allow_code_execution": "no"}, "allow_code_execution must be bool, got 'no'"),
        ({"q": 1.5}, "q must be between 0 and 1"),
        ({"max_tokens": 0}, "max_tokens must be positive"),
        ({"prompt_column": "a", "prompt_template": "{a}"}, "give one of them"),
        ({"protect": "("}, "not a regular expression"),
        ({"template_date": "yesterday"}, "YYYY-MM-DD"),
        ({"counterfactuals_per_sample": "some"}, "must be int | all, got 'some'"),
        ({"counterfactuals_per_sample": 0}, "at least 1"),
        ({"training": [1]}, "training must be mapping"),
        ({"teacher": ["a"]}, "teacher must be str"),
    ],
)
def test_errors_name_the_option(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        RunConfig.from_mapping(values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "must hold a mapping"), ("a: [", "not valid YAML"), (None, "cannot read")]
)
def test_bad_files(tmp_path: pathlib.Path, text: str | None, message: str) -> None:
    path = write(tmp_path, text) if text else str(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match=message):
        parse("--config", path)


def test_a_newline_in_a_template_flag_is_one() -> None:
    def template(text: str) -> str | None:
        return parse("--prompt-template", text).prompt_template

    given = r"{q}\nReason in \boxed{} about \nabla"
    assert template(given) == "{q}\nReason in " + r"\boxed{} about \nabla"
