"""Input rows in, tokenized samples out.

`read_rows` understands every input format and says which characters may be scored. `Encoder` renders a row once, with the
*student's* chat template, for scoring, generation and training of both models, and tokenizes it.
"""

from __future__ import annotations

import bisect
import copy
import datetime
import functools
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from .rows import Row as Row
from .rows import Skip as Skip
from .rows import read_rows as read_rows

# Templates that print the date get this one unless told otherwise: a prompt that changes at midnight would make every
# stored stage stale. It is the date that Llama 3's own template falls back to.
DEFAULT_DATE = "2024-07-26"

Span = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """A rendered and tokenized unit; `text[:prompt_chars]` is its prompt, the rest its target with the end of turn.

    `offsets` are character positions in `text`; `scored` says for every token whether it is one to score.
    """

    id: str
    level: str
    cut: int
    text: str
    prompt_chars: int
    input_ids: list[int]
    offsets: list[Span]
    response_start: int
    scored: list[bool]


class Rendered(NamedTuple):
    """A conversation as text: prompt, response content, end of turn. `scored` are character ranges of `text`."""

    text: str
    prompt_chars: int
    response_end: int
    scored: list[Span]


class Encoder:
    """Renders and tokenizes rows, with one template and one tokenizer (the student's) for every stage and both models;
    where the teacher's tokenizer is another one, `read_by` makes the encoder that reads the same text with it.

    Args:
        tokenizer: a fast tokenizer (character offsets are needed).
        max_length: rows with more tokens are skipped as `too_long`; prompts are never truncated.
        truncate: "response" cuts targets at the end instead (they have no end of turn then).
        chat_template: None = the tokenizer's; "none" = prompt + response + end of sequence as plain text; else a
            template or a file that holds one.
        date: the day (YYYY-MM-DD) that templates print, `DEFAULT_DATE` if None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        truncate: str | None = None,
        chat_template: str | None = None,
        date: str | None = None,
    ):
        _check_fast(tokenizer)
        if truncate not in (None, "response"):
            raise ValueError(f"truncate must be None or 'response', got {truncate!r}")
        self.tokenizer, self.max_length, self.truncate = tokenizer, max_length, truncate
        self._renderer = tokenizer  # the one whose template and special tokens write the text
        self.date = date or DEFAULT_DATE
        self.template = self._load_template(chat_template)
        if self.template is None and tokenizer.eos_token is None:
            raise ValueError("chat_template='none' ends responses with the tokenizer's eos_token, and it has none")
        ends = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | {tokenizer.eos_token or ""}
        self._end_of_turn = re.compile("|".join(re.escape(end) for end in sorted(ends - {""}, key=len, reverse=True)))
        self._skeletons: dict[tuple[str, ...], list[str]] = {}

    def read_by(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """How a model with another tokenizer reads what this encoder renders: `read`, `as_read`, `response_of`."""
        _check_fast(tokenizer)
        reader = copy.copy(self)
        reader.tokenizer = tokenizer
        return reader

    def _load_template(self, given: str | None) -> str | None:
        """The source of the chat template with its dates pinned, None for plain text."""
        if given == "none":
            return None
        if given is None:
            if not self._renderer.chat_template:
                raise ValueError(
                    "the tokenizer has no chat template: give --chat-template FILE, or --chat-template none for "
                    "prompt + response + end of sequence as plain text"
                )
            given = self._renderer.get_chat_template()
        elif "{" not in given:
            given = Path(given).read_text(encoding="utf-8")
        day = datetime.date.fromisoformat(self.date)
        # apply_chat_template hands no functions to the template, so the calls are replaced in its source.
        return re.sub(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", lambda call: json.dumps(day.strftime(call[2])), given)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the text and ids of a sample depend on besides the row: part of the key of stored stages."""

        def digest(text: str) -> str:
            return hashlib.sha256(text.encode()).hexdigest()[:16]

        reads, writes = (digest(t.backend_tokenizer.to_str()) for t in (self.tokenizer, self._renderer))
        return {
            "tokenizer": reads,
            **({} if reads == writes else {"rendered_by": writes}),
            "chat_template": "none" if self.template is None else digest(self.template),
            "date": self.date,
            "max_length": self.max_length,
            "truncate": self.truncate,
        }

    @functools.cached_property
    def _plain_question(self) -> Rendered:
        rendered = self.render(Row("", [{"role": role, "content": "x"} for role in ("user", "assistant")], []))
        if isinstance(rendered, Skip):
            raise ValueError(f"the chat template cannot render a plain question and answer: {rendered.detail}")
        return rendered

    @property
    def end_of_turn_id(self) -> int | None:
        """The token that ends a response: generation stops there."""
        if self.tokenizer is not self._renderer:
            return self.tokenizer.eos_token_id
        rendered = self._plain_question
        return self._tokenize(rendered.text)[0][-1] if len(rendered.text) > rendered.response_end else None

    def render(self, row: Row, *, response: str | None = None) -> Rendered | Skip:
        """The conversation as text, with `response` in place of the row's own if given.

        The prompt is everything before the response's content, as the template writes it there: what a template puts at
        the start of the turn (an empty thinking block, say) is part of the prompt for generation as for training.
        """
        messages = row.messages if response is None else [*row.messages[:-1], {**row.messages[-1], "content": response}]
        contents = [m["content"] for m in messages]
        places: dict[int, tuple[int, int, int]] | None
        if self.template is None:
            text, places = self._plain(contents)
        else:
            try:
                text = self._apply(messages)
                places = self._locate(text, [m["role"] for m in messages], contents)
            except jinja2.TemplateError as error:
                return Skip(row.id, "template_error", f"the chat template refuses the conversation: {error}")
        if places is None:
            return Skip(row.id, "template_alters_content", "the chat template changes the text of a message")
        ranges = []
        for message, start, end in row.scored:
            if message in places:
                place, lead, length = places[message]
                start, end = max(start - lead, 0), min(end - lead, length)
                ranges += [(place + start, place + end)] if start < end else []
        place, _, length = places[len(messages) - 1]
        stop = place + length
        if found := self._end_of_turn.search(text, stop):
            text = text[: found.end()]
        else:
            text = text[:stop] + (self._renderer.eos_token or "")
        return Rendered(text, place, stop, ranges)

    def _plain(self, contents: list[str]) -> tuple[str, dict[int, tuple[int, int, int]]]:
        """Contents with a blank line between turns, the response right after the prompt."""
        text = _opening(self._renderer)
        places = {}
        for n, content in enumerate(contents):
            text += "\n\n" if 0 < n < len(contents) - 1 else ""
            places[n] = (len(text), 0, len(content))
            text += content
        return text, places

    def _apply(self, messages: list[dict[str, str]]) -> str:
        date_string = datetime.date.fromisoformat(self.date).strftime("%d %b %Y")
        return str(
            self._renderer.apply_chat_template(
                messages, tokenize=False, chat_template=self.template, date_string=date_string
            )
        )

    def _locate(self, text: str, roles: list[str], contents: list[str]) -> dict[int, tuple[int, int, int]] | None:
        """Where each content is in the rendered text: {message: (position, characters trimmed before, length)}.

        The same roles are rendered with markers as contents; what is between the markers must be found again between the
        contents, so a content that also occurs in the template itself cannot be mistaken. None: the template alters one.
        """
        key = tuple(roles)
        if key not in self._skeletons:
            marked = self._apply([{"role": role, "content": f"\ue000{n}\ue001"} for n, role in enumerate(roles)])
            self._skeletons[key] = re.split("\ue000(\\d+)\ue001", marked)
        literals, order = self._skeletons[key][::2], [int(n) for n in self._skeletons[key][1::2]]
        last = len(contents) - 1
        if not order or order[-1] != last or len(set(order)) < len(order):
            return None
        places: dict[int, tuple[int, int, int]] = {}
        position = 0
        for literal, following, message in zip(literals, literals[1:], order):
            content = contents[message]
            start = position + len(literal)
            final = message == last
            for kept in (content, content.strip(), content.lstrip(), content.rstrip()):
                end = start + len(kept)
                rest = text[end:] == following if final else text.startswith(following[:1], end)
                if rest and text.startswith(literal + kept, position):
                    break
            else:
                # The turn of a response that brings its own thinking block starts otherwise than that of the marker.
                kept = content.strip()
                start = text.find(kept, position)
                end = start + len(kept)
                if not final or not kept or start < 0 or text[end:] != following:
                    return None
            lead = len(content) - len(content.lstrip()) if not content.startswith(kept) else 0
            places[message] = (start, lead, len(kept))
            position = end
        return places

    def encode(
        self, row: Row, *, level: str = "instruction", segments: int = 2, response: str | None = None
    ) -> list[Sample | Skip]:
        """The samples of a row at a level: one at "instruction"; at "response" one per cut of the response.

        At response level the response is cut into `segments` parts, at the line break (else the sentence end) nearest to
        the equal division of its tokens; the text before a cut is the prompt, and of it only the response is scored.
        """
        if level not in ("instruction", "response"):
            raise ValueError(f"level must be 'instruction' or 'response', got {level!r}")
        rendered = self.render(row, response=response)
        if isinstance(rendered, Skip):
            return [rendered]
        if level == "instruction":
            return [self._sample(row.id, level, 0, rendered)]
        start = rendered.prompt_chars
        cuts = self._cuts(rendered.text[start : rendered.response_end], segments)
        if not cuts:
            return [Skip(row.id, "no_cut", "the response has no line break or sentence end to be cut at")]
        return [
            self._sample(row.id, level, n, rendered._replace(prompt_chars=start + cut, scored=[(start, start + cut)]))
            for n, cut in enumerate(cuts, start=1)
        ]

    def _cuts(self, response: str, segments: int) -> list[int]:
        starts = [start for start, _ in self._tokenize(response)[1]]
        for pattern in (r"\n+", r"[.!?]\s+"):
            places = [found.end() for found in re.finditer(pattern, response)]
            places = [p for p in places if response[:p].strip() and response[p:].strip()]
            if places:
                ideal = [len(starts) * n / segments for n in range(1, segments)]
                return sorted({min(places, key=lambda p: abs(bisect.bisect_left(starts, p) - x)) for x in ideal})
        return []

    def _sample(self, row_id: str, level: str, cut: int, rendered: Rendered) -> Sample | Skip:
        text, prompt_chars = rendered.text, rendered.prompt_chars
        input_ids, offsets, response_start = self.encode_text(text[:prompt_chars], text[prompt_chars:])
        if self.max_length is not None and len(input_ids) > self.max_length:
            keep = self.max_length
            while self.truncate and keep > response_start and offsets[keep - 1][1] > offsets[keep][0]:
                keep -= 1  # never half a character
            if self.truncate is None or keep <= response_start:
                return Skip(row_id, "too_long", f"{len(input_ids)} tokens, max_length is {self.max_length}")
            input_ids, offsets = input_ids[:keep], offsets[:keep]
            text = text[: offsets[-1][1]]
        allowed = bytearray(len(text))
        for start, end in rendered.scored:
            allowed[start:end] = b"\x01" * (end - start)
        scored = [n < response_start and _inside(text, span, allowed) for n, span in enumerate(offsets)]
        if not any(scored):
            return Skip(row_id, "nothing_scored", "no token lies in text that may be scored")
        return Sample(row_id, level, cut, text, prompt_chars, input_ids, offsets, response_start, scored)

    def encode_text(self, prompt: str, response: str) -> tuple[list[int], list[Span], int]:
        """Tokens of a prompt and its target: (input_ids, offsets in prompt + response, index of the first target token).

        The prompt's ids are those of the prompt alone, as in generation. Both texts are tokenized together where that
        leaves the prompt's ids as they are (a SentencePiece tokenizer would put a space before a response on its own);
        where a token would join the two, they are tokenized separately.
        """
        prompt_ids, prompt_offsets = self._tokenize(prompt)
        ids, offsets = self._tokenize(prompt + response)
        boundary = len(prompt_ids)
        if ids[:boundary] == prompt_ids and all(start >= len(prompt) for start, _ in offsets[boundary:]):
            return ids, offsets, boundary
        ids, offsets = self._tokenize(response)
        shifted = [(start + len(prompt), end + len(prompt)) for start, end in offsets]
        return prompt_ids + ids, prompt_offsets + shifted, boundary

    # -- what a model with another tokenizer reads: the same text between its own beginning and end of sequence

    def as_read(self, prompt: str) -> str:
        """A rendered prompt with the model's own beginning of sequence instead of the renderer's."""
        own, written = self._beginning(prompt)
        return own + prompt[len(written) :]

    def _beginning(self, prompt: str) -> tuple[str, str]:
        """The model's own beginning of sequence, and the renderer's in whose place it is read; each may be empty."""
        written = self._renderer.bos_token or ""
        written = written if prompt.startswith(written) else ""
        own = str(self.tokenizer.bos_token or "") if written else _opening(self.tokenizer)
        return (written, written) if self.tokenizer is self._renderer else (own, written)

    def response_of(self, generated: str) -> str:
        """What was generated up to the renderer's end of turn, which is plain text to another tokenizer."""
        end = self._plain_question.text[self._plain_question.response_end :].strip()
        return generated.split(end)[0] if end and self.tokenizer is not self._renderer else generated

    def read(self, sample: Sample) -> Sample | Skip:
        """`sample` with this encoder's tokens; their offsets are those of the sample's text.

        The end of turn is read as the model's end of sequence: spelt out, its loss would have nothing to do with the prompt.
        Where targets are truncated, the renderer's tokens are what `max_length` counts.
        """
        text, cut = sample.text, sample.prompt_chars
        ends = [found.span() for found in self._end_of_turn.finditer(text, cut)][-1:]
        has_end = bool(ends and cut < ends[0][0] < ends[0][1] == len(text) and self.tokenizer.eos_token)
        stop = ends[0][0] if has_end else len(text)
        prompt, target = self.as_read(text[:cut]), text[cut:stop] + (str(self.tokenizer.eos_token) if has_end else "")
        input_ids, own, response_start = self.encode_text(prompt, target)
        if self.max_length is not None and self.truncate is None and len(input_ids) > self.max_length:
            detail = f"{len(input_ids)} tokens of the teacher, max_length is {self.max_length}"
            return Skip(sample.id, "too_long", detail)
        covered = bytearray(len(prompt + target))
        for start, end in own:
            covered[start:end] = b"\x01" * (end - start)
        if left_out := {char for char, read in zip(prompt + target, covered) if not read and not char.isspace()}:
            # The tokenizers library can count the characters after these wrongly, so no offset is to be trusted.
            detail = f"the teacher's tokenizer leaves out characters, such as {min(left_out)!r}"
            return Skip(sample.id, "unread", detail)
        if not 0 < response_start < len(input_ids):
            return Skip(sample.id, "unread", "the teacher's tokenizer leaves nothing of the prompt or of the response")
        opening, written = map(len, self._beginning(text[:cut]))
        shift = written - opening

        def place(start: int, end: int) -> Span:
            """Where a token is in `text`; the model's own beginning and end of sequence are where the renderer's are."""
            first = 0 if start < opening else min(start + shift, stop)
            return first, len(text) if end + shift > stop else end + shift

        offsets = [place(*span) for span in own]
        allowed = bytearray(len(text))
        for (start, end), may in zip(sample.offsets, sample.scored):
            allowed[start:end] = bytes([may]) * (end - start)
        scored = [n < response_start and _inside(text, span, allowed) for n, span in enumerate(offsets)]
        return replace(sample, input_ids=input_ids, offsets=offsets, response_start=response_start, scored=scored)

    def _tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and offsets of rendered text; spaces that a tokenizer leaves out of its offsets go with the next token."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: list[Span] = []
        reached = 0
        for start, end in encoded["offset_mapping"]:
            if start > reached and text[reached:start].isspace():
                start = reached
            offsets.append((start, end))
            reached = max(reached, end)
        return encoded["input_ids"], offsets


def _inside(text: str, span: Span, allowed: bytearray) -> bool:
    """Whether a token, the spaces around it aside, lies in allowed text."""
    start, end = span
    core = text[start:end].strip()
    if core:
        start = text.index(core, start)
        end = start + len(core)
    return start < end and all(allowed[start:end])


def _check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; convert it once with "
            "AutoTokenizer.from_pretrained(..., use_fast=True) and save_pretrained"
        )


def _opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of sequence that a tokenizer puts before plain text, if any."""
    bos = tokenizer.bos_token or ""
    return bos if bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""


class DifferentTokenizers(ValueError):
    """Two models whose ids mean different tokens: they can be compared on text units, not distilled."""


def check_pair(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int:
    """Size of the vocabulary that two models share: the columns of both heads that mean the same token.

    Raises:
        DifferentTokenizers: an id within it means different tokens, or a token in one vocabulary only.
    """
    tokens = [{i: token for token, i in t.get_vocab().items()} for t in (student, teacher)]
    shared = min(max(by_id) for by_id in tokens) + 1
    different = [i for i in range(shared) if tokens[0].get(i) != tokens[1].get(i)]
    if different:
        first = ", ".join(f"{i}: {tokens[0].get(i)!r} / {tokens[1].get(i)!r}" for i in different[:3])
        raise DifferentTokenizers(
            f"student and teacher have different tokenizers: {len(different)} of {shared} ids mean different tokens "
            f"(id: student / teacher = {first}); choose a teacher of the student's family"
        )
    return shared
