"""How transformers renames and restacks tensors when it loads a model of one of its classes, and when it saves one.

Its own code decides, and works on traced tensors in place of tensors.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from twa_scale.base.names import some
from twa_scale.candidates.traced import Traced
from twa_scale.errors import CandidateError

Modules = Iterable[tuple[str, nn.Module]]
Shapes = Mapping[str, tuple[int, ...]]

_LIBRARY = "transformers"
_OUTDATED = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$")  # buffers that are no longer stored
_WAY_OUT = (
    "Give candidates that hold the tensors of the model itself: model.save_pretrained(.., save_original_format=False), "
    "or torch.save(model.state_dict(), ..)."
)


class TransformersRules:
    """The rules of a model of transformers, which may be a part of the module that is averaged.

    Args:
        modules: the names without wrappers of all modules, and these.
        shapes: of every parameter and buffer of the whole module that checkpoints hold, by each name.
        prefix: what names of this model have before them in the whole module.
        model: of a class of transformers.
    """

    def __init__(self, modules: Modules, shapes: Shapes, prefix: str, model: nn.Module) -> None:
        self.prefix = prefix
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        below = [(f"{path}.".removeprefix(prefix)[:-1], m) for path, m in modules if f"{path}.".startswith(prefix)]
        self._model = _StandIn(_as_its_class(model), own, [(path, _as_its_class(m)) for path, m in below])
        patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._unexpected = [_OUTDATED, *map(re.compile, patterns)]

    def loaded(self, tensors: Mapping[str, Traced], label: str) -> tuple[dict[str, Traced], list[str]]:
        """Return what `from_pretrained` makes of stored tensors, by the model's names, and what it leaves out.

        Tensors that are none of the model's keep their name.

        Raises:
            CandidateError: a conversion that does more than move elements, or two tensors that become the same one; or
                another version of transformers, whose rules work otherwise.
        """
        try:
            return self._loaded(tensors, label)
        except CandidateError:
            raise
        except Exception as error:  # of any kind, from code of another library
            version = import_module(_LIBRARY).__version__
            raise CandidateError(
                f"{label}: the rules of transformers {version} for this model cannot be used: "
                f"{type(error).__name__}: {error}. {_WAY_OUT}"
            ) from error

    def _loaded(self, tensors: Mapping[str, Traced], label: str) -> tuple[dict[str, Traced], list[str]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        known, base = self._model.shapes, self._model.base_model_prefix
        rules = get_model_conversion_mapping(self._model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        loaded: dict[str, Traced] = {}
        collected: dict[str, Any] = {}
        ignored: list[str] = []
        stored_as: dict[str, str] = {}
        for name in sorted(tensors, key=dot_natural_key):
            live, pattern = rename_source_key(name, renamings, converters, base, known)
            if live not in known and name in known:
                live, pattern = rename_source_key(name, [], [], base, known)
            if live not in known:
                if any(unexpected.search(live) for unexpected in self._unexpected):
                    ignored.append(name)
                else:
                    loaded[name] = tensors[name]
            elif pattern is not None:
                rule = collected.setdefault(live, deepcopy(by_pattern[pattern]))
                rule.add_tensor(live, name, pattern, tensors[name])
            elif live in stored_as:
                raise CandidateError(
                    f"{label}: tensors {stored_as[live]!r} and {name!r} are both {live!r} of the model. Remove one of "
                    "them from the candidate."
                )
            else:
                stored_as[live] = name
                loaded[self.prefix + live] = tensors[name]
        for live, rule in collected.items():
            made = self._converted(live, rule, label)
            loaded |= {self.prefix + name: tensor for name, tensor in made.items()}
        return loaded, ignored

    def _converted(self, live: str, rule: Any, label: str) -> dict[str, Traced]:
        sources = sorted(source for names in rule.layer_targets.values() for source in names)
        try:
            return _single(rule.convert(live, model=self._model, config=self._model.config))
        except Exception as error:  # of any kind, from code of another library
            raise CandidateError(
                f"{label}: transformers makes tensor {live!r} of {some(sources)} by {rule.operations}, which cannot be "
                f"followed: {type(error).__name__}: {error}. Candidates are read by parts, so elements may only be "
                f"moved. {_WAY_OUT}"
            ) from error

    def saved(self, tensors: Mapping[str, Traced]) -> dict[str, Traced]:
        """Return what `save_pretrained` makes of tensors of the model."""
        from transformers.core_model_loading import revert_weight_conversion

        return _single(revert_weight_conversion(self._model, dict(tensors)))


def transformers_rules(modules: Modules, shapes: Shapes) -> TransformersRules | None:
    """Return the rules for the outermost model of transformers among modules; None where there is none.

    Versions of transformers before 5 have no rules: their files hold what their models hold.

    Args:
        modules: the name without wrappers of each module, and it; a model before its parts.
        shapes: of every parameter and buffer that checkpoints hold, by each name.
    """
    modules = list(modules)
    for path, module in modules:
        if _is_model(module):
            if find_spec(f"{_LIBRARY}.conversion_mapping") is None:
                return None
            return TransformersRules(modules, shapes, f"{path}." if path else "", module)
    return None


class _StandIn:
    """What the code of transformers sees in place of a model, whose own parameters may be sharded or flattened."""

    def __init__(self, model: nn.Module, shapes: Shapes, modules: list[tuple[str, nn.Module]]) -> None:
        self.shapes = shapes
        self._model = model
        self._modules = modules

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules under their names without wrappers."""
        yield from self._modules

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return a tensor of the shape of a whole parameter, without values."""
        if name not in self.shapes:
            raise AttributeError(name)
        return torch.empty(self.shapes[name], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, which need not be installed."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.split(".")[0] == _LIBRARY
        for kind in type(module).__mro__
    )


def _as_its_class(module: nn.Module) -> nn.Module:
    """Return a module as one of the class that it had before `fully_shard` gave it another: rules go by class."""
    kind = next(kind for kind in type(module).__mro__ if kind.__module__.split(".")[0] != "torch" or kind is nn.Module)
    if not _is_model(module) or kind is type(module):
        return module
    same: nn.Module = object.__new__(kind)
    same.__dict__.update(module.__dict__)
    return same


def _single(tensors: Mapping[str, Any]) -> dict[str, Traced]:
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in tensors.items()}
