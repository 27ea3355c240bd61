"""Find missing tensors among those that differ in a number in their names, such as experts."""

from collections.abc import Mapping, Sequence

Numbers = tuple[int, ...]


def lacking(found: Mapping[str, Sequence[str]], sizes: tuple[int, int] | None = None) -> list[str]:
    """Return the names of the missing tensors of those of which a tensor is made.

    Every pattern needs the numbers that any pattern has, and all numbers from 0 to the largest.

    Args:
        found: the names that each pattern matches.
        sizes: the first dimension of the tensor that was made, and the expected one. If the first is the count of
            numbers, the second is the required count.
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
    """Return the numbers and those between them, if all differ in one position."""
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
