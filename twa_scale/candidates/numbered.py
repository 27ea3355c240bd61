"""Stored tensors that differ in a number in their names, such as those of experts: which are missing."""

from collections.abc import Mapping, Sequence

Numbers = tuple[int, ...]


def lacking(found: Mapping[str, Sequence[str]], sizes: tuple[int, int] | None = None) -> list[str]:
    """Return the names of what is missing for a tensor that is made of several.

    Every pattern needs the numbers that any of them has, and those from 0 to the largest.

    Args:
        found: the names that each of some patterns matches.
        sizes: the first dimension of what was made of them, and the one that is expected. If the first is how many
            numbers there are, the second is how many are needed.
    """
    numbers = {pattern: {_numbers(name) for name in names} for pattern, names in found.items()}
    needed = _filled(set().union(*numbers.values()), sizes)
    missing: list[str] = []
    for pattern, names in found.items():
        if names:
            missing += [_numbered(names[0], own) for own in sorted(needed - numbers[pattern])]
        elif any(found.values()):
            missing.append(pattern)
    return missing


def _filled(numbers: set[Numbers], sizes: tuple[int, int] | None) -> set[Numbers]:
    """Return these and those between them, where all differ in one place."""
    first = next(iter(numbers), ())
    varying = [place for place in range(len(first)) if len({own[place : place + 1] for own in numbers}) > 1]
    if len(varying) != 1 or any(len(own) != len(first) for own in numbers):
        return numbers
    (place,) = varying
    stop = max(own[place] for own in numbers) + 1
    if sizes and sizes[0] == len(numbers):
        stop = max(stop, sizes[1])
    return {(*first[:place], number, *first[place + 1 :]) for number in range(stop)}


def _numbers(name: str) -> Numbers:
    return tuple(int(step) for step in name.split(".") if step.isdecimal())


def _numbered(name: str, numbers: Numbers) -> str:
    """Return a name with other numbers."""
    left = iter(numbers)
    return ".".join(str(next(left)) if step.isdecimal() else step for step in name.split("."))
