"""The state of running averages: this rank's tensors, as DTensors where the engine's weights are."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from twa_scale.base.names import nearest
from twa_scale.base.spans import Span
from twa_scale.engines import Engine
from twa_scale.errors import StateError
from twa_scale.output.publish import output_errors
from twa_scale.running.ema import Ema
from twa_scale.running.window import Window

VERSION = 1
_NONE = -1  # in the place of a step or a row that is not there yet

State = dict[str, Any]


def state_of(engine: Engine, step: int, ema: Ema | None, window: Window | None) -> State:
    """Return the state: live tensors, not copies, and small ones for the counters.

    The averages of a whole local shard of FSDP2 are DTensors under the parameter's name, which torch's distributed
    checkpoints reshard. Everything else is a plain tensor whose key says which elements of which tensor it holds, so
    that no two ranks write different values under one key.
    """
    settings = {
        "version": VERSION,
        "ema": ema and ema.settings.model_dump(mode="json"),
        "window": window and window.settings.model_dump(mode="json"),
    }
    state: State = {"settings": json.dumps(settings, sort_keys=True), "step": torch.tensor(step)}
    if ema:
        state["ema_updates"] = torch.tensor(ema.updates)
        state["ema"] = {
            name: {"weights": _by_key(engine, average), "buffers": dict(buffers)}
            for name, average, buffers in zip(ema.names, ema.averages, ema.buffers, strict=True)
        }
    if window:
        state["window"] = _window_state(engine, window)
    return state


def _window_state(engine: Engine, window: Window) -> State:
    keep, held = window.settings.keep, {span: window.held(span) for span in window.spans}
    return {
        "steps": _padded(window.steps, keep),
        "order": _padded(window.order, keep - 1),
        "taken": torch.tensor(window.taken),
        "errors": {f"of {_key(next(iter(held)))}": window.errors} if held else {},
        "base": _by_key(engine, {span: base for span, (_, base) in held.items()}),
        "rows": {f"{_key(s)}.{i}": t for s, (rows, _) in held.items() for i, t in enumerate(rows.tensors)},
        "buffers": dict(window.buffers),
    }


def load(state: object, engine: Engine, ema: Ema | None, window: Window | None) -> int:
    """Take over a state that `check` has passed, and return its step. Not collective."""
    assert isinstance(state, Mapping)
    own = dict(_leaves(state_of(engine, 0, ema, window)))
    given = dict(_leaves(state))
    with torch.no_grad():
        for key, tensor in own.items():
            if isinstance(tensor, torch.Tensor):
                _local(tensor).copy_(_local(given[key]))
    if ema:
        ema.updates = int(state["ema_updates"])
    if window:
        held = state["window"]
        window.steps, window.order = _listed(held["steps"]), _listed(held["order"])
        window.taken = int(held["taken"])
    return int(state["step"])


def check(state: object, engine: Engine, ema: Ema | None, window: Window | None) -> None:
    """Refuse a state that is not one of these averages on this rank. Not collective.

    Raises:
        StateError: names the first key that is missing, unknown or of another type or shape.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("settings"), str):
        raise StateError("the state has no `settings`: it is none of RunningAverages. Give what state_dict() returned.")
    own, given = dict(_leaves(state_of(engine, 0, ema, window))), dict(_leaves(state))
    _require_same_settings(json.loads(str(own["settings"])), state["settings"])
    for key, tensor in own.items():
        if key not in given:
            raise StateError(
                f"the state has no {key!r}{nearest(key, list(given)) or '.'} Each rank saves and loads a state of its "
                "own, for the same number of ranks; under FSDP2 torch.distributed.checkpoint reshards exponential "
                "averages, but a window needs the ranks that it was saved on: write its snapshots with save() to "
                "change their number."
            )
        if isinstance(tensor, torch.Tensor):
            _require_alike(key, tensor, given[key])
    if unknown := [key for key in given if key not in own]:
        raise StateError(f"the state has {unknown[0]!r}, which these averages do not hold; load it on its own rank.")
    if window:
        _require_window(state["window"], window.settings.keep)


def write_file(state: State, directory: Path, rank: int, size: int) -> None:
    """Write a rank's state to a file of its own, which is complete or not there.

    Raises:
        OutputError: the disk is full, or fails.
    """
    path = directory / _file_name(rank, size)
    with output_errors(path):
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(_plain(state), temporary)
        temporary.replace(path)


def read_file(directory: Path, rank: int, size: int) -> State | None:
    """Return the state of a rank, or None where the directory holds none of any rank.

    Raises:
        StateError: the states of another number of ranks, or a file that cannot be read.
    """
    path = directory / _file_name(rank, size)
    if not path.exists():
        others = sorted(directory.glob("averages-*-of-*.pt"))
        if not others:
            return None
        raise StateError(
            f"{directory}: holds {others[0].name}, but no {path.name}: each rank saves a file of its own. Resume with "
            "the same number of ranks, or delete these files to begin the averages anew."
        )
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise StateError(f"{path}: cannot be read ({error}). Resume from another checkpoint.") from error
    return state


def _file_name(rank: int, size: int) -> str:
    return f"averages-{rank:05d}-of-{size:05d}.pt"


def _plain(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return _local(tree)


def _require_same_settings(own: Mapping[str, Any], text: str) -> None:
    try:
        saved = json.loads(text)
        pairs = {key: (own[key], saved[key]) for key in ("version", "ema", "window")}
    except (ValueError, KeyError, TypeError):
        raise StateError("the state's `settings` are damaged. Give what state_dict() returned.") from None
    for key, (mine, theirs) in pairs.items():
        if mine != theirs:
            raise StateError(
                f"the state was saved with {key}={json.dumps(theirs)}, and this object has {json.dumps(mine)}; make "
                "RunningAverages with the same settings."
            )


def _require_alike(key: str, own: torch.Tensor, given: object) -> None:
    if not isinstance(given, torch.Tensor):
        raise StateError(f"the state's {key!r} is a {type(given).__name__}; a tensor belongs there.")
    mine, theirs = _local(own), _local(given)
    if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        raise StateError(
            f"the state's {key!r} is {theirs.dtype} of shape {tuple(theirs.shape)}; {mine.dtype} of shape "
            f"{tuple(mine.shape)} belongs there."
        )


def _require_window(held: Mapping[str, Any], keep: int) -> None:
    steps, order = _listed(held["steps"]), _listed(held["order"])
    rows = set(order)
    wrong = (
        steps != sorted(set(steps))
        or len(order) != max(len(steps) - 1, 0)
        or len(rows) < len(order)
        or not rows <= set(range(keep - 1))
        or int(held["taken"]) < len(steps)
    )
    if wrong:
        raise StateError("the state's window does not say in which order its snapshots were taken: it is damaged.")


def _leaves(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}/{key}" if prefix else str(key))


def _by_key(engine: Engine, tensors: Mapping[Span, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for span, tensor in tensors.items():
        sharded = engine.sharded(span, tensor)
        found[_key(span) if sharded is None else span.name] = tensor if sharded is None else sharded
    return found


def _key(span: Span) -> str:
    runs = f":{span.run}:{span.stride}" if span.run else ""
    return f"{span.name}[{span.start}:{span.stop}{runs}]"


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _padded(numbers: list[int], size: int) -> torch.Tensor:
    return torch.tensor(numbers + [_NONE] * (size - len(numbers)), dtype=torch.int64)


def _listed(numbers: torch.Tensor) -> list[int]:
    return [int(number) for number in numbers.tolist() if number != _NONE]
