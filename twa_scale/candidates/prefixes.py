"""Add prefixes to tensor names and remove them, and find the prefix that names have."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from twa_scale.candidates.traced import Traced
from twa_scale.errors import CandidateError

Tensors = dict[str, Traced]


def by_new_name(tensors: Mapping[str, Traced], new: Callable[[str], str], subject: str, fix: str) -> Tensors:
    """Return the tensors by new names, which must be different.

    Args:
        tensors: the tensors by name.
        new: returns the new name of a name.
        subject: the subject of the error message: the setting that changes names.
        fix: the advice of the error message.

    Raises:
        CandidateError: two names become the same.
    """
    renamed: Tensors = {}
    old: dict[str, str] = {}
    for name, tensor in tensors.items():
        if (other := old.setdefault(new(name), name)) != name:
            raise CandidateError(
                f"{subject} makes {new(name)!r} of both {other!r} and {name!r}. Each tensor needs a different name: "
                f"{fix}."
            )
        renamed[new(name)] = tensor
    return renamed


def remove_prefix(tensors: Mapping[str, Traced], prefix: str, label: str) -> Tensors:
    """Return the tensors by their names without the prefix. Names that do not have it are unchanged.

    Raises:
        CandidateError: two names become the same.
    """
    subject = f"{label}: taking off the prefix {prefix!r}"
    return by_new_name(tensors, lambda name: name.removeprefix(prefix), subject, choose_prefix(prefix))


def add_prefix(tensors: Mapping[str, Traced], prefix: str, known: Iterable[str], label: str) -> Tensors:
    """Return the tensors by their names with the prefix, if these are known. Other names are unchanged.

    Raises:
        CandidateError: two names become the same.
    """
    added = {name.removeprefix(prefix) for name in known}
    subject = f"{label}: the prefix {prefix!r} of the model's names"
    fix = "give one of them another name with `rename`, and name it in `ignore`"
    return by_new_name(tensors, lambda name: prefix + name if name in added else name, subject, fix)


def choose_prefix(prefix: str) -> str:
    """Return the fix for the case that names with and without a prefix refer to one tensor."""
    return f"set `prefix: {prefix}` to read only names that have it"


def likely_prefix(names: Iterable[str], known: Collection[str]) -> str | None:
    """Return the prefix that most of the names have before one of `known`, or None if no name has one."""
    counts: Counter[str] = Counter()
    for name in names:
        steps = name.split(".")
        counts.update(
            name.removesuffix(rest) for depth in range(1, len(steps)) if (rest := ".".join(steps[depth:])) in known
        )
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default=None)


def common_prefixes(names: Sequence[str]) -> list[str]:
    """Return the prefixes that all names have. They consist of whole components of the path."""
    steps = names[0].split(".")[:-1] if names else []
    prefixes = [".".join(steps[: depth + 1]) + "." for depth in range(len(steps))]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]
