"""The Triton kernels of pruned_attention and attention_mass, in the interpreter, against the specification."""

from __future__ import annotations

import pytest
import torch
from attention import dense, keep_mask, layouts, qkv

from leaf_kernels import pruned_attention
from leaf_kernels.testing import assert_close_to_fp64, guarded_outputs, pairwise

HEADS = {"1": (2, 2), "3": (3, 1), "4": (8, 2), "6": (6, 1), "7": (7, 1), "8": (8, 1), "mqa": (18, 1)}  # 18 > BLOCK
CASES = pairwise(
    group=list(HEADS),
    head_dim=[64, 80, 96, 128, 192, 256, 24],
    layout=list(layouts()),
    window=[None, 5, 20, 1000],
    dtype=[torch.float32, torch.float16],
    keep=[False, True],
    softcap=[None, 1.5],
    sinks=[False, True],
    dlse=[False, True],
    deterministic=[True, False],
)


def run(implementation, case: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients for a case's inputs, rounded to the case's dtype and computed in `dtype`."""
    Hq, Hk = HEADS[case["group"]]
    layout = layouts()[case["layout"]]
    N, D = layout.num_tokens, case["head_dim"]
    inputs = dict(zip("qkv", (x.detach().to(dtype).requires_grad_() for x in qkv(N, Hq, Hk, D, case["dtype"]))))
    options = {"window": case["window"], "softcap": case["softcap"], "keep": keep_mask(N) if case["keep"] else None}
    if case["sinks"]:
        inputs["sinks"] = torch.linspace(-1, 2, Hq, dtype=dtype).requires_grad_()
        options["sinks"] = inputs["sinks"]
    out, lse = implementation(*(inputs[name] for name in "qkv"), layout, options, case["deterministic"])
    g = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=g).to(case["dtype"])).sum()
    if case["dlse"]:
        loss = loss + torch.where(lse.isfinite(), lse * torch.randn(lse.shape, generator=g), 0).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {"out": out, "lse": lse, **{f"d{name}": x for name, x in zip(inputs, gradients)}}


def triton(q, k, v, layout, options, deterministic):
    return pruned_attention(q, k, v, layout, impl="triton", return_lse=True, deterministic=deterministic, **options)


def reference(q, k, v, layout, options, deterministic):
    return pruned_attention(q, k, v, layout, impl="reference", return_lse=True, **options)


def plain(q, k, v, layout, options, deterministic):
    out, _, lse = dense(q, k, v, layout, **options)
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).removeprefix("torch.") for v in c.values()))
def test_covering_array(case: dict):
    with guarded_outputs():
        actual = run(triton, case, case["dtype"])
    oracle = run(reference, case, torch.float64)
    budget = run(plain, case, case["dtype"])
    assert torch.equal(actual["lse"].isfinite(), oracle["lse"].isfinite())
    for result in (actual, budget, oracle):
        result["lse"] = torch.where(result["lse"].isfinite(), result["lse"], 0)
    # An exponential of a logit of size L has a relative error of eps·L, whatever the formula.
    largest = float(oracle["lse"].detach().abs().max())
    for name, exact in oracle.items():
        if name == "dsinks":  # a handful of sums over all rows: their budget would be a matter of luck
            eps = torch.finfo(case["dtype"]).eps
            torch.testing.assert_close(actual[name].double(), exact, rtol=0, atol=16 * eps * len(actual["out"]) ** 0.5)
            continue
        try:
            assert_close_to_fp64(
                actual[name], budget[name], exact, max_lse=largest * max(1.0, float(exact.detach().abs().max()))
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
