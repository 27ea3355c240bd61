"""Which entries of a file are the weights: those under a usual key, or under the one that the user names."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from twa_scale.errors import CandidateError
from twa_scale.names import and_more, nearest, some

USUAL = ("app", "state_dict", "model", "model_state_dict", "module")
_MAX_DEPTH = 16
_MAX_CONTAINERS = 1_000_000
_STATE = re.compile(
    r"(optim|optims|opt|optimizer|optimizers)_states?(_dicts?)?"
    r"|(max_)?exp_avg(_sq)?(_row|_col)?|exp_inf|momentum_buffer|square_avg|grad_avg|acc_delta|master_(weights|params)"
)
_OPTIMIZER = re.compile(r"optims?|optimizers?")  # also what somebody may call a module

Path = tuple[str, ...]
Shape = tuple[int, ...]


class WeightsKey:
    """Finds the weights among the tensors of a file, and remembers what else holds tensors of the same shapes.

    Args:
        key: the path of the weights, with dots between keys, as `weights_key` gives it; None for the usual ones.
    """

    def __init__(self, key: str | None = None) -> None:
        self.key = key
        self.others: dict[str, list[str]] = defaultdict(list)
        """By what was found beside the weights: the candidates in which it was."""

    def choose(self, shapes: Mapping[Path, Shape], label: str) -> dict[str, Path]:
        """Map the names of the weights to the paths of their entries in a file.

        Raises:
            CandidateError: there are no tensors where the weights should be.
        """
        below = {path: path for path in shapes} if self.key is None else self._under_key(shapes, label)
        found = _descend(below)
        if not found:
            keys = some(sorted({".".join(path[:1]) for path in shapes}))
            sets = sorted({".".join(path[:-1]) for path in shapes if len(path) > 1 and not is_optimizer_entry(path)})
            hint = f" There are tensors under {some(sets)}: name one as `weights_key`." if sets else ""
            raise CandidateError(
                f"{label}: holds no tensors, neither by name nor under one of {some(USUAL, 6)}; its keys are "
                f"{keys or 'none at all'}.{hint} Save {{'model': model.state_dict()}}, or the state dict itself."
            )
        if self.key is None:
            self._remember(shapes, found, label)
        return found

    def _under_key(self, shapes: Mapping[Path, Shape], label: str) -> dict[Path, Path]:
        assert self.key is not None
        below = {rest: path for path in shapes if (rest := _after(path, self.key))}
        if not below:
            sets = sorted({".".join(path[:-1]) for path in shapes if len(path) > 1})
            there = f"tensors are under {some(sets)}" if sets else f"its keys are {some(sorted(p[0] for p in shapes))}"
            raise CandidateError(
                f"{label}: weights_key {self.key!r} has no tensors under it; {there}{nearest(self.key, sets)}."
            )
        return below

    def _remember(self, shapes: Mapping[Path, Shape], found: Mapping[str, Path], label: str) -> None:
        """Remember sets of tensors that look like other weights of the same model."""
        chosen = next(iter(found.values()))[:-1]
        wanted = Counter(shapes[path] for path in found.values())
        sets: dict[Path, Counter[Shape]] = defaultdict(Counter)
        for path, shape in shapes.items():
            if path[:-1] != chosen and len(path) > 1 and not is_optimizer_entry(path):
                sets[path[:-1]][shape] += 1
        alike = [".".join(path) for path, held in sets.items() if _alike(held, wanted)]
        if alike:
            self.others[f"{'.'.join(chosen) or 'the top level'!r}\0{some(alike)}"].append(label)

    def notices(self) -> Iterator[str]:
        """Yield a line for each kind of file that holds several sets of weights."""
        for both, labels in self.others.items():
            chosen, others = both.split("\0")
            yield (
                f"{and_more(labels)}: the weights are those under {chosen}; tensors of the same shapes are also under "
                f"{others}. Set `weights_key` to read those."
            )


def flattened(content: Mapping[Any, Any], is_tensor: Callable[[Any], bool]) -> Iterator[tuple[Path, Any]]:
    """Yield the path and value of each tensor in nested mappings and lists.

    Raises:
        ValueError: containers that hold each other so often that they would never end.
    """
    waiting: list[tuple[Path, Mapping[Any, Any] | Sequence[Any]]] = [((), content)]
    for _ in range(_MAX_CONTAINERS):
        if not waiting:
            return
        prefix, inner = waiting.pop()
        items = inner.items() if isinstance(inner, Mapping) else ((f"[{i}]", item) for i, item in enumerate(inner))
        for key, value in items:
            if is_tensor(value):
                yield (*prefix, str(key)), value
            elif isinstance(value, Mapping | list | tuple) and len(prefix) < _MAX_DEPTH:
                waiting.append(((*prefix, str(key)), value))
    raise ValueError(f"it holds more than {_MAX_CONTAINERS} containers, counting each as often as it is referred to")


def is_optimizer_entry(path: Path) -> bool:
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
            if _OPTIMIZER.fullmatch(part.lower()) or (i == 0 and part in ("state", "param_groups")):
                below[".".join(parts[: i + 1])].append(name)
    for prefix, members in below.items():
        others = weights - set(members)
        of_weights = [name for name in members if _named_in(name[len(prefix) + 1 :], others)]
        if prefix in ("state", "param_groups"):
            found.update(of_weights)
        elif of_weights or found & set(members):
            found.update(members)
    return found


def _is_state(path: Path) -> bool:
    return any(_STATE.fullmatch(part.lower()) for key in path for part in key.split("."))


def _named_in(rest: str, weights: Set[str]) -> bool:
    """Whether what follows the key of an optimizer is, or begins with, the name of a weight."""
    for kind in ("state.", "param_groups."):
        rest = rest.removeprefix(kind)
    return any(rest[:i] in weights for i, letter in enumerate(f"{rest}.") if letter == ".")


def _descend(below: Mapping[Path, Path]) -> dict[str, Path]:
    """Return what is at the end of the chain of usual keys, which may be nested in any way: paths by name."""
    prefix: Path = ()
    while True:
        depth = len(prefix)
        inner = next((k for k in USUAL if any(p[depth] == k and len(p) > depth + 1 for p in below)), None)
        if inner is None:
            break
        below = {rest: path for rest, path in below.items() if rest[depth] == inner and len(rest) > depth + 1}
        prefix = (*prefix, inner)
    return {rest[-1]: path for rest, path in below.items() if len(rest) == len(prefix) + 1}


def _after(path: Path, key: str) -> Path:
    """Return what follows `key` in a path, or nothing where the path does not begin with it."""
    for i, part in enumerate(path):
        if part == key:
            return path[i + 1 :]
        if part.startswith(f"{key}."):
            return (part[len(key) + 1 :], *path[i + 1 :])
        if not key.startswith(f"{part}."):
            return ()
        key = key[len(part) + 1 :]
    return ()


def _alike(held: Counter[Shape], wanted: Counter[Shape]) -> bool:
    """Whether half of the wanted shapes are there, and not much else: averages often lack buffers, or count steps."""
    common = (held & wanted).total()
    return 2 * common >= wanted.total() and 2 * common > held.total()
