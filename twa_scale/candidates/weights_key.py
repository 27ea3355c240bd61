"""Find the weights among the entries of a file: under a usual key, or under the key of the user."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from twa_scale.base.names import and_more, matches_any, nearest, quoted
from twa_scale.candidates.ema_lists import items_of, mismatch, parameters_of
from twa_scale.candidates.entries import Keys, Shape, is_optimizer_entry, optimizer_entries
from twa_scale.candidates.formats.megatron import without_chain
from twa_scale.errors import CandidateError

LIGHTNING_AVERAGE = "current_model_state"
"""The key of the weights of the training in files of Lightning's WeightAveraging."""
USUAL_KEYS = ("app", "state_dict", "model", "model_state_dict", "module")


class StateObject(NamedTuple):
    """An object of an unknown class in a file. Its content is not read."""

    kind: str
    """The name of its class."""
    shapes: Counter[Shape]
    """The shapes of the tensors in it."""


class WeightsKey:
    """A finder of the weights among the tensors of a file, which collects notices for the user.

    Args:
        key: the path of the weights, with dots between keys, from `weights_key`; None for the usual keys.
        parameters: names and shapes of the model's parameters in order, for lists without names.
        ignore: regular expressions of names to leave out.
    """

    def __init__(
        self, key: str | None = None, parameters: Mapping[str, Shape] | None = None, ignore: Sequence[str] = ()
    ) -> None:
        self.key = key
        self.ignored: set[str] = set()
        """The names of objects, lists and dicts among the weights that `ignore` leaves out."""
        self._ignore = ignore
        self._parameters = parameters or {}
        self._notices: dict[str, list[str]] = defaultdict(list)
        """The labels of candidates, by the notice about them."""

    def choose(
        self,
        shapes: Mapping[Keys, Shape],
        label: str,
        objects: Mapping[Keys, StateObject] | None = None,
        *,
        in_order: bool = True,
    ) -> dict[str, Keys]:
        """Return the paths of the weights in a file, by their names.

        Args:
            shapes: the shapes of all tensors in the file, by their paths.
            label: the name of the file for messages.
            objects: the other objects with tensors or arrays in the file, by their paths.
            in_order: whether `shapes` has the order of the state dict in the file.

        Raises:
            CandidateError: there are no tensors under the key, or more tensors deeper in the file; or a tensor is in
                an object or has no name.
        """
        objects = objects or {}
        paths = {path: path for path in shapes} if self.key is None else self._under_key(shapes, label, objects)
        weights = _descend(paths)
        if not weights:
            raise _not_found_error(shapes, label, objects)
        chosen = next(iter(weights.values()))[:-1]
        containers = _containers(chosen, shapes)
        others = {path: shape for path, shape in shapes.items() if path[: len(chosen) + 1] not in containers}
        # For example, `chosen` is a loss next to the weights, which are under another key.
        if _max_below(chosen, others, objects) > len(weights):
            raise _not_found_error(shapes, label, objects, other_tensors=list(weights))
        self._refuse_objects({path[-1]: item for path, item in objects.items() if path[:-1] == chosen}, label)
        self._refuse_containers({path[-1] for path in containers}, label)
        if (items := items_of(weights)) is not None:
            return self._named(items, ".".join(chosen), shapes, label, in_order=in_order)
        if self.key is None:
            self._remember(shapes, weights, label, objects)
        return weights

    def _under_key(
        self, shapes: Mapping[Keys, Shape], label: str, objects: Mapping[Keys, StateObject]
    ) -> dict[Keys, Keys]:
        assert self.key is not None
        paths = {rest: path for path in shapes if (rest := _after(path, self.key))} or _in_chains(
            shapes, self.key, label
        )
        if not paths:
            for path, item in objects.items():
                if f"{self.key}.".startswith(f"{'.'.join(path)}."):
                    raise CandidateError(
                        f"{label}: weights_key {self.key!r} is an object of class {item.kind}, whose content "
                        "is not read. Save its state_dict() instead."
                    )
            sets = sorted({".".join(path[:-1]) for path in shapes if len(path) > 1})
            hint = (
                f"tensors are under {quoted(sets)}" if sets else f"its keys are {quoted(sorted(p[0] for p in shapes))}"
            )
            raise CandidateError(
                f"{label}: weights_key {self.key!r} has no tensors under it; {hint}{nearest(self.key, sets) or '.'}"
            )
        return paths

    def _refuse_objects(self, others: Mapping[str, StateObject], label: str) -> None:
        """Refuse objects with tensors among the weights, except optimizers; report arrays, which are not read."""
        for name, item in others.items():
            if matches_any(name, self._ignore):
                self.ignored.add(name)
            elif item.shapes and not is_optimizer_entry((name,)):
                raise CandidateError(
                    f"{label}: {name!r} among the weights is an object of class {item.kind}, and numbers in it are "
                    "not read. Save a plain tensor, or its state_dict(), in its place."
                )
        arrays = [name for name, item in others.items() if not item.shapes and name not in self.ignored]
        if arrays:
            self._notices[f"{quoted(arrays)} among the weights are not torch tensors, and are not read."].append(label)

    def _refuse_containers(self, names: Set[str], label: str) -> None:
        """Refuse lists in which quantized modules of torch keep their weights; report others, which are not read."""
        ignored = {name for name in names if matches_any(name, self._ignore)}
        self.ignored |= ignored
        if packed := sorted(name for name in names - ignored if "_packed_params" in name):
            raise CandidateError(
                f"{label}: {packed[0]!r} among the weights is a list of tensors, in which quantized modules of torch "
                "keep their weights. Each weight has to be a separate tensor: save the state_dict() of the model "
                "before quantization."
            )
        if rest := sorted(names - ignored):
            self._notices[
                f"{quoted(rest)} among the weights are lists or dicts of tensors, such as the state of a metric, and "
                "are not read."
            ].append(label)

    def _named(
        self, items: Sequence[Keys], location: str, shapes: Mapping[Keys, Shape], label: str, *, in_order: bool
    ) -> dict[str, Keys]:
        """Name the items of a list by the parameters of a state dict in the same file, or by those of the model."""
        state_dict = _descend({path: path for path in shapes}) if in_order else {}
        if items_of(state_dict) is not None:
            state_dict = {}
        named = {name: shapes[state_dict[name]] for name in parameters_of(list(state_dict))}
        reason = "there is no state dict next to it"
        empty: dict[str, Keys] = {}
        ways = (named, state_dict, "in the state dict next to it"), (self._parameters, empty, "of the model")
        for names, rest, source in ways:
            if names and (wrong := mismatch(items, names, shapes.__getitem__)):
                reason = f"{wrong} {source}"
            elif names:
                others = "; all other tensors are those next to it" if rest else ""
                self._notices[
                    f"the list {location!r} has no names: its {len(items)} tensors are taken for the parameters "
                    f"{source}, in their order, which have the same shapes{others}."
                ].append(label)
                return {**rest, **dict(zip(names, items, strict=True))}
        raise CandidateError(
            f"{label}: {location!r} is a list of tensors without names, as classes for EMA keep it. They can be named "
            f"by order only, from a state dict in the same file or from the model, and {reason}. Copy them into the "
            "model (`ema.copy_to(model.parameters())`), and save its state_dict()."
        )

    def _remember(
        self, shapes: Mapping[Keys, Shape], weights: Mapping[str, Keys], label: str, objects: Mapping[Keys, StateObject]
    ) -> None:
        """Collect a notice if other sets of tensors may be weights of the same model."""
        chosen = next(iter(weights.values()))[:-1]
        wanted = Counter(shapes[path] for path in weights.values())
        sets: dict[Keys, Counter[Shape]] = defaultdict(Counter)
        for path, shape in shapes.items():
            if path[:-1] != chosen and len(path) > 1 and not is_optimizer_entry(path):
                sets[path[:-1]][shape] += 1
        sets |= {path: item.shapes for path, item in objects.items() if not is_optimizer_entry(path)}
        similar = [".".join(path) for path, item in sets.items() if _are_similar(item, wanted)]
        if similar:
            detail = ", the averages that Lightning's WeightAveraging keeps" if LIGHTNING_AVERAGE in similar else ""
            location = ".".join(chosen) or "the top level"
            self._notices[
                f"the weights are those under {location!r}{detail}; tensors of the same shapes are "
                f"also under {quoted(similar)}. Set `weights_key` to read those."
            ].append(label)

    def notices(self) -> Iterator[str]:
        """Yield the collected notices, each with the labels of its candidates."""
        for line, labels in self._notices.items():
            yield f"{and_more(labels)}: {line}"


def _max_below(chosen: Keys, shapes: Mapping[Keys, Shape], objects: Mapping[Keys, StateObject]) -> int:
    """Return the largest number of tensors under one key below `chosen`, without those directly under `chosen`."""
    depth = len(chosen)
    counts: Counter[str] = Counter()
    numbers = dict.fromkeys(shapes, 1) | {path: item.shapes.total() for path, item in objects.items()}
    for path, number in numbers.items():
        if path[:depth] == chosen and len(path) > depth + 1 and not is_optimizer_entry(path):
            counts[path[depth]] += number
    return max(counts.values(), default=0)


def _containers(chosen: Keys, shapes: Mapping[Keys, Shape]) -> set[Keys]:
    """Return the paths of the lists and dicts of tensors that have a name among the weights.

    A key without a dot may be a counter, or another set of weights next to these. Results of `get_extra_state` of a
    module are never read.
    """
    depth = len(chosen)
    return {
        path[: depth + 1]
        for path in shapes
        if path[:depth] == chosen
        and len(path) > depth + 1
        and "." in path[depth]
        and not path[depth].endswith("_extra_state")
        and not is_optimizer_entry(path)
    }


def _not_found_error(
    shapes: Mapping[Keys, Shape], label: str, objects: Mapping[Keys, StateObject], other_tensors: Sequence[str] = ()
) -> CandidateError:
    """Return the error for a file whose weights are not found. `other_tensors` are too few to be weights."""
    keys = quoted(sorted({".".join(path[:1]) for path in (*shapes, *objects)}))
    state = optimizer_entries([".".join(path) for path in shapes])
    if shapes and len(state) == len(shapes) and not objects:
        return CandidateError(
            f"{label}: holds the state of an optimizer only ({quoted(sorted(state))}). Give a file of weights."
        )
    sets = sorted({".".join(path[:-1]) for path in shapes if len(path) > 1 and ".".join(path) not in state})
    hint = f" There are tensors under {quoted(sets)}: name one as `weights_key`." if sets else ""
    described = [f"{'.'.join(path)!r} ({item.kind})" for path, item in objects.items() if not is_optimizer_entry(path)]
    if described:
        hint += f" The content of objects is not read: {', '.join(described[:4])}."
    only = f" but {quoted(other_tensors)} where weights are looked for" if other_tensors else ""
    return CandidateError(
        f"{label}: holds no tensors{only}, neither by name nor under one of {quoted(USUAL_KEYS, 6)}; its keys are "
        f"{keys or 'none at all'}.{hint} Save {{'model': model.state_dict()}}, or the state dict itself."
    )


def _descend(paths: Mapping[Keys, Keys]) -> dict[str, Keys]:
    """Follow the usual keys, nested in any order, and return the paths at the end by name."""
    prefix: Keys = ()
    while True:
        depth = len(prefix)
        inner = next((k for k in USUAL_KEYS if any(p[depth] == k and len(p) > depth + 1 for p in paths)), None)
        if inner is None:
            break
        paths = {rest: path for rest, path in paths.items() if rest[depth] == inner and len(rest) > depth + 1}
        prefix = (*prefix, inner)
    return {rest[-1]: path for rest, path in paths.items() if len(rest) == len(prefix) + 1}


def _after(path: Keys, key: str) -> Keys:
    """Return the rest of a path after `key`; empty if the path does not begin with it."""
    for i, part in enumerate(path):
        if part == key:
            return path[i + 1 :]
        if part.startswith(f"{key}."):
            return (part[len(key) + 1 :], *path[i + 1 :])
        if not key.startswith(f"{part}."):
            return ()
        key = key[len(part) + 1 :]
    return ()


def _in_chains(shapes: Mapping[Keys, Shape], key: str, label: str) -> dict[Keys, Keys]:
    """Return the paths below a key of any of the chained optimizers of Megatron-LM, by the rest after the key.

    Raises:
        CandidateError: two optimizers have the same path.
    """
    paths: dict[Keys, Keys] = {}
    for path in shapes:
        if (rest := _after(without_chain(path), key)) and (other := paths.setdefault(rest, path)) != path:
            raise CandidateError(
                f"{label}: weights_key {key!r} takes both {'.'.join(other)!r} and {'.'.join(path)!r}, but each weight "
                "has one copy. Name one optimizer too, as in chained_0.optimizer.state.param."
            )
    return paths


def _are_similar(shapes: Counter[Shape], expected: Counter[Shape]) -> bool:
    """Return whether `shapes` has at least half of the `expected` shapes, and few others.

    They need not be equal, because EMA weights often lack buffers or have a step counter.
    """
    common = (shapes & expected).total()
    return 2 * common >= expected.total() and 2 * common > shapes.total()
