"""`attention_in_chunks`, which the GPU tests and the benchmark trust, against the specification."""

from __future__ import annotations

import pytest
import torch

from leaf_kernels import SharedPrefixLayout, pruned_attention
from leaf_kernels.testing import attention_in_chunks, pruned_groups

OPTIONS = {
    "none": {},
    "all": {"keep": True, "window": 5, "softcap": 1.5, "sinks": True, "scale": 0.7},
    "nothing kept": {"keep": False, "sinks": True},
}


def layout() -> SharedPrefixLayout:
    root = list(range(13))
    shared, _ = SharedPrefixLayout.from_groups([[root, root[:6] + root[9:], root, root[2:]], [[], [3]]])
    tail = shared.num_tokens + 3
    return SharedPrefixLayout(shared.segment_starts, shared.prefix_starts, shared.prefix_lens, tail)


@pytest.mark.parametrize("max_logits", [1, 100, 1 << 20], ids=["one query", "some queries", "whole segments"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_specification(name: str, max_logits: int):
    pack, g = layout(), torch.Generator().manual_seed(0)
    N = pack.num_tokens

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = (normal(N, H, 4).requires_grad_() for H in (6, 2, 2))
    inputs, options = [q, k, v], dict(OPTIONS[name])
    if "keep" in options:
        options["keep"] = (torch.rand(N, generator=g) > 0.4) & options["keep"]
    if "sinks" in options:
        options["sinks"] = normal(6).requires_grad_()
        inputs.append(options["sinks"])
    out, lse = pruned_attention(q, k, v, pack, impl="reference", return_lse=True, **options)
    upstream, upstream_lse = normal(*out.shape), torch.where(lse.isfinite(), normal(*lse.shape), 0)
    wanted = [out, lse, *torch.autograd.grad([out, lse], inputs, [upstream, upstream_lse])]
    got = attention_in_chunks(q, k, v, pack, upstream, upstream_lse=upstream_lse, max_logits=max_logits, **options)
    for actual, expected in zip(got, wanted):
        torch.testing.assert_close(actual, expected.detach())
    assert (got.dsinks is None) == ("sinks" not in options)


def test_one_key_head_is_a_slice_of_all():
    pack, g = layout(), torch.Generator().manual_seed(1)
    q, k, v, up = (torch.randn(pack.num_tokens, H, 4, generator=g, dtype=torch.float64) for H in (6, 2, 2, 6))
    whole = attention_in_chunks(q, k, v, pack, up)
    part = attention_in_chunks(q[:, 3:], k[:, 1:], v[:, 1:], pack, up[:, 3:])
    torch.testing.assert_close(part.dk, whole.dk[:, 1:])
    torch.testing.assert_close(part.out, whole.out[:, 3:])


def test_sixteen_bit_inputs_are_computed_in_sixteen_bits():
    pack, g = layout(), torch.Generator().manual_seed(2)
    tensors = [torch.randn(pack.num_tokens, H, 16, generator=g).bfloat16() for H in (4, 2, 2, 4)]
    plain = attention_in_chunks(*tensors[:3], pack, tensors[3])
    oracle = attention_in_chunks(*(x.double() for x in tensors[:3]), pack, tensors[3].double())
    error = (plain.out.double() - oracle.out).abs().max()
    assert 1e-4 < error < 0.1  # wrong by bf16 rounding: neither exact nor broken
    assert plain.dk.dtype == torch.bfloat16
    assert plain.lse.dtype == torch.float32


def test_pruned_groups_share_what_stands_before_the_deletion():
    groups = pruned_groups(5, seed=3)
    pack, _ = SharedPrefixLayout.from_groups(groups)
    separate = sum(len(member) for group in groups for member in group)
    assert pack.has_prefix
    assert separate > 1.1 * pack.num_tokens
    assert pack.max_len <= 1200
