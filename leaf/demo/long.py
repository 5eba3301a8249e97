"""The built-in task at long context: the same facts among hundreds of distracting sentences, with several signs.

At level "instruction" the signs stand in the prompt; at level "response" one stands in a first step of the response:

    the dog sleeps . Tom has 2 books . the sign says 9 . Mia is 4 years old .
    2 plus 7 equals 9 . answer 9

Vocabulary, tokenizer and the problems are those of `task`, so a model of one can read the other.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from .task import (
    MAX_NUMBER,
    NAMES,
    RHO,
    Row,
    Sentence,
    join,
    make_problem,
    plain,
    sign_sentence,
    wrong_number,
)

LEVELS = ("instruction", "response")
SIGNS = 3

# Words of the short task in other combinations: its tokenizer knows them.
_THINGS = ["the sky", "the dog", "the grass", "rain", *NAMES]
_STATES = ["sleeps", "falls", "is blue", "is green", "is old"]
_FILLERS = [plain(" ".join(words)) for words in itertools.product(_THINGS, _STATES, ["today .", "now .", "."])]
_SHORTEST, _LONGEST = 3, 6  # tokens of a distracting sentence
_DECOYS = 0.25  # share of the distracting sentences that hold a number


def _filler(rng: random.Random, room: int) -> Sentence:
    """A sentence that fits into `room` tokens and leaves none or enough for another."""
    if room >= _SHORTEST + _LONGEST:
        return rng.choice(_FILLERS)
    return rng.choice([filler for filler in _FILLERS if len(filler) in (room, *range(room - _SHORTEST + 1))])


def _decoy(rng: random.Random) -> Sentence:
    return plain(f"{rng.choice(NAMES)} is {rng.randint(0, MAX_NUMBER)} years old .")


def shortest(level: str, signs: int = SIGNS) -> int:
    """The least length of a prompt: <bos>, facts, question, <ans>, the signs, and one sentence that does not matter."""
    return 2 + 5 + 6 + 8 + _SHORTEST + (5 * signs if level == "instruction" else 0)


def make_row(rng: random.Random, row_id: str, *, length: int, level: str, rho: float, signs: int) -> Row:
    """One problem whose rendered prompt has exactly `length` tokens; a first step of the response comes on top.

    With probability `rho` every sign says the answer C, else half the time all say the same wrong number, half the time each
    one of its own. At level "response" the prompt holds no sign, and the first step one (none where `signs` is 0).

    `answer` is the response without its first step. The ground truth: `confounders` and `operands`, character ranges of
    every Z and of A and B in the prompt; `step_confounders` and `step_operands`, the same in the completion's first step;
    `misleading`, whether the signs are wrong.
    """
    if level not in LEVELS:
        raise ValueError(f"long: level must be one of {', '.join(LEVELS)}, got {level!r}")
    if length < shortest(level, signs):
        raise ValueError(f"long: length must be at least {shortest(level, signs)} tokens here, got {length}")
    problem = make_problem(rng)
    c = problem.result
    truthful = rng.random() < rho
    if truthful or rng.random() < 0.5:
        said = [c if truthful else wrong_number(rng, c)] * signs
    else:
        said = [wrong_number(rng, c) for _ in range(signs)]
    planted = [sign_sentence(z) for z in said]
    first, second = problem.facts()
    extras, step = list(planted), []
    if level == "response":
        extras, step = [], [*planted[:1], _decoy(rng), _filler(rng, 9), first]
        rng.shuffle(step)

    question = problem.question()
    room = length - 2 - sum(map(len, [first, second, question, *extras]))  # 2: <bos> and <ans>
    while room:
        decoy = room >= _SHORTEST + _LONGEST and rng.random() < _DECOYS
        extras.append(_decoy(rng) if decoy else _filler(rng, room))
        room -= len(extras[-1])
    rng.shuffle(extras)
    i, j = sorted(rng.randint(0, len(extras)) for _ in range(2))
    prompt, spans = join([*extras[:i], first, *extras[i:j], second, *extras[j:], question])
    thoughts, step_spans = join(step)
    return {
        "id": row_id,
        "prompt": prompt,
        "completion": f"{thoughts}\n{problem.response()}" if step else problem.response(),
        "answer": problem.response(),
        "level": level,
        "confounders": spans["confounder"],
        "operands": spans["operand"],
        "step_confounders": step_spans["confounder"],
        "step_operands": step_spans["operand"],
        "misleading": bool(planted) and not truthful,
    }


def make_rows(name: str, count: int, seed: int, *, length: int, level: str = "instruction") -> list[Row]:
    """`count` rows of the set `name` whose prompts have exactly `length` tokens (see `make_row`).

    Rows of different names, seeds, lengths or levels are independent draws, the same on every machine.
    `adversarial`: the signs are always wrong; `clean`: no sign; any other name (`in_distribution`, `corpus`, ...): three
    signs, right with probability 0.95.
    """
    options: dict[str, Any] = {
        "adversarial": {"rho": 0.0, "signs": SIGNS},
        "clean": {"rho": 0.0, "signs": 0},
    }.get(name, {"rho": RHO, "signs": SIGNS})
    rng = random.Random(f"long/{level}/{length}/{name}/{seed}")
    return [
        make_row(rng, f"{name}-{length}-{level}-{seed}-{i}", length=length, level=level, **options)
        for i in range(count)
    ]
