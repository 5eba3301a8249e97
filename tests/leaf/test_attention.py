"""Attention to marked tokens equals what transformers' own eager attention reports."""

from __future__ import annotations

import pytest
import tiny
import torch

from leaf.attention import Marked, attention_to_marked


def items() -> list[Marked]:
    g = torch.Generator().manual_seed(0)
    result = []
    for n, start in ((9, 6), (5, 4), (17, 10)):
        marked = [i % 3 == 1 and i < start for i in range(n)]
        result.append(Marked(torch.randint(4, 200, (n,), generator=g).tolist(), start, marked))
    return result


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_equals_eager_attentions(arch: str, max_tokens: int):
    model = tiny.model(tiny.tokenizer(), arch=arch)
    shares = list(attention_to_marked(model, items(), max_tokens=max_tokens))
    assert model.config._attn_implementation == "eager", "the model is given back as it was"
    for item, share in zip(items(), shares):
        output = model(input_ids=torch.tensor([item.input_ids]), output_attentions=True, use_cache=False)
        attention = torch.stack(output.attentions)[:, 0]  # [layers, H, n, n]
        rows = attention[:, :, item.response_start - 1 : -1]
        expected = rows[..., torch.tensor(item.marked)].sum(-1).mean()
        assert share == pytest.approx(expected.item(), rel=1e-4)
