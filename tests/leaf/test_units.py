"""Text units of two tokenizers: which they are, what a unit's norm is, and that one tokenizer gives its own tokens."""

from __future__ import annotations

import copy
import itertools
import math
import unicodedata

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from leaf.data import Encoder, Row, Sample, Skip, read_rows
from leaf.evaluate import attention_to_flagged
from leaf.export import export
from leaf.pack import build_groups
from leaf.prune import PruneConfig, prune_row
from leaf.score import score_samples
from leaf.select import answer_rows
from leaf.sensitivity import Sensitivity
from leaf.units import Pair, on_units, per_unit, read_pairs, text_units
from leaf.verify import answered_rightly

RECORDS = [
    {"prompt": "Tom has 2 books 🙂👩. The sign says ﬁve.", "completion": "He has 2.\nThe answer is 2", "answer": "2"},
    {"prompt": "How many bolts, ½ of 9?", "completion": "Half.\nThe answer is 9"},
]
TEACHERS = {
    "bytes": lambda: tiny.tokenizer(None, corpus=tiny.CORPUS[:1], vocab_size=300),
    "pieces": tiny.unigram,
}


def samples(encoder: Encoder, level: str = "instruction", records: list = RECORDS) -> list[Sample]:
    made = [s for row in read_rows(records) if isinstance(row, Row) for s in encoder.encode(row, level=level)]
    assert all(isinstance(sample, Sample) for sample in made)
    return made  # type: ignore[return-value]


def pairs(
    encoder: Encoder, teacher: PreTrainedTokenizerFast, level: str = "instruction", records: list = RECORDS
) -> list[Pair]:
    made = list(read_pairs(samples(encoder, level, records), encoder.read_by(teacher)))
    assert all(isinstance(pair, Pair) for pair in made), made
    return made  # type: ignore[return-value]


def cut(length: int, cuts: set[int]) -> list[tuple[int, int]]:
    edges = sorted({0, length, *(c for c in cuts if c < length)})
    return list(itertools.pairwise(edges))


@given(st.integers(1, 12), *[st.sets(st.integers(1, 11))] * 2)
def test_boundaries_are_those_that_both_have(length: int, first: set[int], second: set[int]) -> None:
    assert text_units(cut(length, first), cut(length, second)) == cut(length, first & second)


spans = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 4)).map(lambda s: (s[0], s[0] + s[1])), max_size=8)


@given(spans, spans)
def test_gaps_and_tokens_that_overlap(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    """A unit is a run of characters in which no two neighbours can be told apart without cutting a token."""
    tokens = [range(*span) for span in (*first, *second)]
    expected: list[tuple[int, int]] = []
    for c in range(16):
        if any(c in token for token in tokens):
            together = any(c in token and c - 1 in token for token in tokens)
            expected.append((expected.pop()[0] if together else c, c + 1))
    assert text_units(sorted(first), sorted(second)) == expected


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("level", ["instruction", "response"])
@pytest.mark.parametrize("template", [*tiny.TEMPLATES, None])
def test_two_tokenizers_read_one_text(name: str, level: str, template: str | None) -> None:
    teacher = TEACHERS[name]()
    encoder = Encoder(tiny.tokenizer(template), chat_template=None if template else "none")
    for pair in pairs(encoder, teacher, level):
        text, cut_at, read = pair.student.text, pair.student.prompt_chars, pair.teacher
        assert read.text == text
        assert read.input_ids[-1] == teacher.eos_token_id
        # its own beginning, where it has a habit of one or the template writes the student's
        assert (read.input_ids[0] == teacher.bos_token_id) == (name == "pieces" or template in ("llama3", "gemma"))
        assert read.offsets[-1][1] == len(text)
        assert all(end <= cut_at for _, end in read.offsets[: read.response_start])
        assert all(start >= cut_at for start, _ in read.offsets[read.response_start :])
        for token, (start, end) in zip(teacher.convert_ids_to_tokens(read.input_ids), read.offsets):
            word = token.replace("▁", "").replace("Ġ", "")
            if word.isalnum() and word.isascii():  # what can be compared as it is
                piece = unicodedata.normalize("NFKC", text[start:end]).strip()
                assert piece == word or piece in ("1⁄2", "fi"), (token, text[start:end])
        unit = on_units(pair)
        assert unit.offsets[unit.response_start][0] == cut_at
        for sample in pair:
            for span in (span for span in sample.offsets if span[0] < span[1]):
                assert sum(a <= span[0] and span[1] <= b for a, b in unit.offsets) == 1
                assert sum(a < span[1] and span[0] < b for a, b in unit.offsets) == 1
        of_student = {c for (a, b), s in zip(pair.student.offsets, pair.student.scored) if s for c in range(a, b)}
        of_units = {c for (a, b), s in zip(unit.offsets, unit.scored) if s for c in range(a, b)}
        assert of_units
        assert of_units <= of_student
        assert len(of_student - of_units) <= len("T\n")  # at the edges of what may be scored


def test_an_emoji_is_one_unit_even_of_bytes() -> None:
    pair = pairs(Encoder(tiny.tokenizer()), TEACHERS["bytes"]())[0]
    place = pair.student.text.index("🙂")
    assert sum(a <= place < b for a, b in pair.student.offsets) > 1
    unit = on_units(pair)
    ((start, end, scored),) = [(a, b, s) for (a, b), s in zip(unit.offsets, unit.scored) if a <= place < b]
    assert pair.student.text[start:end].strip() in ("🙂", "🙂👩")
    assert scored


def test_units_without_a_token_of_both_are_not_scored() -> None:
    def reading(offsets: list[tuple[int, int]], scored: list[bool]) -> Sample:
        return Sample("0", "instruction", 0, "abcdefg", 5, [1] * len(offsets), offsets, len(offsets) - 1, scored)

    student = reading([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 7)], [True, True, False, True, True, False])
    teacher = reading([(0, 0), (0, 1), (2, 4), (4, 5), (5, 7)], [False, True, True, True, False])
    unit = on_units(Pair(teacher, student))
    assert unit.offsets == [(0, 1), (1, 2), (2, 4), (4, 5), (5, 7)]
    assert unit.scored == [True, False, False, True, False]  # b: unknown to the teacher; cd: c may not be scored
    assert unit.response_start == 4
    one = Sensitivity(torch.tensor([9.0, 1.0, 3.0, 4.0, 5.0]), 1.0, torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0]))
    of_teacher = per_unit(one, teacher, unit.offsets)
    assert of_teacher.norm.tolist() == [1, 0, 3, 4, 5]  # the token without text is in no unit
    six = Sensitivity(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 1.0, torch.arange(6.0))
    of_student = per_unit(six, student, unit.offsets)
    assert of_student.norm.tolist() == [1, 2, 5, 5, 6]
    assert of_student.nll is not None
    assert of_student.nll.tolist() == [0, 1, 5, 4, 5]


def test_skips() -> None:
    length = len(samples(Encoder(tiny.tokenizer()), records=RECORDS[1:])[0].input_ids)
    short = Encoder(tiny.tokenizer(), max_length=length)
    (skip,) = read_pairs(samples(short, records=RECORDS[1:]), short.read_by(TEACHERS["bytes"]()))
    assert isinstance(skip, Skip)
    assert (skip.id, skip.reason) == ("0", "too_long")
    assert "tokens of the teacher" in skip.detail
    truncated = Encoder(tiny.tokenizer(), max_length=length - 3, truncate="response")
    (pair,) = pairs(truncated, TEACHERS["bytes"](), records=RECORDS[1:])
    assert pair.student.text.endswith("The answer")
    assert pair.teacher.offsets[-1][1] == len(pair.student.text)  # the same text, whatever its length, and no end
    assert pair.teacher.input_ids[-1] != truncated.read_by(TEACHERS["bytes"]()).tokenizer.eos_token_id

    encoder = Encoder(tiny.tokenizer(None), chat_template="none")
    (row,) = read_rows([{"prompt": "中国", "completion": "2"}], protect=["国"])
    (sample,) = encoder.encode(row)  # type: ignore[arg-type]
    (joined,) = read_pairs([sample], encoder.read_by(tiny.unigram()))
    assert joined == Skip("0", "no_common_unit", "no text unit of both tokenizers may be scored as a whole")
    for prompt in ("中国", "Tom 中 Eva"):  # what follows an unknown character is misplaced
        (unread,) = read_pairs(
            samples(encoder, records=[{"prompt": prompt, "completion": "2"}]), encoder.read_by(tiny.ascii_only())
        )
        assert isinstance(unread, Skip)
        assert unread.reason == "unread"
        assert "leaves out characters" in unread.detail
    assert pairs(encoder, tiny.ascii_only(), records=[{"prompt": "Tom Eva", "completion": "2"}])
    gone = Skip("x", "too_long")
    assert list(read_pairs([gone], encoder.read_by(tiny.unigram()))) == [gone]


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("level", ["instruction", "response"])
def test_norms_are_those_of_the_gradients_together(name: str, level: str) -> None:
    encoder = Encoder(tiny.tokenizer())
    tokenizers = {"teacher": TEACHERS[name](), "student": encoder.tokenizer}
    models = {role: tiny.model(t, seed=n, hidden=8 + 8 * n).double() for n, (role, t) in enumerate(tokenizers.items())}
    reader = encoder.read_by(tokenizers["teacher"])
    texts = samples(encoder, level)
    rows = list(
        score_samples(texts, *(lambda m=m: m for m in models.values()), max_tokens=200, perplexity=True, reader=reader)
    )
    assert [row["status"] for row in rows] == ["ok"] * len(texts)
    for model in models.values():
        model.set_attn_implementation("eager")
    for row, pair in zip(rows, read_pairs(texts, reader)):
        assert isinstance(pair, Pair)
        assert row["input_ids"] is None
        assert row["text"] == pair.student.text
        normalised = []
        for role, sample in zip(("teacher", "student"), pair):
            embedded = models[role].get_input_embeddings()(torch.tensor(sample.input_ids)).detach().requires_grad_()
            logits = models[role](inputs_embeds=embedded[None], use_cache=False).logits[0]
            nll = F.cross_entropy(logits[:-1], torch.tensor(sample.input_ids[1:]), reduction="none")
            loss = nll[sample.response_start - 1 :].mean()
            (gradient,) = torch.autograd.grad(loss, embedded)
            assert row[f"{role}_loss"] == pytest.approx(loss.item(), rel=1e-5)
            values = []
            for (start, end), scored, norm, of_unit in zip(
                row["offsets"], row["scored"], row[f"{role}_norm"], row["student_nll"], strict=True
            ):
                assert (norm is None) == (not scored)
                own = [i for i, (a, b) in enumerate(sample.offsets) if a < b and start <= a and b <= end]
                if scored:
                    values.append(gradient[own].flatten().norm())
                    assert norm == pytest.approx(values[-1].item(), rel=1e-5)
                if scored and role == "student":
                    assert of_unit == pytest.approx(sum(nll[i - 1].item() for i in own), rel=1e-4)
            stacked = torch.stack(values)
            normalised.append((stacked - stacked.min()) / (stacked.max() - stacked.min()))
        difference = normalised[0] - normalised[1]
        expected = (difference - difference.min()) / (difference.max() - difference.min())
        actual = torch.tensor([x for x in row["score"] if x is not None], dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("template", ["chatml", "llama3", None])
def test_units_of_one_tokenizer_are_its_tokens(template: str | None) -> None:
    encoder = Encoder(tiny.tokenizer(template), chat_template=None if template else "none")
    models = [tiny.model(encoder.tokenizer, seed=seed, hidden=8, layers=1) for seed in (1, 0)]
    records = [{**record, "prompt": record["prompt"].encode("ascii", "ignore").decode()} for record in RECORDS]
    texts = [
        *samples(encoder, "instruction", records),
        *samples(encoder, "response", records),
    ]  # no characters of several tokens: they would be one unit
    tables = [
        list(score_samples(texts, *(lambda m=m: m for m in models), max_tokens=99, perplexity=True, reader=reader))
        for reader in (None, encoder.read_by(copy.deepcopy(encoder.tokenizer)))
    ]
    assert all(row["input_ids"] for row in tables[0])
    assert tables[1] == [{**row, "input_ids": None} for row in tables[0]]
    assert any(0 < score < 1 for row in tables[1] for score in row["score"] if score is not None)


def scored_rows() -> tuple[list, list[dict], list[dict]]:
    encoder = Encoder(tiny.tokenizer())
    teacher = TEACHERS["pieces"]()
    models = [tiny.model(teacher, seed=1), tiny.model(encoder.tokenizer)]
    texts = [*samples(encoder), *samples(encoder, "response")]
    load = [lambda m=m: m for m in models]
    scores = list(score_samples(texts, *load, max_tokens=500, reader=encoder.read_by(teacher)))
    pruned = [prune_row(row, PruneConfig(q=0.3)) for row in scores]
    return list(read_rows(RECORDS)), scores, [row for rows in pruned if isinstance(rows, list) for row in rows]


def test_what_reads_the_rows_of_units(tmp_path) -> None:
    rows, scores, pruned = scored_rows()
    assert {row["level"] for row in pruned} == {"instruction", "response"}
    for row in pruned:
        (source,) = [
            s for s in scores if [s[k] for k in ("id", "level", "cut")] == [row["source_id"], row["level"], row["cut"]]
        ]
        edges = {edge for span in source["offsets"] for edge in span}
        assert {edge for span in row["removed"] for edge in span} <= edges
    written = export(tmp_path, "released", rows, scores, pruned)
    assert written["scores.json"] == 2
    assert written["pruned.jsonl"] > 0
    assert export(tmp_path, "trl", rows, scores, pruned)["train.jsonl"] == 2 + len(pruned)
    with pytest.raises(ValueError, match="row '0' has scores but no input_ids: its teacher and student have different"):
        build_groups(scores, pruned, Encoder(tiny.tokenizer()).encode_text)
    with pytest.raises(ValueError, match="row '0' has scores but no input_ids"):
        list(attention_to_flagged(tiny.model(tiny.tokenizer()), scores, PruneConfig(q=0.3)))


def test_what_another_tokenizer_is_asked_and_what_counts_as_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import leaf.generate

    asked: list[str] = []

    def said(model, tokenizer, prompts, *, stop, **options):
        for prompt in prompts:
            assert tokenizer is reader.tokenizer
            assert stop == tokenizer.eos_token_id
            asked.append(prompt)
            yield prompt, "2<|im_end|>\n<|im_start|>user\n3"

    monkeypatch.setattr(leaf.generate, "generate", said)
    encoder = Encoder(tiny.tokenizer("llama3"))
    reader = encoder.read_by(tiny.unigram())
    (row, _) = read_rows(RECORDS)
    ask = leaf.generate.asker(lambda: None, reader)
    (answer,) = answer_rows(ask, reader, [row], grader="exact")  # type: ignore[list-item]
    assert (answer.response, answer.right) == ("2", True)  # type: ignore[union-attr]
    prompt = samples(encoder)[0].text[: samples(encoder)[0].prompt_chars]
    assert prompt.startswith("<|bos|>")
    assert asked == [prompt.replace("<|bos|>", "<s>")]
    ids = reader.tokenizer(asked[0], add_special_tokens=False)["input_ids"]
    read = reader.read(samples(encoder)[0])
    assert isinstance(read, Sample)
    assert read.input_ids[: read.response_start] == ids  # scoring and generation see the same prompt
    assert read.offsets[0] == (0, len("<|bos|>"))
    counterfactual = {"source_id": "0", "prompt": prompt}
    assert list(answered_rightly(ask, [counterfactual], {"0": "2"}, grader="exact")) == [True]
    assert asked[1] == asked[0]
    assert encoder.as_read(prompt) == prompt
    assert encoder.response_of("2<|im_end|>3") == "2<|im_end|>3"  # the student's own is a token, and stops it
    assert reader.fingerprint["rendered_by"] == encoder.fingerprint["tokenizer"] != reader.fingerprint["tokenizer"]
    assert "rendered_by" not in encoder.fingerprint


def test_only_fast_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = copy.copy(tiny.unigram())
    monkeypatch.setattr(type(slow), "is_fast", property(lambda self: self is not slow))
    with pytest.raises(ValueError, match="is a slow tokenizer without character offsets"):
        Encoder(tiny.tokenizer()).read_by(slow)


def test_a_norm_too_small_or_large_to_be_squared() -> None:
    pair = pairs(Encoder(tiny.tokenizer()), TEACHERS["bytes"]())[0]
    units = on_units(pair).offsets
    for size in (1e-30, 1e30):
        norm = torch.full((len(pair.student.offsets),), size)
        joined = per_unit(Sensitivity(norm, 1.0, None), pair.student, units).norm
        assert all(math.isfinite(n) and n >= 0.99 * size for n in joined.tolist())
