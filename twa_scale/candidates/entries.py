"""Classify the entries of a file by their keys: tensors at any depth, and those that belong to an optimizer."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from twa_scale.base.inputs import brief
from twa_scale.candidates.ema_lists import item_name

_MAX_DEPTH = 16
_MAX_CONTAINERS = 1_000_000
_MAX_KINDS = 2  # keys between an optimizer and the name of a weight
_STATE = re.compile(
    r"(optim|optims|opt|optimizer|optimizers)_states?(_dicts?)?"
    r"|(max_)?exp_avg(_sq)?(_row|_col)?|exp_inf|momentum_buffer|square_avg|grad_avg|acc_delta|master_(weights|params)|fp32_params?"
)
_OPTIMIZER = re.compile(r"optims?|optimizers?")  # also what somebody may call a module
_OPTIMIZER_OR_MODULE = re.compile(
    r"opts?|optims?|optimi[sz]ers?|(optimi[sz]er|optim)_\w+|\w+_(optimi[sz]er|optim)"
    r"|adamw?|adafactor|adagrad|lamb|lion|muon|rmsprop|sgd|shampoo|soap|sophia"
)
"""Further names of optimizers; what is below counts only where it has the names of weights."""

Keys = tuple[str, ...]
Shape = tuple[int, ...]


def flattened(
    content: Mapping[Any, Any], is_entry: Callable[[Any], bool], is_tensor: Callable[[Any], bool]
) -> dict[Keys, Any]:
    """Return each entry of nested mappings and lists by its path; what is under a key that is no name is left out.

    Args:
        content: the outermost mapping.
        is_entry: whether a value is a tensor, or an object that may hold one.
        is_tensor: whether it is a tensor.

    Raises:
        ValueError: containers that hold each other so often that they would never end, two tensors of one path, or
            tensors in one mapping of which only some have names.
    """
    found: dict[Keys, Any] = {}
    for path, value in _entries(content, is_entry, is_tensor):
        if path in found:
            raise ValueError(f"two tensors are called {'.'.join(path)!r}, under keys of different types")
        found[path] = value
    return found


def _entries(
    content: Mapping[Any, Any], is_entry: Callable[[Any], bool], is_tensor: Callable[[Any], bool]
) -> Iterator[tuple[Keys, Any]]:
    waiting: list[tuple[Keys, Mapping[Any, Any] | Sequence[Any]]] = [((), content)]
    for _ in range(_MAX_CONTAINERS):
        if not waiting:
            return
        prefix, inner = waiting.pop()
        items = inner.items() if isinstance(inner, Mapping) else ((item_name(i), held) for i, held in enumerate(inner))
        named, nameless = False, None
        for key, value in items:
            if not isinstance(key, str | int | float | None):  # the text of others differs from process to process
                nameless = key if is_tensor(value) and not is_tensor(key) else nameless
            elif is_entry(value):
                named = named or is_tensor(value)
                yield (*prefix, str(key)), value
            elif isinstance(value, Mapping | list | tuple) and len(prefix) < _MAX_DEPTH:
                waiting.append(((*prefix, str(key)), value))
        if named and nameless is not None:
            key = f"the key {brief(nameless)}" if isinstance(nameless, bytes) else f"a {type(nameless).__name__} as key"
            raise ValueError(f"the tensor under {key} has no name: only text and numbers are names")
    raise ValueError(f"it holds more than {_MAX_CONTAINERS} containers, counting each as often as it is referred to")


def is_optimizer_entry(path: Keys) -> bool:
    """Whether a key on the way to a tensor, or in its name, says that it belongs to an optimizer."""
    return _is_state(path) or any(_OPTIMIZER.fullmatch(part.lower()) for key in path for part in key.split("."))


def optimizer_entries(names: Sequence[str]) -> set[str]:
    """Return the names that belong to an optimizer by their keys, or as the state that one keeps of a tensor.

    A module may be called `optim` too: what is below such a key belongs to an optimizer when some of it does by its own
    name, or by the name of a tensor that stands elsewhere.
    """
    found = {name for name in names if _is_state((name,))}
    weights = set(names) - found
    below: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            if _OPTIMIZER_OR_MODULE.fullmatch(part.lower()) or (i == 0 and part in ("state", "param_groups")):
                below[".".join(parts[: i + 1])].append(name)
    for prefix, members in below.items():
        others = weights - set(members)
        of_weights = [name for name in members if _named_in(name[len(prefix) + 1 :], others)]
        if prefix in ("state", "param_groups"):
            found.update(of_weights)
        elif of_weights or found & set(members):
            found.update(members)
    return found


def _is_state(path: Keys) -> bool:
    return any(_STATE.fullmatch(part.lower()) for key in path for part in key.split("."))


def _named_in(rest: str, weights: Set[str]) -> bool:
    """Whether what follows the key of an optimizer is, or begins with, the name of a weight.

    A name with a dot may follow the kind of state, as in `m.` and `state.mu.`; `net.weight` is no state of `weight`.
    """
    for kind in ("state.", "param_groups."):
        rest = rest.removeprefix(kind)
    parts = rest.split(".")
    return any(
        ".".join(parts[first:last]) in weights
        for first in range(_MAX_KINDS + 1)
        for last in range(first + (2 if first else 1), len(parts) + 1)
    )
