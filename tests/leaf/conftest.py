"""Fixtures of the recipe's tests; the factories themselves are in tiny.py."""

from __future__ import annotations

import os
import pathlib

import pytest
import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny.model(tokenizer)


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """The folder with GSM8K and HumanEval rows; they are not part of the repository."""
    folder = os.environ.get("LEAF_TEST_DATA")
    if not folder:
        pytest.skip("LEAF_TEST_DATA is not set: it names the folder with gsm8k/ and humaneval/")
    return pathlib.Path(folder)
