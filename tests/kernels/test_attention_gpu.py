"""pruned_attention and attention_mass on an NVIDIA GPU, at the shapes of real models:

    pytest -m gpu tests/kernels/test_attention_gpu.py

Errors are held against fp64: at most twice those of textbook torch code in the same dtype. Data is random normal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from gpu import DEVICE, GPU_ONLY, IMPL, compilations, no_sync

from leaf_kernels import SharedPrefixLayout, attention_mass, pruned_attention
from leaf_kernels.testing import AttentionResult, assert_close_to_fp64, attention_in_chunks, pruned_groups

pytestmark = GPU_ONLY


class Shape(NamedTuple):
    """Query heads, key heads, head dim, and what the model asks of attention."""

    Hq: int
    Hk: int
    D: int
    options: dict[str, Any] = {}  # noqa: RUF012  # read only
    longest: int = 0  # length of one more sequence, so that the window masks something


SHAPES = {
    "Llama-3.2-1B": Shape(32, 8, 64),
    "Llama-3.1-8B": Shape(32, 8, 128),
    "Llama-3.2-3B": Shape(24, 8, 128),
    "Qwen2.5-0.5B": Shape(14, 2, 64),
    "Qwen2.5-1.5B": Shape(12, 2, 128),
    "Qwen2.5-7B": Shape(28, 4, 128),
    "Qwen3-0.6B": Shape(16, 8, 128),
    "Qwen3-14B": Shape(40, 8, 128),
    "Qwen3-30B-A3B": Shape(32, 4, 128),
    "Phi-2": Shape(32, 32, 80),
    "Phi-3-mini": Shape(32, 32, 96, {"window": 2047}, 2600),
    "Nemotron-4-340B": Shape(96, 8, 192),
    "Gemma-2-2B": Shape(8, 4, 256, {"softcap": 50.0, "window": 4096}, 4500),
    "gpt-oss-20b": Shape(64, 8, 64, {"sinks": True, "window": 128}),
}
DTYPES = [torch.bfloat16, torch.float16]
LLAMA_1B = SHAPES["Llama-3.2-1B"]


def pack(num_groups: int, *, longest: int = 0, tail: int = 0, seed: int = 0) -> SharedPrefixLayout:
    """On the CPU: pruned groups, an empty sequence, perhaps a long one with a continuation that shares nine tenths of it."""
    groups: list[list[torch.Tensor]] = [*pruned_groups(num_groups, seed=seed), [torch.arange(0)]]
    if longest:
        long = torch.arange(longest)
        groups.append([long, torch.cat([long[: longest * 9 // 10], torch.full((600,), -1)])])
    layout, _ = SharedPrefixLayout.from_groups(groups)
    return SharedPrefixLayout(
        layout.segment_starts, layout.prefix_starts, layout.prefix_lens, num_tokens=layout.num_tokens + tail
    )


def normal(*size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str | None = None) -> torch.Tensor:
    device = device or DEVICE
    return torch.randn(*size, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def inputs(N: int, shape: Shape, dtype: torch.dtype = torch.bfloat16, device: str | None = None) -> list[torch.Tensor]:
    """q, k, v that want gradients, and the upstream gradient of the output."""
    heads = (shape.Hq, shape.Hk, shape.Hk, shape.Hq)
    q, k, v, upstream = (normal(N, H, shape.D, dtype=dtype, seed=seed, device=device) for seed, H in enumerate(heads))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream]


def options_of(shape: Shape) -> dict[str, Any]:
    options = dict(shape.options)
    if options.get("sinks"):
        # fp32, so that the budget judges the sum over all rows and not its last rounding
        options["sinks"] = normal(shape.Hq, dtype=torch.float32, seed=9).requires_grad_()
    return options


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    upstream: torch.Tensor,
    layout: SharedPrefixLayout,
    *,
    impl: str | None = None,
    upstream_lse: torch.Tensor | None = None,
    **options: Any,
) -> AttentionResult:
    """The op forward and backward."""
    out, lse = pruned_attention(q, k, v, layout, impl=impl or IMPL, return_lse=True, **options)
    leaves = [q, k, v] + ([options["sinks"]] if options.get("sinks") is not None else [])
    results, gradients = [out], [upstream]
    if upstream_lse is not None:
        results, gradients = [out, lse], [upstream, upstream_lse]
    dq, dk, dv, *dsinks = torch.autograd.grad(results, leaves, gradients)
    return AttentionResult(out.detach(), lse.detach(), dq, dk, dv, dsinks[0] if dsinks else None)


def judge(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    upstream: torch.Tensor,
    layout: SharedPrefixLayout,
    **options: Any,
) -> tuple[AttentionResult, AttentionResult]:
    """Plain torch in the inputs' dtype, and fp64."""
    options.pop("deterministic", None)
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    plain = attention_in_chunks(q, k, v, layout, upstream, **options)
    return plain, attention_in_chunks(q.double(), k.double(), v.double(), layout, upstream.double(), **wide)


def assert_in_budget(actual: AttentionResult, plain: AttentionResult, oracle: AttentionResult) -> None:
    for name in ("out", "dq", "dk", "dv", "dsinks"):
        if getattr(oracle, name) is not None:
            with naming(name):
                assert_close_to_fp64(*(getattr(result, name) for result in (actual, plain, oracle)))
    has_key = oracle.lse > -torch.inf
    assert torch.equal(actual.lse > -torch.inf, has_key)
    with naming("lse"):
        lse = oracle.lse[has_key]
        assert_close_to_fp64(actual.lse[has_key], plain.lse[has_key], lse, max_lse=float(lse.abs().max()))


@contextmanager
def naming(name: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error


def assert_bitwise_equal(a: AttentionResult, b: AttentionResult) -> None:
    for name, x, y in zip(AttentionResult._fields, a, b):
        assert (x is None and y is None) or torch.equal(x, y), f"{name} differs between two runs"


# -- the error budget --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", SHAPES)
def test_error_budget(name: str, dtype: torch.dtype, deterministic: bool):
    shape = SHAPES[name]
    layout = pack(2, longest=shape.longest, tail=5).to(DEVICE)
    tensors, options = inputs(layout.num_tokens, shape, dtype), options_of(shape)
    actual = attend(*tensors, layout, deterministic=deterministic, **options)
    assert_in_budget(actual, *judge(*tensors, layout, **options))
    for gradient in (actual.out, actual.dq, actual.dk, actual.dv):
        assert (gradient[-5:] == 0).all(), "positions outside every segment must have output and gradients 0"


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen2.5-1.5B", "gpt-oss-20b"])
def test_error_budget_with_a_gradient_of_lse_and_removed_keys(name: str):
    shape = SHAPES[name]
    layout = pack(2).to(DEVICE)
    tensors, options = inputs(layout.num_tokens, shape), options_of(shape)
    options["keep"] = normal(layout.num_tokens, dtype=torch.float32, seed=5) > 0
    # Which rows have a key at all is asked of the op itself; the budget then holds it against the oracle
    _, lse = pruned_attention(*tensors[:3], layout, impl=IMPL, return_lse=True, **options)
    options["upstream_lse"] = torch.where(lse.isfinite(), normal(*lse.shape, dtype=torch.float32, seed=6), 0)
    assert_in_budget(attend(*tensors, layout, **options), *judge(*tensors, layout, **options))


@pytest.mark.timeout(900)  # the oracle needs fp64, of which some GPUs have little
@pytest.mark.parametrize(("name", "length"), [("Llama-3.2-1B", 131072), ("Llama-3.1-8B", 32768), ("Qwen2.5-7B", 65536)])
def test_error_budget_of_a_long_sequence(name: str, length: int):
    """With a continuation that shares 90 % of it. Every row and key of the last key head and its queries is checked."""
    shape = SHAPES[name]
    layout = pack(2, longest=length).to(DEVICE)
    tensors = inputs(layout.num_tokens, shape)
    group = shape.Hq // shape.Hk
    judges = judge(*(x.detach()[:, -(x.shape[1] // shape.Hk) :] for x in tensors), layout)
    for deterministic in (True, False):
        out, lse, dq, dk, dv, _ = attend(*tensors, layout, deterministic=deterministic)
        last = AttentionResult(out[:, -group:], lse[-group:], dq[:, -group:], dk[:, -1:], dv[:, -1:], None)
        with naming("split" if deterministic else "fused"):
            assert_in_budget(last, *judges)


def test_offsets_beyond_two_to_the_31():
    """The last segment of a pack whose q has more than 2^31 elements, against that segment alone."""
    if torch.cuda.get_device_properties(DEVICE).total_memory < 38 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    count, length = 1100, 1000
    layout = SharedPrefixLayout.from_lengths([length] * count).to(DEVICE)
    tensors = inputs(count * length, LLAMA_1B)
    assert tensors[0].numel() > 2**31
    actual = attend(*tensors, layout)
    out, lse, dq, dk, dv, _ = actual
    last = AttentionResult(out[-length:], lse[:, -length:], dq[-length:], dk[-length:], dv[-length:], None)
    alone = [x.detach()[-length:] for x in tensors]
    assert_in_budget(last, *judge(*alone, SharedPrefixLayout.from_lengths([length]).to(DEVICE)))


def test_strided_views_of_one_projection():
    """q, k and v as slices of a fused QKV projection, the upstream gradient expanded (stride 0)."""
    layout, shape = pack(2).to(DEVICE), SHAPES["Qwen2.5-1.5B"]
    qkv = normal(layout.num_tokens, shape.Hq + 2 * shape.Hk, shape.D)
    views = [x.requires_grad_() for x in qkv.split([shape.Hq, shape.Hk, shape.Hk], dim=1)]
    upstream = normal(1, 1, shape.D).expand(layout.num_tokens, shape.Hq, shape.D)
    copies = [x.detach().contiguous().requires_grad_() for x in views]
    assert_bitwise_equal(attend(*views, upstream, layout), attend(*copies, upstream.contiguous(), layout))


# -- repeatability -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen2.5-1.5B", "Gemma-2-2B", "gpt-oss-20b"])
def test_deterministic_path_repeats_bitwise(name: str):
    shape, host = SHAPES[name], pack(6, longest=SHAPES[name].longest)
    tensors, options = inputs(host.num_tokens, shape), options_of(shape)
    first = attend(*tensors, host.to(DEVICE), **options)
    for _ in range(5):
        assert_bitwise_equal(attend(*tensors, host.to(DEVICE), **options), first)  # the schedule is built anew, too


def test_use_deterministic_algorithms_overrides_the_argument():
    host = pack(6)
    tensors = inputs(host.num_tokens, LLAMA_1B)
    deterministic = attend(*tensors, host.to(DEVICE), deterministic=True)
    torch.use_deterministic_algorithms(True)  # it also fills every torch.empty with NaN
    try:
        overridden = [attend(*tensors, host.to(DEVICE), deterministic=False) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for result in overridden:
        assert_bitwise_equal(result, deterministic)


def test_fused_backward_deviates_less_than_the_budget(record_property):
    layout = pack(6).to(DEVICE)
    tensors = inputs(layout.num_tokens, LLAMA_1B)
    runs = [attend(*tensors, layout, deterministic=False) for _ in range(20)]
    plain, oracle = judge(*tensors, layout)
    for run in runs:
        assert_in_budget(run, plain, oracle)
    for name in ("out", "dq", "dk", "dv"):
        values = torch.stack([getattr(run, name) for run in runs]).float()
        deviation = float((values.amax(0) - values.amin(0)).max())
        record_property(f"largest deviation of {name} over 20 runs", deviation)  # `--junit-xml` keeps it
        allowed = 2 * float((getattr(plain, name).double() - getattr(oracle, name)).abs().max())
        assert deviation <= allowed, f"{name} deviates by {deviation:.3e} over 20 runs, allowed {allowed:.3e}"


# -- what a trainer needs of it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
def test_new_layout_costs_no_host_sync(deterministic: bool):
    shape = SHAPES["gpt-oss-20b"]
    options = options_of(shape)
    warm = pack(3).to(DEVICE)  # the first call compiles, and may sync
    attend(*inputs(warm.num_tokens, shape), warm, deterministic=deterministic, **options)
    host = pack(5, seed=1).pin_memory()
    tensors = inputs(host.num_tokens, shape)
    keep = normal(host.num_tokens, dtype=torch.float32) > -1
    attend(*tensors, host.to(DEVICE), deterministic=deterministic, keep=keep, **options)
    with no_sync():
        layout = host.to(DEVICE, non_blocking=True)
        actual = attend(*tensors, layout, deterministic=deterministic, keep=keep, **options)
    assert actual.dk.isfinite().all()


def test_attention_mass_costs_no_host_sync():
    host = pack(3).pin_memory()
    q, k, _, _ = inputs(host.num_tokens, LLAMA_1B)
    queries = normal(host.num_tokens, dtype=torch.float32) > 1
    attention_mass(q, k, host.to(DEVICE), queries=queries, impl=IMPL)
    with no_sync():
        layout = host.to(DEVICE, non_blocking=True)
        mass = attention_mass(q, k, layout, queries=queries, impl=IMPL)
    assert mass.isfinite().all()


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "fused"])
def test_twenty_layouts_compile_once(deterministic: bool):
    """Lengths, tokens and segments of every residue, down to two segments of three tokens in all."""
    shape = Shape(5, 5, 80)  # heads and dim of no other test, so that the first call has something to compile
    smallest, _ = SharedPrefixLayout.from_groups([[[1, 2], [1, 3]]])
    layouts = [smallest, *(pack(1 + n % 4, tail=n, seed=n) for n in range(19))]

    def run(layout: SharedPrefixLayout) -> None:
        layout = layout.to(DEVICE)
        tensors = inputs(layout.num_tokens, shape)
        upstream_lse = torch.ones(shape.Hq, len(tensors[0]), device=DEVICE)  # its stride is a number of tokens
        attend(*tensors, layout, upstream_lse=upstream_lse, deterministic=deterministic)
        attention_mass(*tensors[:2], layout, queries=torch.ones(len(tensors[0]), device=DEVICE).bool(), impl=IMPL)

    with compilations() as first:
        run(pack(2, seed=99))
    assert first or not deterministic, "the first call of a new head dim compiled nothing: the hook does not count"
    with compilations() as later:
        for layout in layouts:
            run(layout)
    assert not later, f"20 layouts compiled {len(later)} more kernels: {sorted(set(later))}"


@pytest.mark.parametrize(("deterministic", "ceiling"), [(True, 3.0), (False, 4.8)], ids=["split", "fused"])
def test_peak_memory(deterministic: bool, ceiling: float):
    """In sizes of q: out, dq, a quarter for dk and dv at this GQA group of 8; the fused backward's fp32 dq is two more.

    Keys and values expanded to the query heads would be two sizes more, [tokens, tokens] of a single head even more.
    """
    shape = SHAPES["gpt-oss-20b"]
    layout = pack(14).to(DEVICE)
    tensors = inputs(layout.num_tokens, shape)
    attend(*tensors, layout, deterministic=deterministic)  # compiles, and builds the schedule
    torch.cuda.synchronize()

    def peak(run: Any) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / (tensors[0].numel() * tensors[0].element_size())

    with torch.no_grad():
        forward = peak(lambda: pruned_attention(*tensors[:3], layout, impl=IMPL))
    assert forward <= 1.25, f"the forward peaks at {forward:.2f} sizes of q"
    queries = torch.ones(layout.num_tokens, dtype=torch.bool, device=DEVICE)
    mass = peak(lambda: attention_mass(*tensors[:2], layout, queries=queries, impl=IMPL))
    assert mass <= 0.25, f"attention_mass peaks at {mass:.2f} sizes of q"
    step = peak(lambda: attend(*tensors, layout, deterministic=deterministic))
    assert step <= ceiling, f"forward and backward peak at {step:.2f} sizes of q"


def test_graph_capture_and_replay():
    layout = pack(3).to(DEVICE)
    static = inputs(layout.num_tokens, LLAMA_1B)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and build the schedule outside the capture
        for _ in range(2):
            attend(*static, layout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(*static, layout)
    fresh = [normal(*x.shape, seed=20 + n) for n, x in enumerate(static)]
    with torch.no_grad():
        for held, new in zip(static, fresh):
            held.copy_(new)
    graph.replay()
    assert_bitwise_equal(captured, attend(*static, layout))


def test_compiles_as_one_graph_forward_and_backward():
    layout, shape = pack(3).to(DEVICE), SHAPES["Qwen2.5-1.5B"]
    *leaves, upstream = inputs(layout.num_tokens, shape)

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return pruned_attention(q, k, v, layout, impl=IMPL)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")  # shows that the compiled code is what ran
    out, expected = torch.compile(block, fullgraph=True, backend=counter)(*leaves), block(*leaves)
    assert counter.frame_count == 1
    assert torch.equal(out, expected)
    for a, b in zip(torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)):
        assert torch.equal(a, b)


def test_tensors_on_a_second_gpu():
    """While the current device is the first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    host = pack(3)
    tensors = inputs(host.num_tokens, LLAMA_1B, device="cuda:1")
    with torch.cuda.device(0):
        actual = attend(*tensors, host.to("cuda:1"))
        mass = attention_mass(
            *tensors[:2], host.to("cuda:1"), queries=torch.ones(host.num_tokens, device="cuda:1").bool(), impl=IMPL
        )
    assert {x.device for x in (*actual[:5], mass)} == {torch.device("cuda:1")}
    assert_in_budget(actual, *judge(*tensors, host.to("cuda:1")))


# -- attention_mass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_mass(name: str, dtype: torch.dtype):
    """Products of 16-bit values are exact in fp32, so only the softmax and the order of the sums may differ from fp64."""
    shape = SHAPES[name]
    layout = pack(2, longest=shape.longest).to(DEVICE)
    q, k, _, _ = inputs(layout.num_tokens, shape, dtype)
    options = options_of(shape)
    queries = normal(layout.num_tokens, dtype=torch.float32, seed=7) > 1
    got = attention_mass(q, k, layout, queries=queries, impl=IMPL, **options)
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    wanted = attention_mass(q.double(), k.double(), layout, queries=queries, impl="reference", **wide)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-5)
    if "sinks" not in options:
        torch.testing.assert_close(got.sum(1), queries.sum().float().expand(shape.Hq), rtol=1e-3, atol=0)


# -- vendor kernels on request -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-3.1-8B", "Qwen2.5-1.5B"])
@pytest.mark.parametrize(
    ("impl", "module"), [("torch_varlen", "torch.nn.attention.varlen"), ("flash_attn", "flash_attn")]
)
def test_vendor_kernels_agree(impl: str, module: str, name: str):
    pytest.importorskip(module, reason=f"impl={impl!r} needs {module}", exc_type=ImportError)
    layout = SharedPrefixLayout.from_lengths([700, 1, 333, 0, 1000, 128, 511]).to(DEVICE)
    tensors = inputs(layout.num_tokens, SHAPES[name])
    plain, oracle = judge(*tensors, layout)
    for choice in (IMPL, impl):
        # torch's varlen backward is deterministic only where torch is told to be, and refuses our default
        out = pruned_attention(*tensors[:3], layout, impl=choice, deterministic=choice != "torch_varlen")
        gradients = torch.autograd.grad(out, tensors[:3], tensors[3])
        for part, actual in zip(("out", "dq", "dk", "dv"), (out, *gradients)):
            with naming(f"{choice} {part}"):
                assert_close_to_fp64(actual, getattr(plain, part), getattr(oracle, part))


@pytest.mark.parametrize("impl", ["torch_varlen", "flash_attn"])
def test_vendor_kernels_refuse_prefixes(impl: str):
    layout = pack(1).to(DEVICE)
    with pytest.raises(ValueError, match="share prefixes"):
        pruned_attention(*inputs(layout.num_tokens, LLAMA_1B)[:3], layout, impl=impl)
