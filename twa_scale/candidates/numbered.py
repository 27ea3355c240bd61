"""Find missing tensors among those that differ in a number in their names, such as experts."""

from collections.abc import Mapping, Sequence

Numbers = tuple[int, ...]


def missing_tensors(matches: Mapping[str, Sequence[str]], sizes: tuple[int, int] | None = None) -> list[str]:
    """Return the names of the missing tensors of those of which a tensor is made.

    Every pattern needs the numbers that any pattern has, and all numbers from 0 to the largest.

    Args:
        matches: the names that each pattern matches.
        sizes: the first dimension of the tensor that was made, and the expected one. If the first is the count of
            numbers, the second is the required count.
    """
    numbers = {pattern: {_numbers(name) for name in names} for pattern, names in matches.items()}
    needed = _filled(set().union(*numbers.values()), sizes)
    missing: list[str] = []
    for pattern, names in matches.items():
        if names:
            missing += [_numbered(names[0], value) for value in sorted(needed - numbers[pattern])]
        elif any(matches.values()):
            missing.append(pattern)
    return missing


def _filled(numbers: set[Numbers], sizes: tuple[int, int] | None) -> set[Numbers]:
    """Return the numbers and those between them, if all differ in one position."""
    first = next(iter(numbers), ())
    varying = [
        position for position in range(len(first)) if len({value[position : position + 1] for value in numbers}) > 1
    ]
    if len(varying) != 1 or any(len(value) != len(first) for value in numbers):
        return numbers
    (position,) = varying
    stop = max(value[position] for value in numbers) + 1
    if sizes and sizes[0] == len(numbers):
        stop = max(stop, sizes[1])
    return {(*first[:position], number, *first[position + 1 :]) for number in range(stop)}


def _numbers(name: str) -> Numbers:
    return tuple(int(step) for step in name.split(".") if step.isdecimal())


def _numbered(name: str, numbers: Numbers) -> str:
    """Return a name with other numbers."""
    left = iter(numbers)
    return ".".join(str(next(left)) if step.isdecimal() else step for step in name.split("."))
