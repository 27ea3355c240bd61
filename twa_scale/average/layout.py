"""Matching a model with its candidates: which tensors are trained, which are fixed, and who shares coefficients."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from twa_scale.average.grouping import Experts, grouped
from twa_scale.base.names import matches_any, nearest, selected, some, without_wrappers
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
    """The part that each tensor of the model plays. The same on every rank."""

    groups: tuple[str, ...]
    """Names of the groups; the order is that of the columns of the coefficients."""
    group_of: dict[str, int]
    """Group of each trained tensor, by the model's name; see `Grouping`."""
    experts: dict[str, Experts]
    """Groups of the experts in the tensors that stack them, with `groups: expert`."""
    fixed: tuple[str, ...]
    """Parameters that stay at the center: frozen, or left out by `include` and `exclude`."""
    summed: frozenset[str]
    """Those of the fixed parameters that are the sum of what the candidates hold: the A of LoRA, where products are
    averaged."""
    kept: tuple[str, ...]
    """Parameters and buffers that no candidate has, which keep their value. Exports do not hold them."""
    base: tuple[str, ...]
    """Those of the base model of an adapter, which keep their value; its adapter is what candidates hold."""
    buffers: tuple[str, ...]
    """Buffers that the candidates hold, by the model's name."""
    held_as: dict[str, tuple[str, ...]]
    """The names under which the candidates hold each tensor of the model: a tied one may have several; the first is
    read."""

    def source(self, name: str) -> str:
        """Return the name under which a tensor is read."""
        return self.held_as[name][0]

    def group(self, span: Span) -> int:
        """Return the group of a trained span; with `groups: expert`, spans do not cross experts (`SplitEngine`)."""
        experts = self.experts.get(span.name)
        return self.group_of[span.name] if experts is None else experts.group(span)

    def groups_of(self, name: str) -> tuple[int, ...]:
        """Return the groups of the equal parts of a trained tensor: one, unless it stacks experts."""
        experts = self.experts.get(name)
        return (self.group_of[name],) if experts is None else experts.groups

    def read(self, spans: Iterable[Span]) -> list[Span]:
        """Return the spans of tensors that candidates hold."""
        return [span for span in spans if span.name in self.held_as]

    def in_candidates(self, span: Span) -> Span:
        """Return the span with the name of its tensor in the candidates."""
        return replace(span, name=self.source(span.name))


def alias_jobs(
    spans: Iterable[Span], layout: Layout, candidates: Sequence[Candidate]
) -> Iterator[tuple[Span, Sequence[int]]]:
    """Yield what is read of tied tensors under their other names, where these are stored apart."""
    for span in layout.read(spans):
        source, *aliases = layout.held_as[span.name]
        for alias in aliases:
            apart = [i for i, candidate in enumerate(candidates) if not stored_once(candidate, source, alias)]
            if apart:
                yield replace(span, name=alias), apart


def wanted_of(
    parameters: Mapping[str, ParameterInfo],
    buffers: Mapping[str, torch.Tensor],
    config: TwaConfig,
    module: nn.Module,
    adapter: LiveAdapter | None = None,
) -> Wanted:
    """Return which tensors of the candidates a model wants: all that are its own, and of tied ones any name.

    Args:
        parameters: of the model.
        buffers: that checkpoints of it hold.
        config: says what is ignored and renamed.
        module: the model, or what wraps it.
        adapter: that the model trains, if it has one.
    """
    ties = [info.aliases for info in parameters.values() if len(info.aliases) > 1]
    known = {alias for info in parameters.values() for alias in info.aliases} | set(buffers)
    known |= {name for names in (adapter.stored.values() if adapter else ()) for name in names}
    shapes = {name: info.shape for name, info in parameters.items()}
    held = {alias: info.shape for info in parameters.values() for alias in info.aliases}
    held |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    naming = Naming(
        rename=config.rename,
        prefix=config.prefix,
        # PEFT's own rules say how the tensors of an adapter are called in files.
        library=None if adapter else transformers_rules(named_modules(module), held),
        parameters=[] if adapter else [info.aliases for info in parameters.values()],
        buffers=list(buffers),
        shapes=held,
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
    """Find every tensor of the model in the candidates, which are known to be alike.

    Args:
        parameters: of the model.
        buffers: of the model.
        candidates: what is averaged.
        config: which tensors are left out, and what is made of those that are missing.
        adapter: what the model trains, if it has adapters: their names in files, and what may be missing.
        stacked: the tensors of the model that stack experts, for `groups: expert`.

    Raises:
        CandidateError: a tensor that is missing, left over or of another shape.
        ConfigError: patterns that match nothing, or that leave nothing to train.
    """
    held = [name for name in candidates[0].names() if not matches_any(name, config.ignore)]
    known = [*(alias for info in parameters.values() for alias in info.aliases), *buffers]
    found = _found(known, held, adapter.stored if adapter else {})
    may_be_missing = _may_be_missing(config, candidates[-1], found, adapter)
    used = set(found.values())
    leftover = [name for name in held if name not in used]
    hint = _prefix_hint(leftover, [name for name in known if name not in found]) if config.prefix is None else ""
    held_as = _held_as(parameters, found, held, candidates[0], may_be_missing, hint)
    found_buffers = _found_buffers(buffers, found, held, candidates[0], config, may_be_missing)
    _refuse_leftovers(leftover, known, candidates[0], hint)
    kept = [name for name in (*parameters, *buffers) if name not in held_as and name not in found_buffers]
    kept = [name for name in kept if may_be_missing(name)]
    base = [name for name in kept if adapter and not adapter.holds(name)]
    kept = [name for name in kept if not adapter or adapter.holds(name)]
    shapes = {name: info.shape for name, info in parameters.items()}
    wanted_shapes = {alias: shapes[name] for name, aliases in held_as.items() for alias in aliases}
    wanted_shapes |= {found[name]: tuple(buffers[name].shape) for name in found_buffers}
    _check_shapes(wanted_shapes, candidates[0])
    in_sum = summed(candidates[-1])
    all_summed = frozenset(name for name, (source, *_) in held_as.items() if source in in_sum)
    trainable = [name for name, info in parameters.items() if info.trainable and name in held_as]
    trained = selected([name for name in trainable if name not in all_summed], config.include, config.exclude)
    _require_any(trained, len(trainable), len(held_as), has_adapter=adapter is not None)
    grouping = grouped(trained, config.groups, shapes, stacked or {})
    return Layout(
        groups=grouping.groups,
        group_of=grouping.group_of,
        experts=grouping.experts,
        fixed=tuple(name for name in held_as if name not in grouping.group_of),
        summed=all_summed,
        kept=tuple(kept),
        base=tuple(base),
        buffers=found_buffers,
        held_as={**held_as, **{name: (found[name],) for name in found_buffers}},
    )


def _found(known: Sequence[str], held: Sequence[str], stored: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Map names of the model to those of the candidates; either may have "module." before all of them.

    `stored` has other names that tensors of the model may have in files.
    """
    by_key = {key: name for name, key in without_wrappers(held).items()}
    names = {name: (*stored.get(name, ()), plain) for name, plain in without_wrappers(known).items()}
    return {name: by_key[key] for name, keys in names.items() if (key := next((k for k in keys if k in by_key), ""))}


def _may_be_missing(
    config: TwaConfig, candidate: Candidate, found: Mapping[str, str], adapter: LiveAdapter | None
) -> Callable[[str], bool]:
    """Return what says whether a tensor of the model may be in no candidate, as `missing` says.

    Of a model with an adapter, whose candidates are adapters, all others may.
    """
    if config.missing == "keep":
        return lambda name: True
    if config.missing == "error" or adapter is None:
        return lambda name: False
    own = adapter
    if not adapter_config(candidate) and any(not own.holds(name) for name in found):
        return lambda name: False
    return lambda name: not own.holds(name)


def _found_buffers(
    buffers: Mapping[str, torch.Tensor],
    found: Mapping[str, str],
    held: list[str],
    first: Candidate,
    config: TwaConfig,
    may_be_missing: Callable[[str], bool],
) -> tuple[str, ...]:
    """Only counters may be missing, as BatchNorm's are in old checkpoints, or what `ignore` or `missing` allows."""
    for name, buffer in buffers.items():
        may_be = may_be_missing(name) or matches_any(name, config.ignore)
        if name not in found and buffer.is_floating_point() and not may_be:
            raise CandidateError(
                f"{first.label}: buffer {name!r} of the model is missing{nearest(name, held) or '.'} Save it with the "
                "candidates, or name it in `ignore` to keep the value that the model has."
            )
    return tuple(name for name in buffers if name in found)


def _held_as(
    parameters: Mapping[str, ParameterInfo],
    found: Mapping[str, str],
    held: list[str],
    first: Candidate,
    may_be_missing: Callable[[str], bool],
    hint: str,
) -> dict[str, tuple[str, ...]]:
    names = {name: tuple(found[a] for a in info.aliases if a in found) for name, info in parameters.items()}
    missing = [name for name, stored in names.items() if not stored and not may_be_missing(name)]
    if missing:
        raise CandidateError(
            f"{first.label}: tensor {missing[0]!r} of the model is missing{nearest(missing[0], held)} "
            f"({len(missing)} missing in all: {some(missing)}). Candidates must hold every parameter of the model; "
            f"with `missing: keep` what no candidate has keeps the value that the model has.{hint}"
        )
    return {name: stored for name, stored in names.items() if stored}


def _prefix_hint(leftover: Sequence[str], missing: Collection[str]) -> str:
    """Return how to name the prefix that most of the names in candidates have before those that the model misses."""
    prefix = likely_prefix(leftover, missing)
    if prefix is None or 2 * sum(name.removeprefix(prefix) in missing for name in leftover) < len(leftover):
        return ""
    return f" Names of the candidates have {prefix!r} before those of the model: set `prefix: {prefix}`."


def _refuse_leftovers(leftover: list[str], known: list[str], first: Candidate, hint: str) -> None:
    if leftover:
        raise CandidateError(
            f"{first.label}: the model has no tensor {leftover[0]!r}{nearest(leftover[0], known)} "
            f"({len(leftover)} such tensors: {some(leftover)}). Use the model that the candidates are of, or name "
            f"tensors to skip in `ignore`.{hint}"
        )


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], first: Candidate) -> None:
    for name, shape in shapes.items():
        if first.shape(name) != shape:
            raise CandidateError(
                f"{first.label}: tensor {name!r} has shape {first.shape(name)}, the model's is {shape}; candidates "
                "must be of the same architecture as the model."
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
