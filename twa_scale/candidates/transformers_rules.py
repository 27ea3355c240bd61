"""The conversions of tensors that transformers applies when it loads or saves a model of one of its classes.

The code of transformers is run on traced tensors.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from twa_scale.base.names import quoted
from twa_scale.candidates.numbered import missing_tensors
from twa_scale.candidates.traced import Traced
from twa_scale.candidates.transformers_api import LIBRARY, has_rules, transformers_api, version
from twa_scale.errors import CandidateError

Modules = Iterable[tuple[str, nn.Module]]
Shapes = Mapping[str, tuple[int, ...]]

_OUTDATED = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$")  # buffers that are no longer stored
_FIX = (
    "Give candidates that hold the tensors of the model itself: model.save_pretrained(.., save_original_format=False), "
    "or torch.save(model.state_dict(), ..)."
)


class TransformersRules:
    """The rules of a model of transformers, which may be a part of the module that is averaged.

    Args:
        modules: all modules, with their names without wrappers.
        shapes: the shapes of all parameters and buffers of the whole module that checkpoints contain, by each name.
        prefix: the prefix of the names of this model in the whole module.
        model: the model of a class of transformers.
    """

    def __init__(self, modules: Modules, shapes: Shapes, prefix: str, model: nn.Module) -> None:
        self.prefix = prefix
        own_shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        submodules = [(f"{path}.".removeprefix(prefix)[:-1], m) for path, m in modules if f"{path}.".startswith(prefix)]
        self._model = _ShapeModel(
            _as_its_class(model), own_shapes, [(path, _as_its_class(m)) for path, m in submodules]
        )
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._unexpected = [_OUTDATED, *map(re.compile, patterns)]

    def loaded(self, tensors: Mapping[str, Traced], label: str) -> tuple[dict[str, Traced], list[str]]:
        """Return the results of `from_pretrained` for stored tensors by the model's names, and the ignored names.

        Tensors that are not in the model keep their names.

        Raises:
            CandidateError: a conversion does more than move elements, two tensors get the same name, or this version of
                transformers is not supported.
        """
        try:
            return self._loaded(tensors, label)
        except CandidateError:
            raise
        except Exception as error:  # code of another library may raise any error
            raise CandidateError(
                f"{label}: the rules of transformers {version()} for this model cannot be used: "
                f"{type(error).__name__}: {error}. {_FIX}"
            ) from error

    def _loaded(self, tensors: Mapping[str, Traced], label: str) -> tuple[dict[str, Traced], list[str]]:
        api = transformers_api(self._model)
        known, base = self._model.shapes, self._model.base_model_prefix
        rules = api.get_model_conversion_mapping(self._model)
        converters = [rule for rule in rules if isinstance(rule, api.WeightConverter)]
        renamings = [rule for rule in rules if not isinstance(rule, api.WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        loaded = _Loaded(label)
        collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        ignored: list[str] = []
        for name in sorted(tensors, key=api.dot_natural_key):
            live, pattern = api.rename_source_key(name, renamings, converters, base, known)
            if live not in known and name in known:
                live, pattern = api.rename_source_key(name, [], [], base, known)
            if live not in known:
                if any(unexpected.search(live) for unexpected in self._unexpected):
                    ignored.append(name)
                else:
                    loaded.add(name, tensors[name], [name])
            elif pattern is not None:
                group = by_pattern[pattern]
                rule, sources = collected.setdefault(live, (deepcopy(group), {p: [] for p in group.source_patterns}))
                rule.add_tensor(live, name, pattern, tensors[name])
                sources[pattern].append(name)
            else:
                loaded.add(self.prefix + live, tensors[name], [name])
        for live, (rule, sources) in collected.items():
            for name, tensor in self._converted(live, rule, sources, label).items():
                loaded.add(self.prefix + name, tensor, [source for names in sources.values() for source in names])
        return loaded.tensors, ignored

    def _converted(self, live: str, rule: Any, sources: Mapping[str, list[str]], label: str) -> dict[str, Traced]:
        try:
            converted = rule.convert(live, model=self._model, config=self._model.config)
            # transformers 5.0 also returns errors.
            made = _single(converted[0] if isinstance(converted, tuple) else converted)
        except Exception as error:  # code of another library may raise any error
            _refuse_lacking(live, sources, None, label)
            names = sorted(source for group in sources.values() for source in group)
            raise CandidateError(
                f"{label}: transformers makes tensor {live!r} of {quoted(names)} by {rule.operations}, which cannot be "
                f"traced: {type(error).__name__}: {error}. Candidates are read in parts, so conversions may only move "
                f"elements. {_FIX}"
            ) from error
        for name, tensor in made.items():
            shape = tuple(tensor.shape)
            if (expected := self._model.shapes.get(name, shape)) != shape:
                sizes = (shape[0], expected[0]) if shape and expected and shape[1:] == expected[1:] else None
                _refuse_lacking(name, sources, sizes, label)
        return made

    def saved(self, tensors: Mapping[str, Traced]) -> dict[str, Traced]:
        """Return the results of `save_pretrained` for tensors of the model."""
        api = transformers_api(self._model)
        return _single(api.revert_weight_conversion(self._model, dict(tensors)))


def transformers_rules(modules: Modules, shapes: Shapes) -> TransformersRules | None:
    """Return the rules for the outermost model of transformers among modules, or None if there is none.

    Versions of transformers before 5 have no rules, because their files have the tensors of the models.

    Args:
        modules: all modules with their names without wrappers; a model comes before its parts.
        shapes: the shapes of all parameters and buffers that checkpoints contain, by each name.
    """
    modules = list(modules)
    for path, module in modules:
        if _is_model(module):
            if not has_rules():
                return None
            return TransformersRules(modules, shapes, f"{path}." if path else "", module)
    return None


class _ShapeModel:
    """A replacement for a model in the code of transformers. Parameters of the model may be sharded or flattened."""

    def __init__(self, model: nn.Module, shapes: Shapes, modules: list[tuple[str, nn.Module]]) -> None:
        self.shapes = shapes
        self._model = model
        self._modules = modules

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules with their names without wrappers."""
        yield from self._modules

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return a tensor without values that has the shape of the whole parameter."""
        if name not in self.shapes:
            raise AttributeError(name)
        return torch.empty(self.shapes[name], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the model: the first versions of transformers 5 look up rules by `model.__class__`."""
        return type(self._model)


def _is_model(module: nn.Module) -> bool:
    """Return whether a module is a model of transformers. The package need not be installed."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.split(".")[0] == LIBRARY for kind in type(module).__mro__
    )


def _as_its_class(module: nn.Module) -> nn.Module:
    """Return a module with the class that it had before `fully_shard` changed it, because rules depend on the class."""
    kind = next(kind for kind in type(module).__mro__ if kind.__module__.split(".")[0] != "torch" or kind is nn.Module)
    if not _is_model(module) or kind is type(module):
        return module
    same: nn.Module = object.__new__(kind)
    same.__dict__.update(module.__dict__)
    return same


class _Loaded:
    """Tensors by their names in the model, which must be different."""

    def __init__(self, label: str) -> None:
        self.tensors: dict[str, Traced] = {}
        self._label = label
        self._sources: dict[str, list[str]] = {}

    def add(self, name: str, tensor: Traced, sources: list[str]) -> None:
        """Add a tensor that is made of the stored tensors `sources`.

        Raises:
            CandidateError: another tensor has this name.
        """
        if name in self.tensors:
            raise CandidateError(
                f"{self._label}: {quoted(self._sources[name])} and {quoted(sources)} are both {name!r} of the model. "
                "Remove one of them from the candidate."
            )
        self.tensors[name] = tensor
        self._sources[name] = sources


def _refuse_lacking(live: str, sources: Mapping[str, list[str]], sizes: tuple[int, int] | None, label: str) -> None:
    """Check that no stored tensor is missing of those of which a tensor of the model is made."""
    if missing := missing_tensors(sources, sizes):
        raise CandidateError(
            f"{label}: {quoted(missing)} {'is' if len(missing) == 1 else 'are'} missing, of which transformers makes "
            f"tensor {live!r} of the model. Candidates must hold every tensor of the model: save them completely, or "
            "use their model."
        )


def _single(tensors: Mapping[str, Any]) -> dict[str, Traced]:
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in tensors.items()}
