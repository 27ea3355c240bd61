"""The cases of a grid that `make test` runs."""

from itertools import combinations, product

import pytest

from tests.grid import covering, grid, rest_slow


def test_subset_covers_every_pair_and_grid_keeps_all_cases() -> None:
    cases = list(product(["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i"]))
    chosen = covering(cases)
    assert 9 <= len(chosen) <= 12
    pairs = {pair for k in chosen for pair in combinations(cases[k], 2)}
    assert pairs == {pair for case in cases for pair in combinations(case, 2)}
    marked = grid(cases)
    assert [parameters.values for parameters in marked] == cases
    assert {k for k, parameters in enumerate(marked) if not parameters.marks} == chosen


def test_cases_that_show_nothing_more_are_slow_if_they_cover_pairs() -> None:
    cases = list(product(["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i"]))
    needed = covering(cases)
    marked = grid(cases, shown=lambda first, second, third: [(first, second), third])
    named = [[mark.name for mark in parameters.marks] for parameters in marked]
    chosen = {k for k, names in enumerate(named) if not names}
    assert {case[:2] for case in map(cases.__getitem__, chosen)} == set(product("abc", "def"))
    assert {cases[k][2] for k in chosen} == set("ghi") and len(chosen) == 9
    assert needed - chosen == {k for k, names in enumerate(named) if names == ["slow"]}
    assert all(names == ["grid"] for k, names in enumerate(named) if k not in needed | chosen)


def test_cases_that_are_not_kept_are_slow() -> None:
    cases = list(product("ab", (1, 2)))
    marked = rest_slow(cases, lambda letter, number: letter == "a" or number == 2)
    assert [parameters.values for parameters in marked] == cases
    assert [[mark.name for mark in parameters.marks] for parameters in marked] == [[], [], ["slow"], []]
    for kept in (lambda *_: True, lambda *_: False):
        with pytest.raises(AssertionError):
            rest_slow(cases, kept)


def test_case_that_covers_no_pair_is_kept() -> None:
    assert covering([["a", "b", "c"], ["a", "b"], ["a", "d"]]) == {0, 2}
