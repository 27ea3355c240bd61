"""Classify the entries of a file by their keys: tensors at any depth, and those that belong to an optimizer."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from twa_scale.base.inputs import brief
from twa_scale.candidates.ema_lists import item_name

_MAX_DEPTH = 16
_MAX_CONTAINERS = 1_000_000
_STATE = re.compile(
    r"(optim|optims|opt|optimizer|optimizers)_states?(_dicts?)?"
    r"|(max_)?exp_avg(_sq)?(_row|_col)?|exp_inf|momentum_buffer|square_avg|grad_avg|acc_delta|master_(weights|params)|fp32_params?"
)
_OPTIMIZER = re.compile(r"optims?|optimizers?")  # a module may have such a name, too
_OPTIMIZER_OR_MODULE = re.compile(
    r"opts?|optims?|optimi[sz]ers?|(optimi[sz]er|optim)_\w+|\w+_(optimi[sz]er|optim)"
    r"|adamw?|adafactor|adagrad|lamb|lion|muon|rmsprop|sgd|shampoo|soap|sophia"
)
"""Further names of optimizers, which modules may also have; see `optimizer_entries`."""
_KIND = re.compile(
    rf"{_STATE.pattern}|[mvsz]|max_v|mu|nu|v[rc]|param|fp32|trace|momentum|velocity|variance|sum|sum_of_squares"
    r"|accumulator|(first_|second_)?moment[12]?|exp_avg_(diff|slow|fast)"
)
"""Kinds of state that optimizers keep for a weight. They follow the optimizer or the name of the weight."""
_BETWEEN = re.compile(r"\d+|state|inner_state|param_groups")
"""Keys between an optimizer and the kind of state or the name of a weight."""
_SINGLE = re.compile(r"steps?|count|lr|betas|eps|weight_decay|loss_scale")
"""State that optimizers keep once, not for each weight."""
_MIN_FRACTION = 0.9  # the fraction of tensors below a key that must be state for an optimizer

Keys = tuple[str, ...]
Shape = tuple[int, ...]


def flattened(
    content: Mapping[Any, Any], is_entry: Callable[[Any], bool], is_tensor: Callable[[Any], bool]
) -> dict[Keys, Any]:
    """Return each entry of nested mappings and lists by its path. Values under keys that are not names are left out.

    Args:
        content: the outermost mapping.
        is_entry: whether a value is a tensor, or an object that may hold one.
        is_tensor: whether it is a tensor.

    Raises:
        ValueError: containers contain each other too often, two tensors have one path, or only some tensors of a
            mapping have names.
    """
    result: dict[Keys, Any] = {}
    for path, value in _entries(content, is_entry, is_tensor):
        if path in result:
            raise ValueError(f"two tensors are called {'.'.join(path)!r}, under keys of different types")
        result[path] = value
    return result


def _entries(
    content: Mapping[Any, Any], is_entry: Callable[[Any], bool], is_tensor: Callable[[Any], bool]
) -> Iterator[tuple[Keys, Any]]:
    waiting: list[tuple[Keys, Mapping[Any, Any] | Sequence[Any]]] = [((), content)]
    for _ in range(_MAX_CONTAINERS):
        if not waiting:
            return
        prefix, inner = waiting.pop()
        items = (
            inner.items() if isinstance(inner, Mapping) else ((item_name(i), entry) for i, entry in enumerate(inner))
        )
        named, nameless = False, None
        for key, value in items:
            if not isinstance(key, str | int | float | None):  # the text of other keys differs between processes
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
    """Return whether a key in the path or name of a tensor shows that it belongs to an optimizer."""
    return _is_state(path) or any(_OPTIMIZER.fullmatch(part.lower()) for key in path for part in key.split("."))


def optimizer_entries(names: Sequence[str]) -> set[str]:
    """Return the names that belong to an optimizer, by their keys or as the state of another tensor.

    A module may have the name of an optimizer, too. Names below such a key are returned only if nine in ten of them are
    state of tensors elsewhere; see `_is_state_of`. The others of them may be weights, and are not returned. Below
    `optim` or `optimizer`, all names are returned if one name, such as `exp_avg`, is a kind of state.
    """
    result = {name for name in names if _is_state((name,))}
    named, weights = frozenset(result), set(names) - result
    by_parent: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            if _OPTIMIZER_OR_MODULE.fullmatch(part.lower()) or (i == 0 and part in ("state", "param_groups")):
                by_parent[".".join(parts[: i + 1])].append(name)
    for prefix, members in by_parent.items():
        others = weights - set(members)
        copies = _OPTIMIZER.fullmatch(prefix.split(".")[-1].lower()) is not None
        rests = {name: name[len(prefix) + 1 :] for name in members}
        states = {name for name, rest in rests.items() if name in result or _is_state_of(rest, others, copies=copies)}
        shared = {
            name
            for name, rest in rests.items()
            if _SINGLE.fullmatch(rest.split(".")[-1]) or (copies and _BETWEEN.fullmatch(rest.split(".")[0]))
        }
        if copies and not named.isdisjoint(members):
            result.update(members)
        elif states and len(states) >= _MIN_FRACTION * len(states | (set(members) - shared)):
            result.update(states | shared)
    return result


def _is_state(path: Keys) -> bool:
    return any(_STATE.fullmatch(part.lower()) for key in path for part in key.split("."))


def _is_state_of(rest: str, weights: Set[str], *, copies: bool) -> bool:
    """Return whether the keys after an optimizer name a weight, with a kind of state before or after it.

    Only names with dots are accepted, except before a kind: `opt.mu.weight` and `opt.net.weight` may be other modules
    next to `weight`. No module has tensors below the name of a weight, so these count for any kind.

    Args:
        rest: the keys after the key of the optimizer.
        weights: the names of the tensors elsewhere.
        copies: whether the name of a weight without a kind counts, as a copy of the weight.
    """
    parts = rest.split(".")
    while parts and (_BETWEEN.fullmatch(parts[0]) or _OPTIMIZER_OR_MODULE.fullmatch(parts[0].lower())):
        del parts[0]
    before = bool(parts) and _is_kind(parts[0])
    names = parts[1:] if before else parts
    for end in range(1, len(names) + 1):
        if ".".join(names[:end]) in weights:
            after = end < len(names)
            return (end > 1 and (before or after or copies)) or (after and _is_kind(names[-1]))
    return False


def _is_kind(key: str) -> bool:
    return _KIND.fullmatch(key.lower()) is not None
