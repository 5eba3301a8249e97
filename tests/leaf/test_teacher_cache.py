"""Teacher caches: what is read is what the teacher says, through kills, damage and full disks."""

from __future__ import annotations

import errno
import os
import pathlib
import pickle
import re
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import tiny
import torch
from accelerate import dispatch_model
from distributed import on_ranks
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from leaf import run, tables, teacher_build
from leaf.config import RunConfig
from leaf.run import Run
from leaf.tables import open_table
from leaf.teacher import NotCached, TeacherCache
from leaf.teacher_build import Teacher, build_cache, distinct, topk

T = TypeVar("T")
K, TEMPERATURE = 5, 2.0


class Killed(BaseException):
    """As `kill -9`: nothing handles it."""


class Said(list[str]):
    """A `leaf.run.Ui` that remembers the messages."""

    def say(self, message: str) -> None:
        self.append(message)

    def track(self, items: Iterable[T], total: int, description: str, tokens: object = None) -> Iterator[T]:
        return iter(items)


class Exact(Run):
    """Teachers in fp64."""

    dtype = "float64"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run, teacher_build):  # half the time of a tiny build
        monkeypatch.setattr(module, "free_memory", lambda: None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.tokenizer()
    for role, arch in (("teacher", "gemma2"), ("student", "llama")):
        tiny.model(tokenizer, arch=arch, hidden=16, final_logit_softcapping=3.0).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return folder


def config(pair: pathlib.Path, output: pathlib.Path, mode: str = "hidden", **options: Any) -> RunConfig:
    options = {"max_tokens": 30, "cache_topk": K, "temperature": TEMPERATURE, "device": "cpu", **options}
    models = {role: str(pair / role) for role in ("teacher", "student")}
    return RunConfig(**models, output=str(output), teacher_mode=f"cached_{mode}", **options)  # type: ignore[arg-type]


def groups(n: int = 9) -> list[dict[str, Any]]:
    """Of different sizes, with 0 to 2 counterfactuals; one without its original; sequences and groups that repeat."""
    random = torch.Generator().manual_seed(0)
    result: list[dict[str, Any]] = []
    for i in range(n):
        prompt, response = (
            torch.randint(4, 300, (size,), generator=random).tolist() for size in (5 + i % 4, 3 + i % 3)
        )
        original = {"input_ids": prompt + response, "response_start": len(prompt)}
        counterfactuals = [
            {"input_ids": prompt[:c] + prompt[c + 1 :] + response, "response_start": len(prompt) - 1}
            for c in range(1, 1 + i % 3)
        ]
        result.append({"id": str(i), "original": original, "counterfactuals": counterfactuals})
    result[2]["original"] = None
    repeated = {**result[1]["original"], "response_start": result[1]["original"]["response_start"] + 1}
    result.append({"id": "again", "original": repeated, "counterfactuals": result[5]["counterfactuals"]})
    return result


def members(of: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m for group in of for m in (group["original"], *group["counterfactuals"]) if m]


def build(
    pair: pathlib.Path,
    output: pathlib.Path,
    of: Sequence[dict[str, Any]] | None = None,
    kind: type[Run] = Run,
    **options: Any,
) -> tuple[TeacherCache, Said]:
    said = Said()
    build_cache(kind(config(pair, output, **options), said), groups() if of is None else of)
    return TeacherCache(output / "cache"), said


def everything(cache: TeacherCache) -> list[dict[str, torch.Tensor]]:
    return [cache.read(m["input_ids"], m["response_start"]) for m in members(groups())]


def assert_same(cache: TeacherCache, other: TeacherCache) -> None:
    """But for the rounding of products of other sizes."""
    assert len(cache) == len(other)
    for one, two in zip(everything(cache), everything(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def data_files(output: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in (output / "cache").glob("*.safetensors") if "head" not in path.name)


# -- What is read ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(pair: pathlib.Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        pair / "teacher", dtype=torch.float64, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def test_hidden_states_are_those_of_separate_sequences(
    tmp_path: pathlib.Path, pair: pathlib.Path, teacher: Any
) -> None:
    cache, said = build(pair, tmp_path, kind=Exact)
    assert (cache.kind, cache.temperature, cache.vocab_size) == ("hidden", None, teacher.config.vocab_size)
    head = cache.head
    assert head is not None
    assert (head.bias, head.softcap, head.logit_scale) == (None, 3.0, 1.0)
    for member in members(groups()):
        ids, start = torch.tensor(member["input_ids"]), member["response_start"]
        whole = teacher.model(ids[None]).last_hidden_state[0]
        read = cache.read(ids if start % 2 else member["input_ids"], start)
        assert set(read) == {"teacher_hidden"}
        torch.testing.assert_close(read["teacher_hidden"], whole[start - 1 : -1], rtol=1e-6, atol=1e-6)
        logits = 3 * torch.tanh(read["teacher_hidden"] @ head.weight.T / 3)
        torch.testing.assert_close(logits, teacher(ids[None]).logits[0, start - 1 : -1], rtol=1e-6, atol=1e-6)
    assert len(cache) == len({tuple(m["input_ids"]) for m in members(groups())})
    rows = sum(member.rows for group in distinct(groups()) for member in group)
    assert cache.head is not None
    assert open_table(tmp_path / "cache").counts == {"sequences": len(cache), "rows": rows, "bytes": rows * 16 * 8}
    sizes = (
        rf"cache: {len(cache)} sequences, {rows} response tokens, 0\.1 MiB of hidden states to \S+cache \([\d.,]+ GiB"
    )
    assert re.match(sizes, said[0]), said[0]


@torch.no_grad()
@pytest.mark.parametrize("logits_at_once", [1, 10**9])
def test_topk_is_that_of_the_whole_softmax(
    tmp_path: pathlib.Path, pair: pathlib.Path, teacher: Any, monkeypatch: pytest.MonkeyPatch, logits_at_once: int
) -> None:
    monkeypatch.setattr(teacher_build, "LOGITS", logits_at_once)
    monkeypatch.setattr(teacher_build, "COLUMNS", 64)
    cache, said = build(pair, tmp_path, kind=Exact, mode="topk")
    shared = max(tiny.tokenizer().get_vocab().values()) + 1
    assert (cache.kind, cache.head, cache.temperature, cache.vocab_size) == ("topk", None, TEMPERATURE, shared)
    covered = []
    for member in members(groups()):
        ids, start = torch.tensor(member["input_ids"]), member["response_start"]
        logits = teacher(ids[None]).logits[0, start - 1 : -1, :shared]
        expected = (logits / TEMPERATURE).log_softmax(-1).topk(K)
        read = cache.read(ids, start)
        assert (read["topk_ids"].dtype, read["topk_logprobs"].dtype) == (torch.int64, torch.float32)
        assert torch.equal(read["topk_ids"], expected.indices)
        torch.testing.assert_close(read["topk_logprobs"], expected.values.float(), rtol=1e-5, atol=1e-6)
    for group in distinct(groups()):
        for member in group:
            covered.append(cache.read(member.input_ids, member.response_start)["topk_logprobs"].exp().sum(1))
    mean, least = torch.cat(covered).mean(), torch.cat(covered).min()
    assert said[-1].startswith(f"cache: the {K} most probable of {shared} tokens hold {mean:.4f} of the teacher's")
    assert f"{least:.4f} where" in said[-1]


def test_topk_of_a_head_with_bias_scale_and_padding() -> None:
    random = torch.Generator().manual_seed(0)
    weight, bias, hidden = (torch.randn(size, generator=random).bfloat16() for size in ((40, 8), (40,), (7, 8)))
    bias[33:] = 100  # padded columns, which the softmax must not see
    found = topk(hidden, teacher_build.Head(weight, bias, None, 0.5), 4, 33, 1.5)
    logits = (hidden.double() @ weight.double().T + bias.double())[:, :33] * 0.5 / 1.5
    expected = logits.log_softmax(-1).topk(4)
    assert torch.equal(found["ids"].long(), expected.indices)
    torch.testing.assert_close(found["logprobs"].double(), expected.values, rtol=1e-5, atol=1e-6)


def test_an_entry_is_in_the_teachers_dtype(tmp_path: pathlib.Path, pair: pathlib.Path) -> None:
    cache, _ = build(pair, tmp_path, dtype="bfloat16")
    member = members(groups())[0]
    assert cache.read(member["input_ids"], member["response_start"])["teacher_hidden"].dtype == torch.bfloat16
    assert cache.head is not None
    assert cache.head.weight.dtype == torch.bfloat16


def test_a_later_start_is_a_slice_and_an_earlier_one_is_missing(tmp_path: pathlib.Path, pair: pathlib.Path) -> None:
    cache, _ = build(pair, tmp_path)
    ids, start = members(groups())[0].values()
    whole = cache.read(ids, start)["teacher_hidden"]
    assert torch.equal(cache.read(ids, start + 1)["teacher_hidden"], whole[1:])
    with pytest.raises(
        NotCached, match=rf"from token {start} on, not from {start - 1}: run `leaf cache --output {tmp_path}`"
    ):
        cache.read(ids, start - 1)
    with pytest.raises(
        NotCached, match=rf"{tmp_path}/cache holds nothing for a sequence of {len(ids) - 1} tokens.*`leaf cache"
    ):
        cache.read(ids[1:], start)
    assert issubclass(NotCached, LookupError)
    for bad in (0, len(ids)):
        with pytest.raises(ValueError, match="response_start must lie in"):
            cache.read(ids, bad)


def test_what_is_read_can_be_written_to(tmp_path: pathlib.Path, pair: pathlib.Path) -> None:
    cache, _ = build(pair, tmp_path)
    first = everything(cache)
    for read in everything(cache):
        read["teacher_hidden"].zero_()
    assert all(torch.equal(a["teacher_hidden"], b["teacher_hidden"]) for a, b in zip(first, everything(cache)))


@pytest.mark.parametrize("mode", ["hidden", "topk"])
def test_order_and_packs_change_nothing(tmp_path: pathlib.Path, pair: pathlib.Path, mode: str) -> None:
    one, _ = build(pair, tmp_path / "a", mode=mode)
    other, _ = build(pair, tmp_path / "b", groups()[::-1], mode=mode, max_tokens=10**4)
    assert_same(one, other)
    _, said = build(pair, tmp_path / "a", groups()[::-1], mode=mode, max_tokens=1)
    assert said[0] == "cache: unchanged"


def test_a_pack_that_does_not_fit_is_halved(
    tmp_path: pathlib.Path, pair: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = build(pair, tmp_path / "a")
    forward, most = teacher_build.hidden_states, 20

    def small(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if inputs["input_ids"].numel() > most:  # as an allocator does, but for tokens
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(model, inputs)

    monkeypatch.setattr(teacher_build, "hidden_states", small)
    cut, _ = build(pair, tmp_path / "b", max_tokens=40)
    assert_same(cut, whole)
    most = 7  # the shortest has 8
    with pytest.raises(MemoryError, match=r"sequences of 8 tokens do not fit .* smaller --max-tokens"):
        build(pair, tmp_path / "c")


def test_a_teacher_with_accelerates_hooks(pair: pathlib.Path) -> None:
    """As `--device-map` leaves it; layers can be offloaded."""
    pack = distinct(groups())[:4]
    where = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    loaded = [AutoModelForCausalLM.from_pretrained(pair / "teacher") for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        hooked = dispatch_model(loaded[0], {**where, "lm_head": "cpu"}, offload_dir=folder, force_hooks=True)
        assert hooked.model.layers[0].mlp.up_proj.weight.is_meta
        for key in ({"kind": "hidden"}, {"kind": "topk", "k": 3, "vocab_size": 300, "temperature": 1.0}):
            said, expected = (Teacher(model, {"dtype": "float32", **key})(pack) for model in (hooked, loaded[1]))
            for (member, one), (_, other) in zip(said, expected, strict=True):
                assert len(next(iter(one.values()))) == member.rows
                torch.testing.assert_close(one, other)


def test_hidden_states_that_are_not_finite_are_refused(tmp_path: pathlib.Path, pair: pathlib.Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(pair / "teacher")
    teacher.model.norm.weight.data[3] = 1e6
    shutil.copytree(pair, tmp_path / "pair")
    teacher.save_pretrained(tmp_path / "pair" / "teacher")
    with pytest.raises(ArithmeticError, match=r"infinite or NaN in float16: give another --dtype \(bfloat16\)"):
        build(tmp_path / "pair", tmp_path, dtype="float16")


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_readers_in_workers(tmp_path: pathlib.Path, pair: pathlib.Path, context: str) -> None:
    cache, _ = build(pair, tmp_path)
    assert cache.head is not None
    items = members(groups())
    expected = everything(cache)  # files are open, the head is read
    copy = pickle.dumps(cache)
    assert len(copy) < cache.head.weight.nbytes, "without the head"
    loader = DataLoader(_Read(cache, items), batch_size=None, num_workers=2, multiprocessing_context=context)
    for one, other in zip(loader, expected, strict=True):
        assert torch.equal(one["teacher_hidden"], other["teacher_hidden"])


class _Read(torch.utils.data.Dataset):
    def __init__(self, cache: TeacherCache, items: list[dict[str, Any]]):
        self.cache, self.items = cache, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        return self.cache.read(**self.items[n])


# -- What becomes of a build -------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Packs that the teacher runs."""
    calls: list[int] = []
    forward = teacher_build.Teacher.__call__

    def call(self: Any, pack: Any) -> Any:
        calls.append(len(pack))
        return forward(self, pack)

    monkeypatch.setattr(teacher_build.Teacher, "__call__", call)
    return calls


def test_a_build_that_is_killed_goes_on(
    tmp_path: pathlib.Path, pair: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    whole, _ = build(pair, tmp_path / "whole")
    packs = len(calls)
    assert packs > 4
    write, written = teacher_build.write_bytes, 0

    def until_killed(path: pathlib.Path, content: bytes) -> None:
        nonlocal written
        written += 1
        if written == 4:  # the head, two packs, and the third
            path.with_name(f"{path.name}.tmp").write_bytes(content[:100])
            raise Killed
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_build, "write_bytes", until_killed)
        with pytest.raises(Killed):
            build(pair, tmp_path / "run")
    with pytest.raises(ValueError, match="cache is unfinished: run `leaf cache` again"):
        TeacherCache(tmp_path / "run" / "cache")
    calls.clear()
    resumed, said = build(pair, tmp_path / "run")
    assert len(calls) == packs - 2
    assert any("of it missing" in line for line in said)
    assert_same(resumed, whole)
    assert [f.name for f in data_files(tmp_path / "run")] == [f.name for f in data_files(tmp_path / "whole")]
    assert not list((tmp_path / "run" / "cache").glob("*.tmp"))
    calls.clear()
    _, said = build(pair, tmp_path / "run")
    assert (calls, list(said)) == ([], ["cache: unchanged"])


@pytest.mark.parametrize(("part", "damage"), [("data", "flip"), ("data", "cut"), ("head", "flip"), ("head", "remove")])
def test_damage_is_seen_and_mended(
    tmp_path: pathlib.Path, pair: pathlib.Path, monkeypatch: pytest.MonkeyPatch, damage: str, part: str
) -> None:
    whole, _ = build(pair, tmp_path)
    before = everything(whole)
    file = data_files(tmp_path)[2] if part == "data" else next((tmp_path / "cache").glob("*-head.safetensors"))
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.unlink()  # a mapped file keeps its content
    if damage != "remove":
        file.write_bytes(content if damage == "flip" else content[:-5])
    damaged = TeacherCache(tmp_path / "cache")
    with pytest.raises(
        ValueError, match=rf"{file.name} is damaged or missing: run `leaf cache --output {tmp_path}` again"
    ):
        _ = damaged.head if part == "head" else everything(damaged)
    calls = counted(monkeypatch)
    mended, said = build(pair, tmp_path)
    assert f"cache: {file.name} is damaged or missing, computed again" in said
    assert len(calls) == 1, "the first pack shares its shard of the table with the head"
    assert [torch.equal(a["teacher_hidden"], b["teacher_hidden"]) for a, b in zip(everything(mended), before)]
    assert mended.head is not None


def test_a_byte_of_any_column_is_noticed(tmp_path: pathlib.Path, pair: pathlib.Path) -> None:
    """Every byte of a file: the header, and all tensors."""
    build(pair, tmp_path, groups()[:1], mode="topk")
    ids, start = members(groups())[0].values()
    (file,) = data_files(tmp_path)
    content = file.read_bytes()
    for n in range(8, len(content)):
        file.unlink()
        file.write_bytes(content[:n] + bytes([content[n] ^ 64]) + content[n + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            TeacherCache(tmp_path / "cache").read(ids, start)


def test_another_teacher_or_other_sequences(tmp_path: pathlib.Path, pair: pathlib.Path) -> None:
    build(pair, tmp_path, groups()[:5])
    first = {file.name for file in (tmp_path / "cache").iterdir()}
    cache, said = build(pair, tmp_path)
    assert "cache: computed again, because sequences changed" in said
    assert not {f.name for f in data_files(tmp_path)} & first, "the cache before is gone"
    everything(cache)
    _, said = build(pair, tmp_path, mode="topk")
    assert any(line.startswith("cache: computed again, because kind") for line in said)
    _, said = build(pair, tmp_path, mode="topk", temperature=1.0)
    assert "cache: computed again, because temperature (2.0 -> 1.0) changed" in said
    assert not list((tmp_path / "cache").glob("*-head*"))


def test_no_room(tmp_path: pathlib.Path, pair: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=teacher_build.MARGIN + 2000)
    monkeypatch.setattr(teacher_build.shutil, "disk_usage", lambda _: usage)
    calls = counted(monkeypatch)
    small = r"needs 0\.\d MiB in \S+, where 64\.0 MiB are free: .* or --teacher-mode cached_topk --cache-topk 5 \(0\.0 MiB\)"
    with pytest.raises(ValueError, match=small):
        build(pair, tmp_path)
    with pytest.raises(ValueError, match="or a smaller --cache-topk than 50"):
        build(pair, tmp_path, mode="topk", cache_topk=50)
    assert (calls, data_files(tmp_path)) == ([], [])
    build(pair, tmp_path, mode="topk", cache_topk=2)
    assert calls


def test_a_disk_that_is_full_after_all(
    tmp_path: pathlib.Path, pair: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    synced = os.fsync
    left = 4

    def full(file: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(file)

    with monkeypatch.context() as patch:
        patch.setattr(tables.os, "fsync", full)
        with pytest.raises(
            OSError, match=r"the disk is full .* `leaf cache` again, which goes on, or give --teacher-mode cached_topk"
        ):
            build(pair, tmp_path)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    first = len(calls)
    assert first >= 1
    resumed, _ = build(pair, tmp_path)
    again = len(calls) - first
    whole, _ = build(pair, tmp_path / "whole")
    packs = len(calls) - first - again
    assert 0 < again < packs, "what was there stays"
    assert_same(resumed, whole)


def test_k_beyond_the_vocabulary_and_nothing_to_cache(tmp_path: pathlib.Path, pair: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"cache_topk must be at most \d+, the vocabulary of both models, got 9999"):
        build(pair, tmp_path, mode="topk", cache_topk=9999)
    with pytest.raises(ValueError, match="nothing to cache"):
        build(pair, tmp_path, [])


def test_another_folder(tmp_path: pathlib.Path, pair: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds no table: run `leaf cache` first"):
        TeacherCache(tmp_path / "cache")


# -- Several processes -------------------------------------------------------------------------------------------------


def on_a_rank(pair: pathlib.Path, output: pathlib.Path, options: dict[str, Any], victims: tuple[int, ...]) -> int:
    """Builds on this rank, and returns its packs; a victim is gone after its first file."""
    signal.alarm(300)  # ranks that wait for each other are killed
    calls: list[int] = []
    forward, write = teacher_build.Teacher.__call__, teacher_build.write_bytes

    def call(self: Any, pack: Any) -> Any:
        calls.append(sum(len(member.input_ids) for group in pack for member in group))
        return forward(self, pack)

    def and_die(path: pathlib.Path, content: bytes) -> None:
        write(path, content)
        if int(os.environ["RANK"]) in victims and "head" not in path.name:
            os.kill(os.getpid(), signal.SIGKILL)

    teacher_build.Teacher.__call__, teacher_build.write_bytes = call, and_die  # type: ignore[method-assign]
    build(pair, output, **options)
    return sum(tokens > 2 for tokens in calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "victims"),
    [({}, (1,)), ({"mode": "topk"}, (0, 1)), ({"shard_teacher": True}, (1,))],
    ids=["one rank dies", "both die", "sharded"],
)
def test_two_ranks_build_one_cache_through_a_kill(
    tmp_path: pathlib.Path,
    pair: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    victims: tuple[int, ...],
) -> None:
    calls = counted(monkeypatch)
    whole, _ = build(pair, tmp_path / "whole", mode=options.get("mode", "hidden"))
    with pytest.raises(Exception, match="SIGKILL"):
        on_ranks(on_a_rank, pair, tmp_path / "run", options, victims)
    on_disk = len(list((tmp_path / "run" / "cache").glob("part-*.parquet")))
    done = on_ranks(on_a_rank, pair, tmp_path / "run", options, ())
    assert all(done[rank] > 0 for rank in victims), "the other one may have been through when it was stopped"
    assert len(calls) - on_disk <= sum(done) <= len(calls), "what was in the table is not computed again"
    assert_same(TeacherCache(tmp_path / "run" / "cache"), whole)
    file = data_files(tmp_path / "run")[1]
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert sum(on_ranks(on_a_rank, pair, tmp_path / "run", options, ())) == 1, "mended by the rank whose it is"
    assert_same(TeacherCache(tmp_path / "run" / "cache"), whole)
