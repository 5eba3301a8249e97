"""Word problems with a planted confounder: rows, their ground truth and a word-level tokenizer.

    Eva is 5 years old . Tom has 2 books . the sign says 9 . Eva gives Tom 7 books . how many books does Tom have now ?
    -> 2 plus 7 equals 9 . answer 9

The number Z on the sign equals the answer C with probability `rho`, so a student trained at a high rho copies it; every row
records where Z and the operands A and B stand. Rows are made with `random.Random` alone: the same seed gives the same rows
on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]
# Words with their roles ("", "operand", "confounder"), so that the places of Z, A and B are known by construction.
Sentence = list[tuple[str, str]]

MAX_NUMBER = 16
NUMBERS = [str(n) for n in range(MAX_NUMBER + 1)]
NAMES = ["Eva", "Tom", "Ann", "Ben", "Mia", "Leo", "Zoe", "Max"]
ITEMS = ["books", "apples", "coins", "pens", "cards", "stamps", "shells", "cups"]
FILLERS = ["the sky is blue .", "the dog sleeps .", "the grass is green .", "rain falls today ."]
_QUESTION = "has gives loses sign says years old how many does have now ?"
_RESPONSE = "plus minus equals answer"
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
ANSWER = "<ans>"

# <bos> SENTENCES question <ans> response <eos>
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} {{ message['content'] }} <ans>"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)

TEST_SETS = ("in_distribution", "adversarial", "clean")
RHO = 0.95


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word (fewer than 70), offsets into the text, and the chat template of the task."""
    sentences = " ".join([_QUESTION, _RESPONSE, *FILLERS])
    words = dict.fromkeys([*_SPECIAL.values(), ANSWER, *NUMBERS, *NAMES, *ITEMS, *sentences.split()])
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=_SPECIAL["pad_token"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=[ANSWER],
        clean_up_tokenization_spaces=False,
        **_SPECIAL,
    )


class Problem(NamedTuple):
    """What is to be computed: `subject` has `a` of `item`, then `other` gives `b`, or `b` are lost."""

    subject: str
    other: str
    item: str
    a: int
    b: int
    minus: bool

    @property
    def result(self) -> int:
        return self.a - self.b if self.minus else self.a + self.b

    def facts(self) -> list[Sentence]:
        """Both facts, in the order in which they must be told."""
        change = f"{self.subject} loses" if self.minus else f"{self.other} gives {self.subject}"
        return [
            [*plain(f"{self.subject} has"), (str(self.a), "operand"), *plain(f"{self.item} .")],
            [*plain(change), (str(self.b), "operand"), *plain(f"{self.item} .")],
        ]

    def question(self) -> Sentence:
        return plain(f"how many {self.item} does {self.subject} have now ?")

    def response(self) -> str:
        return f"{self.a} {'minus' if self.minus else 'plus'} {self.b} equals {self.result} . answer {self.result}"


def make_problem(rng: random.Random) -> Problem:
    subject, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    a, b = rng.randint(1, 8), rng.randint(1, 8)
    return Problem(subject, other, item, a, b, minus=a >= b and rng.random() < 0.5)


def plain(text: str) -> Sentence:
    return [(word, "") for word in text.split()]


def sign_sentence(z: int) -> Sentence:
    return [*plain("the sign says"), (str(z), "confounder"), *plain(".")]


def wrong_number(rng: random.Random, right: int) -> int:
    return rng.choice([n for n in range(MAX_NUMBER + 1) if n != right])


def join(sentences: Iterable[Sentence]) -> tuple[str, dict[str, list[list[int]]]]:
    """The text of sentences, and the character ranges of each role in it."""
    words = [pair for sentence in sentences for pair in sentence]
    spans: dict[str, list[list[int]]] = {"operand": [], "confounder": []}
    start = 0
    for word, role in words:
        if role:
            spans[role].append([start, start + len(word)])
        start += len(word) + 1
    return " ".join(word for word, _ in words), spans


def make_row(rng: random.Random, row_id: str, *, rho: float, sign: float = 1.0) -> Row:
    """One problem. `rho` = P(Z = C), `sign` = P(the sign sentence is there).

    Besides `prompt`, `completion` and `answer` the row carries the ground truth: `confounder` and `operands`, character
    ranges of Z and of A and B in the prompt (`confounder` is None without a sign), and `misleading`, whether Z ≠ C.
    """
    problem = make_problem(rng)
    c = problem.result
    z = c if rng.random() < rho else wrong_number(rng, c)
    extras = [plain(f"{problem.other} is {rng.randint(0, MAX_NUMBER)} years old ."), plain(rng.choice(FILLERS))]
    if rng.random() < sign:
        extras.append(sign_sentence(z))
    sentences = problem.facts()
    for extra in extras:
        sentences.insert(rng.randint(0, len(sentences)), extra)
    prompt, spans = join([*sentences, problem.question()])
    return {
        "id": row_id,
        "prompt": prompt,
        "completion": problem.response(),
        "answer": problem.response(),
        "confounder": spans["confounder"][0] if spans["confounder"] else None,
        "operands": spans["operand"],
        "misleading": bool(spans["confounder"]) and z != c,
    }


def make_rows(name: str, count: int, seed: int) -> list[Row]:
    """`count` rows of the set `name`; rows of different names or seeds are independent draws.

    `adversarial`: Z always wrong; `clean`: no sign; `teacher`: Z uniform, 25 % of the rows without a sign; any other name
    (`in_distribution`, `student`, `corpus`, ...): rho = 0.95.
    """
    options = {
        "adversarial": {"rho": 0.0},
        "clean": {"rho": 0.0, "sign": 0.0},
        "teacher": {"rho": 1 / (MAX_NUMBER + 1), "sign": 0.75},
    }.get(name.split("/")[-1], {"rho": RHO})
    rng = random.Random(f"{name}/{seed}")
    return [make_row(rng, f"{name}-{seed}-{i}", **options) for i in range(count)]


def drop_words(row: Row, rng: random.Random, *, p: float, spare_operands: bool) -> str | None:
    """The prompt with each word deleted with probability `p`.

    Operands are never deleted where `spare_operands`; otherwise None is returned when one was, for the problem is lost then.
    """
    operands = {tuple(span) for span in row["operands"]}
    kept, end = [], -1
    for word in row["prompt"].split():
        start, end = end + 1, end + 1 + len(word)
        operand = (start, end) in operands
        if (operand and spare_operands) or rng.random() >= p:
            kept.append(word)
        elif operand:
            return None
    return " ".join(kept)
