"""Tensor names: removing the prefixes of wrappers, selecting tensors by pattern, and assigning them to groups."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import takewhile

from twa_scale.errors import ConfigError

# Attributes of wrappers that torch and fairscale insert into a path. No model has attributes of these names.
_INNER = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")
_OUTER = "module."
# The part of a name that is a router, not the gate projection of an expert ("gate_up_proj").
_ROUTER = re.compile(r"router|routing|gating|gates?(_weight)?$")
_BIAS = re.compile(r"bias(es)?$")

REST = "rest"


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Map each name of a state dict to the name without the prefixes of wrappers.

    The attributes of FSDP1, fairscale, torch.compile and activation checkpointing are removed anywhere in a name. The
    "module." of DDP and DeepSpeed is removed only if all names start with it, because models may have an attribute of
    this name, as `torch.optim.swa_utils.AveragedModel` does.
    """
    plain = {name: _INNER.sub("", name) for name in names}
    while plain and all(name.startswith(_OUTER) for name in plain.values()):
        plain = {raw: name.removeprefix(_OUTER) for raw, name in plain.items()}
    return plain


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name closest to `name`, or an empty string."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def quoted(names: Iterable[str], limit: int = 4) -> str:
    """Return the first `limit` names, quoted, and the number of further names, as text for messages."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def and_more(labels: Sequence[str]) -> str:
    """Return the first label and the number of further labels, as text for messages."""
    return labels[0] + (f" and {len(labels) - 1} more" if len(labels) > 1 else "")


def plural(count: int, noun: str) -> str:
    """Return a regular noun in the form that goes with a number, which is not part of it."""
    return noun if count == 1 else f"{noun}s"


def without_common_folders(labels: Sequence[str]) -> list[str]:
    """Return paths without the folders that all of them begin with; a single path is only its name."""
    parts = [label.split("/") for label in labels]
    folders = zip(*(names[:-1] for names in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda at: len(set(at)) == 1, folders))
    return ["/".join(names[shared:]) or label for names, label in zip(parts, labels, strict=True)]


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Return whether one of the regular expressions matches anywhere in `name`."""
    return any(re.search(pattern, name) for pattern in patterns)


def selected(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the names that `include` matches, or all if it is empty, without those that `exclude` matches, in order.

    Raises:
        ConfigError: a pattern matches no tensor.
    """
    for key, patterns in (("include", include), ("exclude", exclude)):
        refuse_unused(key, patterns, names)
    return [n for n in names if (not include or matches_any(n, include)) and not matches_any(n, exclude)]


def group_names(names: Sequence[str], groups: str | Sequence[str]) -> dict[str, str]:
    """Map each tensor name to the name of its group.

    Args:
        names: the tensor names.
        groups: the setting of TwaConfig. `block` takes the path up to the first number ("layers.3"), or the top module
            of a tensor outside of blocks. `expert` takes the path of an expert with its number ("layers.3.experts.7"),
            and for other tensors that of the block. In a list of regular expressions the first match is used, and
            tensors without a match form the group "rest". `tensor+row` has the groups of `tensor`.

    Raises:
        ConfigError: a pattern matches no tensor.
    """
    groups = groups.removesuffix("+row") if isinstance(groups, str) else groups
    if groups == "global":
        return dict.fromkeys(names, "global")
    if groups == "tensor":
        return {name: name for name in names}
    if groups == "block":
        return {name: _block(name) for name in names}
    if groups == "expert":
        return {name: expert_of(name) or _block(name) for name in names}
    assert not isinstance(groups, str)
    refuse_unused("groups", groups, names)
    return {name: next((p for p in groups if re.search(p, name)), REST) for name in names}


def _block(name: str) -> str:
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: depth + 1])
    return parts[0]


def experts_path(name: str) -> tuple[str | None, str | None]:
    """Return the path of the experts in a name, "layers.3.experts", and the number that follows it; None if missing.

    Of several parts of a name, the first with a number counts: "experts.deepspeed_experts.0". Shared experts, which see
    every token, are none of them, nor are routers ("expert_gate") and their biases ("expert_bias").
    """
    parts, result = name.split("."), None
    for depth, part in enumerate(parts, 1):
        if "expert" not in part or "shared" in part or is_router(part) or _BIAS.search(part):
            continue
        path = ".".join(parts[:depth])
        if depth < len(parts) and parts[depth].isdigit():
            return path, parts[depth]
        if result is None and "experts" in part:
            result = path
    return result, None


def is_router(part: str) -> bool:
    """Return whether a part of a name is that of a router: "gate", "expert_choice_router"."""
    return _ROUTER.search(part) is not None


def expert_of(name: str) -> str | None:
    """Return the path of the expert that a tensor belongs to, "layers.3.experts.7", or None if there is none."""
    path, number = experts_path(name)
    return None if number is None else f"{path}.{number}"


def refuse_unused(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that every pattern matches a tensor.

    Raises:
        ConfigError: a pattern matches no tensor.
    """
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"{key}: the pattern {pattern!r} matches none of the {len(names)} tensors. Each pattern must match "
                f"at least one, so that nothing is done by mistake. Names look like {quoted(names)}."
            )
