"""Assign tensors to groups, and with `groups: expert` the parts of tensors that stack experts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from twa_scale.base.names import expert_of, group_names, quoted
from twa_scale.base.spans import Span
from twa_scale.engines.stacked_experts import StackedExperts
from twa_scale.errors import ConfigError


@dataclass(frozen=True)
class Experts:
    """The groups of the experts that are stacked in a tensor: equal parts along its first dimension."""

    size: int
    """The number of elements of an expert in the tensor."""
    groups: tuple[int, ...]
    """The group of each expert."""

    def group(self, span: Span) -> int:
        """Return the group of a span inside one expert. For an empty span, any group is valid."""
        return self.groups[min(span.start // self.size, len(self.groups) - 1)] if self.size else self.groups[0]


@dataclass(frozen=True)
class Grouping:
    """The groups of the trained tensors."""

    groups: tuple[str, ...]
    """The names of the groups, in the order of the columns of the coefficients."""
    group_of: dict[str, int]
    """The group of each tensor. For a tensor that stacks experts, the group of the first expert."""
    experts: dict[str, Experts]
    """The groups of experts, for each tensor that stacks experts with groups of their own."""


def group_tensors(
    trained: Sequence[str],
    groups: str | Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    stacked: Mapping[str, StackedExperts],
) -> Grouping:
    """Divide the trained tensors into groups.

    Args:
        trained: the names of the tensors, in the order of the model.
        groups: the setting.
        shapes: the shapes of tensors of the model.
        stacked: for `groups: expert`, the tensors of the model that stack experts.

    Raises:
        ConfigError: a pattern matches nothing, or `groups` is `expert` and the model has no trained experts.
    """
    names = group_names(trained, groups)
    if groups == "expert" and not any(name in stacked or expert_of(name) for name in trained):
        raise ConfigError(
            f"groups: 'expert' is set, but none of the {len(trained)} trained tensors belongs to an expert: they "
            "are neither in modules such as `experts.0`, nor stacked as (experts, ..) in a module such as `experts`. "
            f"Names look like {quoted(trained)}. Use block or tensor, or regular expressions."
        )
    of_expert = {
        name: [f"{stacked[name].path}.{i}" for i in range(stacked[name].number)] if name in stacked else [names[name]]
        for name in trained
    }
    index = {
        group: i
        for i, group in enumerate(dict.fromkeys(g for expert_groups in of_expert.values() for g in expert_groups))
    }
    return Grouping(
        groups=tuple(index),
        group_of={name: index[expert_groups[0]] for name, expert_groups in of_expert.items()},
        experts={
            name: Experts(prod(shapes[name]) // len(expert_groups), tuple(index[group] for group in expert_groups))
            for name, expert_groups in of_expert.items()
            if name in stacked
        },
    )


def experts_line(groups: Sequence[str], trained: Collection[str], stacked: Collection[str]) -> str:
    """Return a line about the tensors that have coefficients for each expert.

    Args:
        groups: the names of the groups.
        trained: the names of the trained tensors.
        stacked: the names of the trained tensors that stack experts.
    """
    experts = [group for group in groups if expert_of(f"{group}.")]
    layers = dict.fromkeys(group.rpartition(".")[0] for group in experts)
    others = [name for name in trained if name not in stacked and not expert_of(name)]
    rest = f"the other {len(others)} tensors ({quoted(others, 2)}) have the coefficients of their block"
    return (
        f"groups: expert: {len(experts)} experts in {len(layers)} layers ({quoted(layers, 2)}) have coefficients of "
        f"their own; {rest if others else 'there are no other trained tensors'}."
    )


def unequal_line(shapes: Mapping[str, tuple[int, ...]], experts: Mapping[str, Experts]) -> str | None:
    """Return a line about tensors that stack no experts, in modules with tensors that do; None if there are none.

    Args:
        shapes: the shapes of the trained tensors.
        experts: the groups of the tensors that stack experts.
    """
    counts = {name.rpartition(".")[0]: len(tensor.groups) for name, tensor in experts.items()}
    others = {
        name: (shape[0], counts[owner])
        for name, shape in shapes.items()
        if len(shape) > 2 and name not in experts and (owner := name.rpartition(".")[0]) in counts
    }
    if not others:
        return None
    size, count = next(iter(others.values()))
    return (
        f"groups: expert: {quoted(others)} next to stacked experts have the coefficients of their block: the first "
        f"size is {size}, and other tensors of the module stack {count} experts. If {count} is not the number of "
        "experts, give the module the attribute `num_experts`."
    )
