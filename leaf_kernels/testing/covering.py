"""Covering arrays: few cases in which every pair of values meets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(**factors: Sequence[Any]) -> list[dict[str, Any]]:
    """Cases, one value per factor, such that any two values of two factors occur together in one of them.

    Greedy and deterministic; the number of cases is near the product of the two longest factors.
    """
    names = list(factors)
    pairs = list(itertools.combinations(names, 2))
    missing = {(a, i, b, j) for a, b in pairs for i in range(len(factors[a])) for j in range(len(factors[b]))}
    if not pairs:
        return [{name: value} for name, values in factors.items() for value in values]
    cases: list[dict[str, Any]] = []
    while missing:
        a, i, b, j = min(missing)
        chosen = {a: i, b: j}
        for turn, name in enumerate(n for n in names if n not in chosen):
            options = len(factors[name])
            met = [
                sum((c, k, name, value) in missing or (name, value, c, k) in missing for c, k in chosen.items())
                for value in range(options)
            ]
            first = (len(cases) + turn) % options  # ties go round, so that no value is favoured
            chosen[name] = max(((first + n) % options for n in range(options)), key=met.__getitem__)
        missing -= {(c, chosen[c], d, chosen[d]) for c, d in pairs}
        cases.append({name: factors[name][chosen[name]] for name in names})
    return cases
