"""Matching a model with its candidates: which tensors are trained, which are fixed, and who shares coefficients."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from twa_scale.base.names import group_names, matches_any, nearest, selected, some, without_wrappers
from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate, Wanted
from twa_scale.candidates.live_names import Naming
from twa_scale.candidates.proxy import stored_once
from twa_scale.candidates.transformers_rules import transformers_rules
from twa_scale.config import TwaConfig
from twa_scale.engines import ParameterInfo
from twa_scale.engines.module_names import named_modules
from twa_scale.errors import CandidateError, ConfigError


@dataclass(frozen=True)
class Layout:
    """The part that each tensor of the model plays. The same on every rank."""

    groups: tuple[str, ...]
    """Names of the groups; the order is that of the columns of the coefficients."""
    group_of: dict[str, int]
    """Group of each trained tensor, by the model's name."""
    fixed: tuple[str, ...]
    """Parameters that stay at the center: frozen, or left out by `include` and `exclude`."""
    buffers: tuple[str, ...]
    """Buffers that the candidates hold, by the model's name."""
    held_as: dict[str, tuple[str, ...]]
    """The names under which the candidates hold each tensor of the model: a tied one may have several; the first is
    read."""

    def source(self, name: str) -> str:
        """Return the name under which a tensor is read."""
        return self.held_as[name][0]

    def sourced(self, span: Span) -> Span:
        """Return the span under the name under which it is read."""
        return replace(span, name=self.source(span.name))


def alias_jobs(
    spans: Iterable[Span], layout: Layout, candidates: Sequence[Candidate]
) -> Iterator[tuple[Span, Sequence[int]]]:
    """Yield what is read of tied tensors under their other names, where these are stored apart."""
    for span in spans:
        source, *aliases = layout.held_as[span.name]
        for alias in aliases:
            apart = [i for i, candidate in enumerate(candidates) if not stored_once(candidate, source, alias)]
            if apart:
                yield replace(span, name=alias), apart


def wanted_of(
    parameters: Mapping[str, ParameterInfo], buffers: Mapping[str, torch.Tensor], config: TwaConfig, module: nn.Module
) -> Wanted:
    """Return which tensors of the candidates a model wants: all that are its own, and of tied ones any name.

    Args:
        parameters: of the model.
        buffers: that checkpoints of it hold.
        config: says what is ignored and renamed.
        module: the model, or what wraps it.
    """
    ties = [info.aliases for info in parameters.values() if len(info.aliases) > 1]
    known = {alias for info in parameters.values() for alias in info.aliases} | set(buffers)
    shapes = {name: info.shape for name, info in parameters.items()}
    held = {alias: info.shape for info in parameters.values() for alias in info.aliases}
    held |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    naming = Naming(
        rename=config.rename,
        prefix=config.prefix,
        library=transformers_rules(named_modules(module), held),
        parameters=[info.aliases for info in parameters.values()],
        buffers=list(buffers),
    )
    return Wanted(config.weights_key, config.ignore, known, shapes, ties, naming)


def match(
    parameters: Mapping[str, ParameterInfo],
    buffers: Mapping[str, torch.Tensor],
    candidates: Sequence[Candidate],
    config: TwaConfig,
) -> Layout:
    """Find every tensor of the model in the candidates, which are known to be alike.

    Raises:
        CandidateError: a tensor that is missing, left over or of another shape.
        ConfigError: patterns that match nothing, or that leave nothing to train.
    """
    held = [name for name in candidates[0].names() if not matches_any(name, config.ignore)]
    known = [*(alias for info in parameters.values() for alias in info.aliases), *buffers]
    found = _found(known, held)
    held_as = _held_as(parameters, found, held, candidates[0])
    found_buffers = _found_buffers(buffers, found, held, candidates[0], config)
    used = set(found.values())
    _refuse_leftovers([name for name in held if name not in used], known, candidates[0])
    for name, info in parameters.items():
        for alias in held_as[name]:
            _check_shape(alias, info.shape, candidates[0])
    for name in found_buffers:
        _check_shape(found[name], tuple(buffers[name].shape), candidates[0])
    trainable = [name for name, info in parameters.items() if info.trainable]
    trained = selected(trainable, config.include, config.exclude)
    if not trained:
        raise ConfigError(
            f"nothing to train: of {len(parameters)} parameters {len(trainable)} require a gradient, and include and "
            "exclude leave none of them. Widen the patterns, or set requires_grad."
        )
    by_group = group_names(trained, config.groups)
    groups = tuple(dict.fromkeys(by_group.values()))
    return Layout(
        groups=groups,
        group_of={name: groups.index(group) for name, group in by_group.items()},
        fixed=tuple(name for name in parameters if name not in by_group),
        buffers=found_buffers,
        held_as={**held_as, **{name: (found[name],) for name in found_buffers}},
    )


def _found(known: Sequence[str], held: Sequence[str]) -> dict[str, str]:
    """Map names of the model to those of the candidates; either may have "module." before all of them."""
    by_key = {key: name for name, key in without_wrappers(held).items()}
    return {name: by_key[key] for name, key in without_wrappers(known).items() if key in by_key}


def _found_buffers(
    buffers: Mapping[str, torch.Tensor], found: Mapping[str, str], held: list[str], first: Candidate, config: TwaConfig
) -> tuple[str, ...]:
    """Only counters may be missing, as BatchNorm's are in old checkpoints, or what `ignore` names."""
    for name, buffer in buffers.items():
        if name not in found and buffer.is_floating_point() and not matches_any(name, config.ignore):
            raise CandidateError(
                f"{first.label}: buffer {name!r} of the model is missing{nearest(name, held) or '.'} Save it with the "
                "candidates, or name it in `ignore` to keep the value that the model has."
            )
    return tuple(name for name in buffers if name in found)


def _held_as(
    parameters: Mapping[str, ParameterInfo], found: Mapping[str, str], held: list[str], first: Candidate
) -> dict[str, tuple[str, ...]]:
    names = {name: tuple(found[a] for a in info.aliases if a in found) for name, info in parameters.items()}
    missing = [name for name, stored in names.items() if not stored]
    if missing:
        raise CandidateError(
            f"{first.label}: tensor {missing[0]!r} of the model is missing{nearest(missing[0], held)} "
            f"({len(missing)} missing in all: {some(missing)}). Candidates must hold every parameter of the model."
        )
    return names


def _refuse_leftovers(leftover: list[str], known: list[str], first: Candidate) -> None:
    if leftover:
        raise CandidateError(
            f"{first.label}: the model has no tensor {leftover[0]!r}{nearest(leftover[0], known)} "
            f"({len(leftover)} such tensors: {some(leftover)}). Use the model that the candidates are of, or name "
            "tensors to skip in `ignore`."
        )


def _check_shape(name: str, shape: tuple[int, ...], first: Candidate) -> None:
    if first.shape(name) != shape:
        raise CandidateError(
            f"{first.label}: tensor {name!r} has shape {first.shape(name)}, the model's is {shape}; candidates must "
            "be of the same architecture as the model."
        )


def require_same_kinds(
    layout: Layout,
    model: Mapping[str, torch.dtype],
    complex_in_model: Collection[str],
    first: Candidate,
    complex_in_files: Collection[str],
) -> None:
    """Refuse a tensor that is complex, floating point or integer in the model, and another of these in the candidates.

    Args:
        layout: the tensors of the model that candidates hold.
        model: the types of the model's tensors.
        complex_in_model: names of those that are pairs of real numbers here, and complex in the model.
        first: one of the candidates, which are known to be alike.
        complex_in_files: names of those that are complex there.

    Raises:
        CandidateError: names the tensor.
    """
    for name in layout.held_as:
        source = layout.source(name)
        found = _kind(first.dtype(source), source in complex_in_files)
        wanted = _kind(model[name], name in complex_in_model)
        if found != wanted:
            raise CandidateError(
                f"{first.label}: tensor {source!r} is {found}, the model's is {wanted}; candidates must be of the same "
                "architecture as the model, and be saved in types of the same kind."
            )


def _kind(dtype: torch.dtype, pairs: bool) -> str:
    return "complex" if pairs else "floating point" if dtype.is_floating_point else "integer"
