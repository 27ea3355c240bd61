"""Cases of many options. `make test` runs a part of them and `make test-all` runs all.

`grid` marks all but those in which every pair of options occurs; `rest_slow` all but those that it is told.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

Case = Sequence[Any]


def grid(
    cases: Iterable[Case],
    options: Callable[..., Iterable[str]] | None = None,
    group: Callable[..., str] | None = None,
    shown: Callable[..., Iterable[Hashable]] | None = None,
) -> list[Any]:
    """Return the cases for `parametrize`. Cases that are not needed to cover all pairs of options have the mark `grid`.

    Args:
        cases: the values of one case each, in an order that does not change.
        options: of the values of a case, its options; by default the values, by their place.
        group: of the values of a case, the group of cases that one process runs; by default that of the file.
        shown: of the values of a case, what it shows, if `make test` runs fewer cases: enough that one shows each.
            The others that cover pairs have the mark `slow`.
    """
    cases = list(cases)
    named = [list(options(*case)) if options else [f"{i}:{value}" for i, value in enumerate(case)] for case in cases]
    pairs = covering(named)
    first = cover([set(shown(*case)) for case in cases]) if shown else pairs
    return [
        pytest.param(
            *case,
            marks=[pytest.mark.slow if k in pairs else pytest.mark.grid] * (k not in first)
            + ([pytest.mark.xdist_group(group(*case))] if group else []),
        )
        for k, case in enumerate(cases)
    ]


def rest_slow(cases: Iterable[Case], kept: Callable[..., bool]) -> list[Any]:
    """Return the cases for `parametrize`. Those for which `kept` returns false have the mark `slow`.

    Unlike those marked `grid`, `.ci/run` runs them. What is kept has to show each kind of case once.
    """
    cases = list(cases)
    chosen = [kept(*case) for case in cases]
    assert any(chosen) and not all(chosen), "nothing is left out, or everything"
    return [
        pytest.param(*case, marks=[] if keep else pytest.mark.slow) for case, keep in zip(cases, chosen, strict=True)
    ]


def covering(cases: Sequence[Sequence[str]]) -> set[int]:
    """Return indices of cases that cover every pair of options."""
    return cover([set(combinations(sorted(set(options)), 2)) for options in cases])


def cover(shown: Sequence[set[Any]]) -> set[int]:
    """Return indices of sets that together have every element. Each step adds the set with most new elements."""
    missing, chosen = set[Any]().union(*shown), set[int]()
    while missing:
        best = max(
            range(len(shown)), key=lambda k: len(shown[k] & missing)
        )  # the first of the best, so that the result is always the same
        chosen.add(best)
        missing -= shown[best]
    return chosen
