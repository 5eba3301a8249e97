"""Running the code of the stages on fake tensors, which have shapes and no values, and counting what it does."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from leaf_kernels import SharedPrefixLayout, pruned_attention
from leaf_kernels.integrations.transformers import NAME
from leaf_kernels.testing import AllocationRecorder, gpu_shapes

from . import sensitivity
from .data import Sample
from .loading import with_adapters
from .pack import Group

PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")}


class Trace(AllocationRecorder):
    """Also counts floating-point operations, and knows how much of the peak an op's scratch is.

    keys: that a query sees on average; attention is an op of many names, which are counted by the size of their queries.
    """

    def __init__(self, keys: float) -> None:
        super().__init__()
        self.keys, self.flops, self.scratch = keys, 0.0, 0
        self._entry: int | None = None  # bytes alive when an op of ours began

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outermost = self._entry is None and func.namespace == "leaf_kernels"
        if outermost:
            self._entry = self.live
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            if outermost:
                self._entry = None
        if func._overloadpacket in PRODUCTS:
            *_, a, b = (x for x in args if isinstance(x, torch.Tensor))
            self.flops += 2 * a.numel() * b.shape[-1]
        elif "attention" in func.name():
            products = 5 if "backward" in func.name() else 2
            self.flops += 2 * products * args[0].numel() * self.keys
        return result

    def _created(self, storage: torch.UntypedStorage) -> None:
        peak = self.peak
        super()._created(storage)
        if self.peak > peak:
            self.scratch = 0 if self._entry is None else self.live - self._entry


@contextlib.contextmanager
def shapes_only(gpu: bool) -> Iterator[None]:
    """Inside, tensors are fake and the code of the stages runs on them, on the CPU; what must see values is left out."""

    def layout(make: Callable[..., SharedPrefixLayout], lengths: Sequence[int]) -> SharedPrefixLayout:
        with unset_fake_temporarily():
            return planned(make(lengths))

    def have_mlps(model: PreTrainedModel, layers: Sequence[Any]) -> bool:
        return bool(layers) and all(isinstance(getattr(layer, "mlp", None), torch.nn.Module) for layer in layers)

    with contextlib.ExitStack() as stack:
        if gpu:
            stack.enter_context(gpu_shapes())
            stack.enter_context(mock.patch.dict(sensitivity.TILE_ROWS, cpu=sensitivity.TILE_ROWS["cuda"]))
        from_lengths = functools.partial(layout, SharedPrefixLayout.from_lengths)
        stack.enter_context(mock.patch.object(SharedPrefixLayout, "from_lengths", from_lengths))
        stack.enter_context(mock.patch.object(sensitivity, "check_head"))
        stack.enter_context(mock.patch.object(sensitivity, "_mlps_are_row_wise", have_mlps))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def planned(layout: SharedPrefixLayout) -> SharedPrefixLayout:
    """With the plan of its attention, for which values are read; it is kept in the layout."""
    q = torch.zeros(layout.num_tokens, 1, 1)
    pruned_attention(q, q, q, layout)
    return layout


def fake_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    except ValueError as error:
        raise ValueError(
            f"{config.model_type} is not a causal language model that transformers knows: {error}"
        ) from error
    model.tie_weights()  # left out with the initialisation
    return model.requires_grad_(False).eval()


def put_adapters(model: PreTrainedModel, rank: int) -> None:
    """Those of `leaf.loading.with_adapters` into a fake model. peft moves them, which fake parameters do not stand."""
    with torch.device("meta"):
        with_adapters(model, rank, rank, seed=0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))


def weight_bytes(model: PreTrainedModel) -> int:
    tensors = {t.untyped_storage()._cdata: t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def half_response(length: int, vocab: int, n: int = 0) -> Sample:
    """A row of a length: half prompt, half response."""
    half = max(1, length // 2)
    ids = [(n + i) % vocab for i in range(length)]
    return Sample(str(n), "instruction", 0, "", 0, ids, [], half, [i < half for i in range(length)])


def counterfactual_groups(length: int, vocab: int, count: int) -> list[Group]:
    """Originals of a length, each with a counterfactual that shares half of it."""

    def group(item: Sample) -> Group:
        half = item.response_start
        original = {"input_ids": item.input_ids, "response_start": half}
        deleted = {"input_ids": item.input_ids[: half - 1] + item.input_ids[half:], "response_start": half - 1}
        return {"id": item.id, "original": original, "counterfactuals": [deleted]}  # type: ignore[typeddict-item]

    return [group(half_response(length, vocab, n)) for n in range(count)]
