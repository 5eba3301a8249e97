"""Which implementation of the attention ops serves a call, and what it refuses: kernels, plain torch, other libraries."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from attention import BLOCK, packed, qkv

from leaf_kernels import SharedPrefixLayout, attention_mass, pruned_attention
from leaf_kernels._runtime import dispatch, launch
from leaf_kernels.ops.pruned_attention import op

SMALL = packed((BLOCK + 3, [(5, 4), (BLOCK, 2)]), tail=1)


# -- which implementation runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2**31 - 60, 2**31 - 1, 2**40])
@pytest.mark.parametrize("deterministic", [True, False])
def test_any_number_is_a_window(window: int, deterministic: bool):
    """Large ones mean unlimited: no sum with them overflows."""
    inputs = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    results = []
    for w in (None, window):
        out = pruned_attention(*inputs, SMALL, window=w, impl="triton", deterministic=deterministic)
        queries = torch.ones(SMALL.num_tokens, dtype=torch.bool)
        mass = attention_mass(*inputs[:2], SMALL, queries=queries, window=w, impl="triton")
        results.append([out, mass, *torch.autograd.grad(out.sum(), inputs)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_a_sink_far_above_the_keys():
    """Keys have no share left; outputs and gradients are those of the specification, also through the lse, and finite."""
    q, k, v = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    for height in (60.0, 100.0, 1000.0):
        sinks = torch.full((2,), height, requires_grad=True)
        results = []
        for impl in ("triton", "reference"):
            out, lse = pruned_attention(q, k, v, SMALL, sinks=sinks, return_lse=True, impl=impl)
            loss = out.sum() + (lse[:, :-1].sum() if height < 69 else 0 * lse[:, :-1].sum())
            results.append(torch.autograd.grad(loss, (q, k, v, sinks)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        out, lse = pruned_attention(q, k, v, SMALL, sinks=sinks, return_lse=True, impl="triton")
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum() + lse[:, :-1].sum(), (q, k, v, sinks)))


def test_deterministic_algorithms_override(monkeypatch):
    inputs = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    fused = []
    monkeypatch.setattr(op, "_backward_kv", lambda *args: fused.append(args[-1]) or op.backward_kv(*args))
    for strict in (False, True):
        torch.use_deterministic_algorithms(strict)
        try:
            pruned_attention(*inputs, SMALL, impl="triton", deterministic=False).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert fused == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": torch.float64}, "float16, bfloat16 or float32"), ({"D": 257}, "head sizes up to 256, not 257")],
)
def test_what_the_kernel_cannot_serve(change, message):
    arguments = {"dtype": torch.float32, "D": 16, **change}
    q, k, v = qkv(SMALL.num_tokens, 2, 1, arguments["D"], arguments["dtype"])
    with pytest.raises(ValueError, match=message):
        pruned_attention(q, k, v, SMALL, impl="triton")
    pruned_attention(q, k, v, SMALL)


def test_triton_outside_the_interpreter_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    q, k, v = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="needs CUDA tensors, got 'cpu'; use impl='reference'"):
        pruned_attention(q, k, v, SMALL, impl="triton")


def test_auto_on_a_gpu_is_the_kernel(monkeypatch):
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(dispatch, "_warned", set())
    for capability, expected in (((9, 0), "triton"), ((7, 5), "reference")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        with pytest.warns(UserWarning, match="8.0") if expected == "reference" else nullcontext():
            assert dispatch.resolve_impl("pruned_attention", "auto", cuda) == expected
    with pytest.warns(UserWarning, match="head sizes up to 256"):
        assert dispatch.resolve_impl("pruned_attention", "auto", cuda, "head sizes up to 256") == "reference"


def test_launches_happen_on_the_device_of_the_tensors():
    """Triton launches on the current device: the guard must hold that of the tensors."""
    tensor = mock.MagicMock(spec=torch.Tensor, device=torch.device("cuda", 1))
    current, launched_on = [torch.device("cuda", 0)], []

    @contextmanager
    def guard(device: torch.device):
        current.append(device)
        yield
        current.pop()

    kernel = mock.MagicMock()
    kernel.__getitem__.return_value.side_effect = lambda *_, **__: launched_on.append(current[-1])
    with mock.patch.object(torch.cuda, "device", guard):
        launch.launch(kernel, 3, tensor)
        launch.launch(kernel, 0, tensor)  # nothing is launched for an empty grid
    assert launched_on == [torch.device("cuda", 1)]


# -- other libraries' kernels --------------------------------------------------------------------------------------


def on_cuda() -> mock._patch:
    """CPU tensors that say they are on a GPU, for code that only hands them on."""
    return mock.patch.object(torch.Tensor, "device", property(lambda self: torch.device("cuda", 0)))


PLAIN = SharedPrefixLayout.from_lengths([4, 0, 6])


def vendor_call(monkeypatch, impl: str, **options):
    """The call's keyword arguments as the library receives them; it returns q."""
    calls = []

    def torch_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        calls.append(
            {"starts": cu_seq_q.tolist(), "longest": max_q, "scale": scale, "window": window_size, "gqa": enable_gqa}
        )
        return query

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap, deterministic):
        calls.append({"starts": cu_q.tolist(), "longest": max_q, "scale": softmax_scale, "window": window_size})
        calls[-1] |= {"causal": causal, "softcap": softcap, "deterministic": deterministic}
        return q

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=torch_varlen))
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash))
    layout = options.pop("layout", PLAIN)
    dtype = options.pop("dtype", torch.bfloat16)
    q, k, v = (x.detach() for x in qkv(layout.num_tokens, 4, 2, 16, dtype))
    if options.pop("grad", False):
        q.requires_grad_()
    with on_cuda():
        out = pruned_attention(q, k, v, layout, impl=impl, **options)
    assert out is q
    return calls[0]


def test_vendors_are_called_as_they_define_it(monkeypatch):
    got = vendor_call(monkeypatch, "torch_varlen", scale=0.5, window=3)
    assert got == {"starts": [0, 4, 4, 10], "longest": 6, "scale": 0.5, "window": (2, 0), "gqa": True}
    assert vendor_call(monkeypatch, "torch_varlen")["window"] == (-1, 0)
    got = vendor_call(monkeypatch, "flash_attn", softcap=30.0, deterministic=False)
    assert got["causal"]
    assert (got["window"], got["softcap"], got["deterministic"]) == ((-1, 0), 30.0, False)
    assert vendor_call(monkeypatch, "flash_attn", grad=True)["deterministic"]


@pytest.mark.parametrize("impl", ["torch_varlen", "flash_attn"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": packed((5, [(3, 2)]))}, "share prefixes"),
        ({"layout": packed((5, []), tail=1)}, "belong to no segment"),
        ({"keep": torch.ones(10, dtype=torch.bool)}, "keep"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"return_lse": True}, "return_lse"),
        ({"dtype": torch.float32}, "float16 and bfloat16 only"),
    ],
)
def test_vendors_refuse_what_they_cannot_express(monkeypatch, impl, options, message):
    with pytest.raises(ValueError, match=f"impl='{impl}' does not serve .*{message}.*impl='auto'"):
        vendor_call(monkeypatch, impl, **options)


def test_torch_varlen_refuses_softcap_and_a_deterministic_backward(monkeypatch):
    with pytest.raises(ValueError, match="softcap"):
        vendor_call(monkeypatch, "torch_varlen", softcap=1.0)
    with pytest.raises(ValueError, match="deterministic=False"):
        vendor_call(monkeypatch, "torch_varlen", grad=True)
    vendor_call(monkeypatch, "torch_varlen", grad=True, deterministic=False)


def test_vendors_on_a_cpu_and_not_installed(monkeypatch):
    q, k, v = (x.detach() for x in qkv(10, 4, 2, 16, torch.bfloat16))
    with pytest.raises(ValueError, match="tensors on 'cpu'"):
        pruned_attention(q, k, v, PLAIN, impl="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with (
        on_cuda(),
        pytest.raises(ImportError, match=r"pip install 'leaf-kernels\[flash-attn\]'"),
    ):
        pruned_attention(q, k, v, PLAIN, impl="flash_attn")
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'reference', got 'flash_attn'"):
        attention_mass(q, k, PLAIN, queries=torch.ones(10, dtype=torch.bool), impl="flash_attn")
