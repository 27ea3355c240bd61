"""The state of running averages: the tensors of this rank, which are DTensors if the weights of the engine are."""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from twa_scale.base.names import nearest
from twa_scale.base.normal_mode import in_normal_mode
from twa_scale.base.spans import Span
from twa_scale.engines import Engine
from twa_scale.errors import StateError
from twa_scale.ranks import Pods, first_difference
from twa_scale.running.ema import Ema
from twa_scale.running.window import Window

VERSION = 1
_NONE = -1  # fills the places of snapshots that have not been taken yet

State = dict[str, Any]


def state_of(engine: Engine, step: int, ema: Ema | None, window: Window | None, broken: str = "") -> State:
    """Return the state: the tensors of the averages, not copies, and small tensors for the counters.

    The averages of a complete local shard of FSDP2 are DTensors with the name of the parameter, which
    torch.distributed.checkpoint reshards. All others are plain tensors whose keys contain the tensor's name and the
    range of elements, so that two ranks never write different values with the same key.

    Args:
        engine: holds the model.
        step: the number of steps counted so far.
        ema: exponential averages.
        window: snapshots.
        broken: the reason why the averages cannot be used, or an empty text.
    """
    settings = {
        "version": VERSION,
        "ema": ema and ema.settings.model_dump(mode="json"),
        "window": window and window.settings.model_dump(mode="json"),
        "broken": broken,
    }
    state: State = {
        "settings": json.dumps(settings, sort_keys=True),
        "step": torch.tensor(step),
        "layout": _layout(engine),
    }
    if ema:
        state["ema_updates"] = torch.tensor(ema.updates)
        state["ema"] = {
            name: {"weights": _by_key(engine, average), "buffers": dict(buffers)}
            for name, average, buffers in zip(ema.stored_names, ema.averages, ema.buffers, strict=True)
        }
    if window:
        state["window"] = _window_state(engine, window)
    return state


def _window_state(engine: Engine, window: Window) -> State:
    keep, stored = window.settings.keep, {span: window.rows_and_base(span) for span in window.spans}
    return {
        "steps": _padded(window.steps, keep),
        "order": _padded(window.order, keep - 1),
        "taken": torch.tensor(window.taken),
        "errors": {_errors_key(window): window.errors} if stored else {},
        "base": _by_key(engine, {span: base for span, (_, base) in stored.items()}),
        "rows": {_row_key(s, i): t for s, (rows, _) in stored.items() for i, t in enumerate(rows.tensors)},
        "buffers": dict(window.buffers),
    }


@in_normal_mode
def load(state: object, engine: Engine, ema: Ema | None, window: Window | None) -> int:
    """Load a state that `check` has accepted, and return its step. Not collective."""
    assert isinstance(state, Mapping)
    live_leaves = dict(_leaves(state_of(engine, 0, ema, window)))
    leaves = dict(_leaves(state))
    with torch.no_grad():
        for key, tensor in live_leaves.items():
            if isinstance(tensor, torch.Tensor):
                local(tensor).copy_(local(leaves[key]))
    if ema:
        ema.updates = int(state["ema_updates"])
    if window:
        window_state = state["window"]
        window.steps, window.order = _listed(window_state["steps"]), _listed(window_state["order"])
        window.taken = int(window_state["taken"])
    return int(state["step"])


def is_live(state: object, live_state: State) -> bool:
    """Return whether the tensors of a state share the memory of the tensors of `live_state`, a state of this object.

    torch.distributed.checkpoint reads into the tensors that `state_of` returned, and passes them to `load_state_dict`.
    """
    leaves, live_tensors = dict(_leaves(state)), _tensors(live_state)
    return all(
        isinstance(t := leaves.get(key), torch.Tensor) and _address(t) == _address(live_tensors[key])
        for key in live_tensors
    )


def versions(state: State) -> list[int]:
    """Return the number of writes of each tensor of a state."""
    return [local(tensor)._version for tensor in _tensors(state).values()]


def require_same_counters(pods: Pods, state: Mapping[str, Any]) -> None:
    """Check that the states of all ranks have the same steps. Collective.

    Raises:
        StateError: names the counter and two ranks, on every rank.
    """
    window_state = state.get("window", {})
    counters = {
        "step": int(state["step"]),
        "ema_updates": int(state.get("ema_updates", 0)),
        "steps of the window": _listed(window_state["steps"]) if window_state else [],
    }
    difference = first_difference(pods, counters)
    with pods.agree():
        if difference:
            raise StateError(
                f"the states of the ranks are of different steps: {difference.key} is {difference.local} on "
                f"{difference.location} and {difference.first} on {difference.first_location}. Load those that all "
                "ranks have saved together."
            )


def check(state: object, engine: Engine, ema: Ema | None, window: Window | None) -> None:
    """Check that a state belongs to these averages on this rank. Not collective.

    Raises:
        StateError: names the first key that is missing, unknown, damaged, or of another type or shape.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("settings"), str):
        raise StateError(
            "the state has no `settings`, so that it is not a state of RunningAverages. Give the result of "
            "state_dict()."
        )
    expected_state = state_of(engine, 0, ema, window)
    expected, leaves = dict(_leaves(expected_state)), dict(_leaves(state))
    _require_same_settings(json.loads(str(expected["settings"])), state["settings"])
    for key, tensor in expected.items():
        if key not in leaves:
            raise StateError(f"the state has no {key!r}{nearest(key, list(leaves)) or '.'} {_SETTINGS}")
        if isinstance(tensor, torch.Tensor):
            _require_same_kind(key, tensor, leaves[key])
    if unknown := [key for key in leaves if key not in expected]:
        raise StateError(f"the state has {unknown[0]!r}, which these averages do not hold. {_SETTINGS}")
    if leaves["layout"] != expected["layout"] and not is_live(state, expected_state):
        raise StateError(f"the state holds other parts of the weights than those of this rank. {_SETTINGS}")
    _require_counters(state, ema)
    if window:
        _require_window(state["window"], window.settings.keep, int(state["step"]))
        _require_finite(state["window"], window)


_SETTINGS = (
    "Each rank saves and loads its own state, for the same number of ranks; under FSDP2 "
    "torch.distributed.checkpoint reshards exponential averages, but a window needs the ranks that it was saved on: "
    "write its snapshots with save() to change their number."
)


def _require_same_settings(settings: Mapping[str, Any], text: str) -> None:
    try:
        saved = json.loads(text)
        pairs = {key: (settings[key], saved[key]) for key in ("version", "ema", "window")}
    except (ValueError, KeyError, TypeError):
        raise StateError("the state's `settings` are damaged. Give the result of state_dict().") from None
    for key, (current, stored) in pairs.items():
        if current != stored:
            raise StateError(
                f"the state was saved with {_text_of(key, stored, current)}, and these averages have "
                f"{_text_of(key, current, stored)}. Give the same settings, or remove the state (averages-*.pt in a "
                "checkpoint) to start new averages."
            )
    if saved.get("broken"):
        raise StateError(f"the state was saved when the averages could not be used: {saved['broken']}")


def _text_of(key: str, value: object, other: object) -> str:
    """Return a setting as text; of a group of settings, those that the other value does not have."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        value = {name: one for name, one in value.items() if other.get(name) != one}
    return f"{key}={json.dumps(value)}"


def _require_same_kind(key: str, expected: torch.Tensor, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise StateError(f"the state's {key!r} is a {type(value).__name__}; a tensor belongs there.")
    expected_local, local_value = local(expected), local(value)
    if (expected_local.shape, expected_local.dtype) != (local_value.shape, local_value.dtype):
        raise StateError(
            f"the state's {key!r} is {local_value.dtype} of shape {tuple(local_value.shape)}; {expected_local.dtype} "
            f"of shape {tuple(expected_local.shape)} belongs there."
        )


def _require_counters(state: Mapping[str, Any], ema: Ema | None) -> None:
    step, updates = int(state["step"]), int(state["ema_updates"]) if ema else 0
    if not 0 <= updates <= step:
        raise StateError(f"the state is damaged: it counts {step} steps and {updates} updates.")


def _require_window(window_state: Mapping[str, Any], keep: int, step: int) -> None:
    steps, order = _listed(window_state["steps"]), _listed(window_state["order"])
    rows = set(order)
    wrong = (
        steps != sorted(set(steps))
        or (steps and not 1 <= steps[0] <= steps[-1] <= step)
        or len(order) != max(len(steps) - 1, 0)
        or len(rows) < len(order)
        or not rows <= set(range(keep - 1))
        or int(window_state["taken"]) < len(steps)
    )
    if wrong:
        raise StateError(
            f"the state is damaged: the order of the snapshots in its window up to step {step} is not known."
        )


def _require_finite(window_state: Mapping[str, Any], window: Window) -> None:
    """Check that the snapshots are finite, unless their weights were not, which is recorded in their errors."""
    order = _listed(window_state["order"])
    if not window.spans or not bool(torch.isfinite(window_state["errors"][_errors_key(window)]).all()):
        return
    for span in window.spans:
        rows, _ = window.rows_and_base(span)
        norms = rows.over([window_state["rows"][_row_key(span, i)] for i in range(len(rows.tensors))])
        scales = [tile[-1][:, order] for tile in norms.tiles(0, rows.count)]  # or dense values
        if not all(bool(torch.isfinite(part).all()) for part in scales):
            raise StateError(f"the state is damaged: snapshots of tensor {span.name!r} are not finite.")
    for key, base in window_state["base"].items() if _listed(window_state["steps"]) else ():
        if not bool(torch.isfinite(local(base)).all()):
            raise StateError(f"the state is damaged: the oldest snapshot of tensor {key!r} is not finite.")


def _errors_key(window: Window) -> str:
    return f"of {_key(window.spans[0])}"


def _row_key(span: Span, i: int) -> str:
    return f"{_key(span)}.{i}"


def _leaves(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}/{key}" if prefix else str(key))


def _by_key(engine: Engine, tensors: Mapping[Span, torch.Tensor]) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for span, tensor in tensors.items():
        sharded = engine.sharded(span, tensor)
        result[_key(span) if sharded is None else span.name] = tensor if sharded is None else sharded
    return result


def _key(span: Span) -> str:
    runs = f":{span.run}:{span.stride}" if span.run else ""
    return f"{span.name}[{span.start}:{span.stop}{runs}]"


def _tensors(state: State) -> dict[str, torch.Tensor]:
    """Return the tensors of the averages by key, without counters."""
    parts = {key: state[key] for key in ("ema", "window") if key in state}
    counted = ("window/steps", "window/order", "window/taken")
    return {key: t for key, t in _leaves(parts) if isinstance(t, torch.Tensor) and key not in counted}


def _address(tensor: torch.Tensor) -> int:
    return local(tensor).data_ptr()


def _layout(engine: Engine) -> str:
    """Return a digest of the parts of tensors that this rank holds."""
    return sha256("\n".join(map(_key, engine.spans())).encode()).hexdigest()[:16]


def local(tensor: Any) -> torch.Tensor:
    """Return the part of a DTensor on this rank, and other values unchanged."""
    part: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def _padded(numbers: list[int], size: int) -> torch.Tensor:
    return torch.tensor(numbers + [_NONE] * (size - len(numbers)), dtype=torch.int64)


def _listed(numbers: torch.Tensor) -> list[int]:
    return [int(number) for number in numbers.tolist() if number != _NONE]
