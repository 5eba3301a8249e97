"""Reading rows of every format; rendering and tokenizing them without losing a character."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf.data import Encoder, Row, Sample, Skip, check_pair, read_rows


def scored_text(row: Row) -> list[str]:
    return [row.messages[m]["content"][a:b] for m, a, b in row.scored]


def one(record: dict, **options) -> Row:
    (row,) = read_rows([record], **options)
    assert isinstance(row, Row)
    return row


# -- reading ---------------------------------------------------------------------------------------------------------

FORMATS = {
    "authors": ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["Add.", "1 2"], "3"),
    "authors_step": ({"instruction": "Add.", "step_response": "First.\n", "output": "3"}, ["Add."], "First.\n3"),
    "completion": ({"prompt": "Add.", "completion": "3"}, ["Add."], "3"),
    "completion_messages": (
        {
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Add."}],
            "completion": [{"role": "assistant", "content": "3"}],
        },
        ["Add."],
        "3",
    ),
    "messages": (
        {
            "messages": [
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "Two?"},
                {"role": "assistant", "content": "2"},
            ]
        },
        ["One?", "Two?"],
        "2",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    record, scored, response = FORMATS[name]
    row = one(record)
    assert scored_text(row) == scored
    assert row.messages[-1] == {"role": "assistant", "content": response}
    assert row.record == record


def test_code_rows_have_no_response() -> None:
    record = {"id": "c1", "context_messages": [[{"role": "user", "content": "Sort."}]], "tests": ["assert 1"]}
    with pytest.raises(ValueError, match=r"row 0: no response .*'id', 'context_messages', 'tests'"):
        one(record)
    row = one(record, responses="teacher", answer_column="tests")
    assert (row.id, scored_text(row), row.answer) == ("c1", ["Sort."], '["assert 1"]')


def test_named_columns_template_and_protect() -> None:
    record = {"question": "Tom has $2$ books.", "answer": "So\n#### 2"}
    row = one(record, prompt_column="question", response_column="answer")
    assert (scored_text(row), row.answer) == (["Tom has $2$ books."], "So\n#### 2")
    template = "Q: {question}\nReason, and answer within \\boxed{}."
    row = one(record, prompt_template=template, response_column="answer", protect=[r"\$.*?\$"], system="Be brief.")
    assert row.messages[0] == {"role": "system", "content": "Be brief."}
    assert row.messages[1]["content"] == "Q: Tom has $2$ books.\nReason, and answer within \\boxed{}."
    assert scored_text(row) == ["Tom has ", " books."]


def test_answers() -> None:
    base = {"instruction": "a", "output": "b"}
    assert one({**base, "prompt_answer": "1", "answer": "2"}).answer == "1"
    assert one({**base, "answer": 3}).answer == "3"
    assert one({**base, "answer": ""}).answer is None
    assert one({**base, "gold": ["x", "y"]}, answer_column="gold").answer == '["x", "y"]'


def test_files_agree(tmp_path) -> None:
    records = [{"instruction": f"Frage {n} 🙂 日本", "output": str(n), "answer": str(n)} for n in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n", encoding="utf-8-sig"
    )
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    read = [list(read_rows(tmp_path / name)) for name in ("a.json", "a.jsonl", "a.parquet")]
    assert read[0] == read[1] == read[2] == list(read_rows(records))
    assert [row.id for row in read[0]] == ["0", "1", "2", "3", "4"]
    assert list(read_rows(records, limit=2)) == read[0][:2]


def test_dataset_names(tmp_path, monkeypatch) -> None:
    asked: list[tuple] = []

    def load_dataset(*names: str, split: str) -> list[dict]:
        asked.append((*names, split))
        return [{"instruction": "a", "output": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in ("openai/gsm8k:main:test", "some/rows:test", "some/rows", tmp_path):
        assert len(list(read_rows(name))) == 1
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("some/rows", "test"),
        ("some/rows", "train"),
        (str(tmp_path), "train"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows in it"),
        ("[]", "no rows in it"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": \n', "line 2 is not valid JSON"),
        ("[1, 2", "not a valid JSON list"),
        ('{"instruction": "a", "output": "b"}\n3\n', "line 2: a row must be an object"),
        ('{"instruction": "a", "output": "b"}\n{"text": "a"}\n', "line 2: no prompt .*the row has 'text'"),
        ('{"instruction": 5, "output": "b"}', "field 'instruction' must be text, got int"),
        ('{"messages": ["a"]}', "list of messages"),
    ],
)
def test_bad_files(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(path))


def test_bad_options(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(read_rows(tmp_path / "none.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(read_rows(tmp_path / "binary.jsonl"))
    row = [{"instruction": "a", "output": "b"}]
    for options, message in [
        ({"prompt_template": "no column"}, "must name a column"),
        ({"prompt_template": "{question}"}, "field 'question' .*the row has 'instruction', 'output'"),
        ({"response_column": "gold"}, "no field 'gold'"),
        ({"answer_column": "gold"}, "no field 'gold'"),
        ({"protect": ["("]}, "not a regular expression"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(read_rows(row, **options))


def test_empty_texts_are_skipped_and_repeated_ids_made_unique(caplog) -> None:
    records = [
        {"id": "a", "instruction": "x", "output": " "},
        {"id": "a", "instruction": "x", "output": "y"},
        {"id": "a", "instruction": "  ", "output": "y"},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    rows = list(read_rows(records))
    assert [(r.id, getattr(r, "reason", None)) for r in rows] == [
        ("a", "empty_response"),
        ("a#2", None),
        ("a#3", "empty_prompt"),
        ("3", "empty_response"),
    ]
    assert "2 rows repeat the id" in caplog.text


# -- rendering and tokenizing ----------------------------------------------------------------------------------------

QUESTION = "  Tom has 2 books 🙂, the sign says 9. 本が何冊？ "
RESPONSE = "2 plus 7 equals 9.\n\nThe answer is 9.\n#### 9"


def encoded(template: str | None, response: str = RESPONSE, system: str | None = None, **options) -> Sample:
    encoder = Encoder(tiny.tokenizer(template), **options)
    (sample,) = encoder.encode(one({"prompt": QUESTION, "completion": response}, system=system))
    assert isinstance(sample, Sample), sample
    return sample


@pytest.mark.parametrize("template", [*tiny.TEMPLATES, None])
def test_sample_of_every_template(template: str | None) -> None:
    tokenizer = tiny.tokenizer(template)
    sample = encoded(template, chat_template=None if template else "none")
    assert sample.text[sample.prompt_chars :] == RESPONSE + "<|im_end|>"  # nothing after the end of turn
    assert tokenizer.decode(sample.input_ids) == sample.text
    assert sample.input_ids[-1] == tokenizer.eos_token_id
    assert sample.offsets[sample.response_start][0] == sample.prompt_chars
    scored = {i for (a, b), s in zip(sample.offsets, sample.scored) if s for i in range(a, b)}
    assert "".join(sample.text[i] for i in sorted(scored)).strip() == QUESTION.strip()
    assert not any(sample.scored[sample.response_start :])
    if template:  # generation starts from the same text, the thinking block aside
        chat = [{"role": "user", "content": QUESTION}]
        asked = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
        )
        thinking = "<think>\n\n</think>\n\n" if template == "thinking" else ""
        assert sample.text[: sample.prompt_chars] == asked + thinking


def test_content_that_also_occurs_in_the_template_is_not_mistaken() -> None:
    encoder = Encoder(tiny.tokenizer("chatml"))
    row = one({"prompt": "user", "completion": "assistant"}, system="user")
    rendered = encoder.render(row)
    assert not isinstance(rendered, Skip)
    ((start, end),) = rendered.scored
    assert rendered.text[:start] == "<|im_start|>system\nuser<|im_end|>\n<|im_start|>user\n"
    assert rendered.text[start:end] == "user"
    assert rendered.text[: rendered.prompt_chars].endswith("<|im_start|>assistant\n")


def test_a_response_may_bring_its_own_thinking() -> None:
    template = (  # as Qwen 3: the block is split off and written back
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
        "{% if '</think>' in m.content %}"
        "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}"
        "{{ '\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    )
    response = "<think>\nTwo and seven.\n</think>\n\n9"
    sample = encoded("chatml", response, chat_template=template)
    assert sample.text[sample.prompt_chars :] == response + "<|im_end|>"
    assert sample.text[: sample.prompt_chars].endswith("<|im_start|>assistant\n")
    plain = encoded("chatml", "9", chat_template=template)
    assert plain.text[: plain.prompt_chars].endswith("<think>\n\n</think>\n\n")


def test_template_that_alters_or_refuses_a_message_is_a_counted_skip() -> None:
    loses = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    encoder = Encoder(tiny.tokenizer(), chat_template=loses)
    (skip,) = encoder.encode(one({"prompt": "a", "completion": "<think>b</think>c"}))
    assert (skip.id, skip.reason) == ("0", "template_alters_content")
    shouts = "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}"
    (skip,) = Encoder(tiny.tokenizer(), chat_template=shouts).encode(one({"prompt": "a", "completion": "B"}))
    assert skip.reason == "template_alters_content"
    (skip,) = Encoder(tiny.tokenizer("gemma")).encode(one({"prompt": "a", "completion": "b"}, system="S"))
    assert skip.reason == "template_error"
    assert "System role not supported" in skip.detail


def test_template_without_an_end_of_turn_gets_the_end_of_sequence() -> None:
    sample = encoded(None, chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert sample.text.endswith("#### 9<|im_end|>")


def test_dates_are_pinned(tmp_path) -> None:
    dated = tmp_path / "dated.jinja"
    dated.write_text(
        "{% for m in messages %}[{{ strftime_now('%Y') }}/{{ strftime_now(\"%d\") }}]"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    sample = encoded(None, chat_template=str(dated), date="1999-03-04")
    assert sample.text.startswith("[1999/04]")
    assert "Today: 26 Jul 2024" in encoded("llama3").text
    keys = [Encoder(tiny.tokenizer("llama3"), date=date).fingerprint for date in (None, "1999-03-04")]
    assert keys[0] != keys[1]
    assert keys[0] == Encoder(tiny.tokenizer("llama3")).fingerprint


def test_too_long() -> None:
    full = encoded("chatml")
    assert encoded("chatml", max_length=len(full.input_ids)) == full
    encoder = Encoder(tiny.tokenizer(), max_length=len(full.input_ids) - 1)
    (skip,) = encoder.encode(one({"prompt": QUESTION, "completion": RESPONSE}))
    assert (skip.reason, skip.detail) == (
        "too_long",
        f"{len(full.input_ids)} tokens, max_length is {len(full.input_ids) - 1}",
    )


def test_truncated_targets_keep_whole_characters() -> None:
    full = encoded("chatml", "🙂🙂🙂")
    for length in range(full.response_start + 1, len(full.input_ids)):
        encoder = Encoder(tiny.tokenizer(), max_length=length, truncate="response")
        (cut,) = encoder.encode(one({"prompt": QUESTION, "completion": "🙂🙂🙂"}))
        if isinstance(cut, Skip):
            assert length < full.response_start + 4  # not even one character fits
            continue
        assert len(cut.input_ids) == len(cut.offsets) == len(cut.scored) <= length
        assert tiny.tokenizer().decode(cut.input_ids) == cut.text
        assert cut.text[cut.prompt_chars :] in ("🙂", "🙂🙂", "🙂🙂🙂")
    (skip,) = Encoder(tiny.tokenizer(), max_length=full.response_start, truncate="response").encode(
        one({"prompt": QUESTION, "completion": "🙂"})
    )
    assert skip.reason == "too_long"


def test_response_level_cuts_at_the_line_nearest_the_middle() -> None:
    lines = ["First step is long enough.\n", "Second.\n\n", "Third step is long enough.\n", "Fourth."]
    row = one({"prompt": "Go.", "completion": "".join(lines)})
    encoder = Encoder(tiny.tokenizer())
    (whole,) = encoder.encode(row)
    (half,) = encoder.encode(row, level="response")
    assert (half.level, half.cut, half.text) == ("response", 1, whole.text)
    assert half.text[half.prompt_chars :] == lines[2] + lines[3] + "<|im_end|>"
    scored = [half.text[a:b] for (a, b), s in zip(half.offsets, half.scored) if s]
    assert "".join(scored) == lines[0] + lines[1]
    thirds = encoder.encode(row, level="response", segments=3)
    assert [(s.cut, s.text[s.prompt_chars :]) for s in thirds] == [
        (1, "".join(lines[1:]) + "<|im_end|>"),
        (2, "".join(lines[2:]) + "<|im_end|>"),
    ]
    (sentence,) = encoder.encode(one({"prompt": "Go.", "completion": "One is one. Two is two."}), level="response")
    assert sentence.text[sentence.prompt_chars :] == "Two is two.<|im_end|>"
    (skip,) = encoder.encode(one({"prompt": "Go.", "completion": "nothing to cut"}), level="response")
    assert skip.reason == "no_cut"


def test_other_response() -> None:
    encoder = Encoder(tiny.tokenizer())
    row = one({"prompt": "Go.", "completion": "old"})
    (sample,) = encoder.encode(row, response="new one")
    assert sample.text[sample.prompt_chars :] == "new one<|im_end|>"


def test_nothing_scored() -> None:
    (skip,) = Encoder(tiny.tokenizer()).encode(one({"prompt": "Go.", "completion": "x"}, protect=["."]))
    assert skip.reason == "nothing_scored"


def test_literals_and_protected_text_are_not_scored() -> None:
    row = one(
        {"q": "Tom has 2 books", "a": "x"}, prompt_template="Question: {q} Answer:", response_column="a", protect=["2"]
    )
    (sample,) = Encoder(tiny.tokenizer()).encode(row)
    scored = "".join(sample.text[a:b] for (a, b), s in zip(sample.offsets, sample.scored) if s)
    assert scored.replace(" ", "") == "Tomhasbooks"


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20), st.sampled_from([*tiny.TEMPLATES]))
def test_any_text_round_trips(prompt: str, response: str, template: str) -> None:
    tokenizer = tiny.tokenizer(template)
    for row in read_rows([{"prompt": prompt, "completion": response}]):
        if isinstance(row, Skip):
            continue
        (sample,) = Encoder(tokenizer).encode(row)
        if isinstance(sample, Skip):
            continue
        assert tokenizer.decode(sample.input_ids) == sample.text
        prompt_ids = tokenizer(sample.text[: sample.prompt_chars], add_special_tokens=False).input_ids
        assert sample.input_ids[: sample.response_start] == prompt_ids
        assert all(0 <= a <= b <= len(sample.text) for a, b in sample.offsets)
        covered = {i for a, b in sample.offsets for i in range(a, b)}
        assert covered == set(range(len(sample.text)))


def test_a_token_across_the_boundary_is_never_made() -> None:
    encoder = Encoder(tiny.tokenizer(), chat_template="none")
    joint = tiny.tokenizer()("books", add_special_tokens=False).input_ids
    ids, offsets, start = encoder.encode_text("boo", "ks")
    assert ids != joint
    assert tiny.tokenizer().decode(ids[:start]) == "boo"
    assert offsets[start][0] == 3


def test_unusable_tokenizers() -> None:
    with pytest.raises(ValueError, match="--chat-template FILE, or --chat-template none"):
        Encoder(tiny.tokenizer(None))
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="Slow is a slow tokenizer"):
        Encoder(slow)
    endless = tiny.tokenizer(None)
    endless.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        Encoder(endless, chat_template="none")
    with pytest.raises(ValueError, match="truncate"):
        Encoder(tiny.tokenizer(), truncate="prompt")


def test_check_pair() -> None:
    base = tiny.tokenizer()
    assert check_pair(base, tiny.tokenizer("llama3")) == len(base)
    larger = tiny.tokenizer()
    larger.add_tokens(["<extra>"])
    assert check_pair(base, larger) == check_pair(larger, base) == len(base)
    other = tiny.tokenizer(corpus=("completely different words here, zebra zebra quiz quiz",))
    with pytest.raises(ValueError, match=r"ids mean different tokens \(id: student / teacher"):
        check_pair(base, other)


def test_ids_are_unique_whatever_they_look_like() -> None:
    records = [{"id": i, "prompt": "p", "completion": "c"} for i in ("a", "a#2", "a", "a")]
    assert [row.id for row in read_rows(records)] == ["a", "a#2", "a#3", "a#4"]


def test_an_answer_of_zero_is_an_answer() -> None:
    answers = (0, 0.0, False, "", None, [1, 2])
    rows = read_rows([{"prompt": "p", "completion": "c", "answer": answer} for answer in answers])
    assert [row.answer for row in rows] == ["0", "0.0", "False", None, None, "[1, 2]"]
