"""How much a model looks at given prompt tokens while it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from leaf_kernels import SharedPrefixLayout
from leaf_kernels.integrations.transformers import NAME, MassRecorder, check_model, packed_inputs, register

from .generate import evaluating
from .sensitivity import batches


class Marked(NamedTuple):
    """A sequence and the tokens to watch."""

    input_ids: list[int]
    response_start: int
    marked: list[bool]


@torch.no_grad()
def attention_to_marked(model: PreTrainedModel, items: Sequence[Marked], *, max_tokens: int) -> Iterator[float]:
    """For every item, in order: the share of attention that falls on marked tokens.

    Averaged over the rows that predict the response, over heads and over layers. In [0, 1].
    """
    register()
    check_model(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with evaluating(model):
            for batch in batches(items, max_tokens):
                yield from _shares(model, batch)
    finally:
        model.set_attn_implementation(before)


def _shares(model: PreTrainedModel, batch: Sequence[Marked]) -> Iterator[float]:
    lengths = [len(item.input_ids) for item in batch]
    layout = SharedPrefixLayout.from_lengths(lengths).to(model.device)
    input_ids = torch.tensor([i for item in batch for i in item.input_ids], device=model.device)
    marked = torch.tensor([m for item in batch for m in item.marked], device=model.device)
    # the rows that predict a response token: from the last prompt token to the last but one
    queries = [item.response_start - 1 <= i < length - 1 for item, length in zip(batch, lengths) for i in range(length)]
    recorder = MassRecorder(torch.tensor(queries, device=model.device))
    model.base_model(**packed_inputs(layout, input_ids), mass=recorder)
    layers = [layer.mean(0).to(marked.device) for layer in recorder.layers]
    mass = torch.stack(layers).mean(0)  # [N], over heads and layers
    for item, share in zip(batch, (mass * marked).split(lengths)):
        yield float(share.sum()) / (len(item.input_ids) - item.response_start)
