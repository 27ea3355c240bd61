"""Match the tensors of a model with those of the candidates: trained and fixed tensors, buffers and groups."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from twa_scale.average.grouping import Experts, group_tensors
from twa_scale.base.names import matches_any, nearest, quoted, selected, without_wrappers
from twa_scale.base.spans import Span
from twa_scale.candidates import Candidate, Wanted
from twa_scale.candidates.adapters import adapter_config, summed
from twa_scale.candidates.live_names import Naming
from twa_scale.candidates.prefixes import likely_prefix
from twa_scale.candidates.proxy import stored_once
from twa_scale.candidates.transformers_rules import transformers_rules
from twa_scale.config import TwaConfig
from twa_scale.engines import ParameterInfo
from twa_scale.engines.live_adapter import LiveAdapter
from twa_scale.engines.module_names import named_modules
from twa_scale.engines.stacked_experts import StackedExperts
from twa_scale.errors import CandidateError, ConfigError


@dataclass(frozen=True)
class Layout:
    """The role of each tensor of the model, which is equal on every rank."""

    groups: tuple[str, ...]
    """The names of the groups, in the order of the columns of the coefficients."""
    group_of: dict[str, int]
    """The group of each trained tensor, by its name in the model; see `Grouping`."""
    experts: dict[str, Experts]
    """The groups of experts in the tensors that stack experts, with `groups: expert`."""
    fixed: tuple[str, ...]
    """Parameters that keep the value of the center: they are frozen, or left out by `include` and `exclude`."""
    summed: frozenset[str]
    """The fixed parameters that are sums over the candidates: the A of LoRA, if products are averaged."""
    kept: tuple[str, ...]
    """Parameters and buffers that are in no candidate. They keep their value, and exports do not contain them."""
    base: tuple[str, ...]
    """Parameters and buffers of the base model of an adapter, which keep their value. Candidates are adapters."""
    buffers: tuple[str, ...]
    """Buffers that the candidates contain, by their names in the model."""
    names_in_candidates: dict[str, tuple[str, ...]]
    """The names of each tensor of the model in the candidates. A tied tensor may have several. The first is read."""

    def source(self, name: str) -> str:
        """Return the name of a tensor in the candidates from which it is read."""
        return self.names_in_candidates[name][0]

    def group(self, span: Span) -> int:
        """Return the group of a trained span; with `groups: expert`, spans do not cross experts (`SplitEngine`)."""
        experts = self.experts.get(span.name)
        return self.group_of[span.name] if experts is None else experts.group(span)

    def groups_of(self, name: str) -> tuple[int, ...]:
        """Return the groups of the equal parts of a trained tensor: one, unless it stacks experts."""
        experts = self.experts.get(name)
        return (self.group_of[name],) if experts is None else experts.groups

    def read(self, spans: Iterable[Span]) -> list[Span]:
        """Return the spans of tensors that candidates contain."""
        return [span for span in spans if span.name in self.names_in_candidates]

    def in_candidates(self, span: Span) -> Span:
        """Return the span with the name of its tensor in the candidates."""
        return replace(span, name=self.source(span.name))


def alias_jobs(
    spans: Iterable[Span], layout: Layout, candidates: Sequence[Candidate]
) -> Iterator[tuple[Span, Sequence[int]]]:
    """Yield the reads of tied tensors under their other names, if these are stored separately."""
    for span in layout.read(spans):
        source, *aliases = layout.names_in_candidates[span.name]
        for alias in aliases:
            separate = [i for i, candidate in enumerate(candidates) if not stored_once(candidate, source, alias)]
            if separate:
                yield replace(span, name=alias), separate


def wanted_tensors(
    parameters: Mapping[str, ParameterInfo],
    buffers: Mapping[str, torch.Tensor],
    config: TwaConfig,
    module: nn.Module,
    adapter: LiveAdapter | None = None,
) -> Wanted:
    """Return the tensors that a model needs from the candidates: all of its own, and one name of each tied tensor.

    Args:
        parameters: the parameters of the model.
        buffers: the buffers that its checkpoints contain.
        config: the names that are ignored and renamed.
        module: the model, or its wrapper.
        adapter: the adapter that the model trains, if it has one.
    """
    ties = [info.aliases for info in parameters.values() if len(info.aliases) > 1]
    known = {alias for info in parameters.values() for alias in info.aliases} | set(buffers)
    known |= {name for names in (adapter.stored.values() if adapter else ()) for name in names}
    shapes = {name: info.shape for name, info in parameters.items()}
    alias_shapes = {alias: info.shape for info in parameters.values() for alias in info.aliases}
    alias_shapes |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    naming = Naming(
        rename=config.rename,
        prefix=config.prefix,
        # PEFT defines the names of the tensors of an adapter in files.
        library=None if adapter else transformers_rules(named_modules(module), alias_shapes),
        parameters=[] if adapter else [info.aliases for info in parameters.values()],
        buffers=list(buffers),
        shapes=alias_shapes,
    )
    return Wanted(config.weights_key, config.ignore, known, shapes, ties, naming, space=config.space)


def match(
    parameters: Mapping[str, ParameterInfo],
    buffers: Mapping[str, torch.Tensor],
    candidates: Sequence[Candidate],
    config: TwaConfig,
    adapter: LiveAdapter | None = None,
    stacked: Mapping[str, StackedExperts] | None = None,
) -> Layout:
    """Find every tensor of the model in the candidates, which have been checked to have the same tensors.

    Args:
        parameters: the parameters of the model.
        buffers: the buffers of the model.
        candidates: the candidates.
        config: the settings for tensors that are left out or missing.
        adapter: the adapter that the model trains, if it has one: its names in files, and the tensors that may be
            missing.
        stacked: the tensors of the model that stack experts, for `groups: expert`.

    Raises:
        CandidateError: a tensor is missing, unknown to the model, or has another shape.
        ConfigError: a pattern matches nothing, or no tensor is left to train.
    """
    candidate_names = [name for name in candidates[0].names() if not matches_any(name, config.ignore)]
    known = [*(alias for info in parameters.values() for alias in info.aliases), *buffers]
    matches = _match_names(known, candidate_names, adapter.stored if adapter else {})
    may_be_missing = _may_be_missing(config, candidates[-1], matches, adapter)
    used = set(matches.values())
    leftover = [name for name in candidate_names if name not in used]
    hint = _prefix_hint(leftover, [name for name in known if name not in matches]) if config.prefix is None else ""
    stored_as = _stored_names(parameters, matches, candidate_names, candidates[0], may_be_missing, hint)
    found_buffers = _match_buffers(buffers, matches, candidate_names, candidates[0], config, may_be_missing)
    _refuse_leftovers(leftover, known, candidates[0], hint)
    kept = [name for name in (*parameters, *buffers) if name not in stored_as and name not in found_buffers]
    kept = [name for name in kept if may_be_missing(name)]
    base = [name for name in kept if adapter and not adapter.holds(name)]
    kept = [name for name in kept if not adapter or adapter.holds(name)]
    shapes = {name: info.shape for name, info in parameters.items()}
    wanted_shapes = {alias: shapes[name] for name, aliases in stored_as.items() for alias in aliases}
    wanted_shapes |= {matches[name]: tuple(buffers[name].shape) for name in found_buffers}
    _check_shapes(wanted_shapes, candidates[0])
    in_sum = summed(candidates[-1])
    all_summed = frozenset(name for name, (source, *_) in stored_as.items() if source in in_sum)
    trainable = [name for name, info in parameters.items() if info.trainable and name in stored_as]
    trained = selected([name for name in trainable if name not in all_summed], config.include, config.exclude)
    _require_any(trained, len(trainable), len(stored_as), has_adapter=adapter is not None)
    grouping = group_tensors(trained, config.groups, shapes, stacked or {})
    return Layout(
        groups=grouping.groups,
        group_of=grouping.group_of,
        experts=grouping.experts,
        fixed=tuple(name for name in stored_as if name not in grouping.group_of),
        summed=all_summed,
        kept=tuple(kept),
        base=tuple(base),
        buffers=found_buffers,
        names_in_candidates={**stored_as, **{name: (matches[name],) for name in found_buffers}},
    )


def _match_names(
    known: Sequence[str], candidate_names: Sequence[str], stored: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Map the names of the model to those of the candidates. All names of either may have the prefix "module.".

    `stored` has further names that tensors of the model may have in files.
    """
    by_key = {key: name for name, key in without_wrappers(candidate_names).items()}
    names = {name: (*stored.get(name, ()), plain) for name, plain in without_wrappers(known).items()}
    return {name: by_key[key] for name, keys in names.items() if (key := next((k for k in keys if k in by_key), ""))}


def _may_be_missing(
    config: TwaConfig, candidate: Candidate, matches: Mapping[str, str], adapter: LiveAdapter | None
) -> Callable[[str], bool]:
    """Return a function that returns whether a tensor of the model may be missing in the candidates.

    The setting `missing` decides. If the candidates are adapters, all tensors of the base model may be missing.
    """
    if config.missing == "keep":
        return lambda name: True
    if config.missing == "error" or adapter is None:
        return lambda name: False
    adapter_names = adapter
    if not adapter_config(candidate) and any(not adapter_names.holds(name) for name in matches):
        return lambda name: False
    return lambda name: not adapter_names.holds(name)


def _match_buffers(
    buffers: Mapping[str, torch.Tensor],
    matches: Mapping[str, str],
    candidate_names: list[str],
    first: Candidate,
    config: TwaConfig,
    may_be_missing: Callable[[str], bool],
) -> tuple[str, ...]:
    """Return the buffers in the candidates. Only counters and those of `ignore` and `missing` may be missing."""
    for name, buffer in buffers.items():
        may_be = may_be_missing(name) or matches_any(name, config.ignore)
        if name not in matches and buffer.is_floating_point() and not may_be:
            raise CandidateError(
                f"{first.label}: buffer {name!r} of the model is missing{nearest(name, candidate_names) or '.'} Save "
                "it with the candidates, or name it in `ignore` to keep the value that the model has."
            )
    return tuple(name for name in buffers if name in matches)


def _stored_names(
    parameters: Mapping[str, ParameterInfo],
    matches: Mapping[str, str],
    candidate_names: list[str],
    first: Candidate,
    may_be_missing: Callable[[str], bool],
    hint: str,
) -> dict[str, tuple[str, ...]]:
    names = {name: tuple(matches[a] for a in info.aliases if a in matches) for name, info in parameters.items()}
    missing = [name for name, stored in names.items() if not stored and not may_be_missing(name)]
    if missing:
        raise CandidateError(
            f"{first.label}: tensor {missing[0]!r} of the model is missing{nearest(missing[0], candidate_names)} "
            f"({len(missing)} missing in all: {quoted(missing)}). Candidates must contain every parameter of the "
            f"model. With `missing: keep`, parameters that no candidate has keep their value in the model.{hint}"
        )
    return {name: stored for name, stored in names.items() if stored}


def _prefix_hint(leftover: Sequence[str], missing: Collection[str]) -> str:
    """Return advice to set `prefix`, if most names in the candidates are missing names of the model after a prefix."""
    prefix = likely_prefix(leftover, missing)
    if prefix is None or 2 * sum(name.removeprefix(prefix) in missing for name in leftover) < len(leftover):
        return ""
    return f" Names in the candidates are those of the model after {prefix!r}: set `prefix: {prefix}`."


def _refuse_leftovers(leftover: list[str], known: list[str], first: Candidate, hint: str) -> None:
    if leftover:
        raise CandidateError(
            f"{first.label}: the model has no tensor {leftover[0]!r}{nearest(leftover[0], known)} "
            f"({len(leftover)} such tensors: {quoted(leftover)}). Use the model of the candidates, or name tensors to "
            f"skip in `ignore`.{hint}"
        )


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], first: Candidate) -> None:
    for name, shape in shapes.items():
        if first.shape(name) != shape:
            raise CandidateError(
                f"{first.label}: tensor {name!r} has shape {first.shape(name)}, the model's is {shape}; candidates "
                "must have the architecture of the model."
            )


def _require_any(trained: Sequence[str], num_trainable: int, num_parameters: int, *, has_adapter: bool) -> None:
    if not trained:
        raise ConfigError(
            f"nothing to train: of {num_parameters} parameters {num_trainable} require a gradient, and include and "
            "exclude leave none of them. Widen the patterns, or set requires_grad"
            f"{' (PeftModel.from_pretrained(.., is_trainable=True))' if has_adapter else ''}."
        )


def require_same_kinds(
    layout: Layout,
    model: Mapping[str, torch.dtype],
    complex_in_model: Collection[str],
    first: Candidate,
    complex_in_files: Collection[str],
) -> None:
    """Check that each tensor is of the same kind in model and candidates: complex, floating point or integer.

    Args:
        layout: the tensors of the model that candidates contain.
        model: the types of the model's tensors.
        complex_in_model: the names of complex tensors of the model, which are pairs of real numbers in `model`.
        first: one of the candidates, which have been checked to have the same tensors.
        complex_in_files: the names of tensors that are complex in the candidates.

    Raises:
        CandidateError: a tensor is of another kind. The message names it.
    """
    for name in layout.names_in_candidates:
        source = layout.source(name)
        stored_kind = _kind(first.dtype(source), source in complex_in_files)
        wanted = _kind(model[name], name in complex_in_model)
        if stored_kind != wanted:
            raise CandidateError(
                f"{first.label}: tensor {source!r} is {stored_kind}, the model's is {wanted}; candidates must have the "
                "architecture of the model, and types of the same kind."
            )


def _kind(dtype: torch.dtype, pairs: bool) -> str:
    return "complex" if pairs else "floating point" if dtype.is_floating_point else "integer"
