"""The PEFT adapter of a live model: its tensors, their names in files, and its scalings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import nn

from twa_scale.base.names import some, without_wrappers
from twa_scale.candidates import Candidate
from twa_scale.candidates.adapters import ranks_of, scalings
from twa_scale.engines.module_names import name_unwrapper
from twa_scale.errors import CandidateError, EngineError

_PREFIX = "base_model.model."  # the prefix of names in PEFT's files


@dataclass(frozen=True)
class LiveAdapter:
    """The active adapter of a model. It is the same on every rank."""

    name: str
    kind: str
    """The `peft_type`, such as LORA or IA3."""
    stored: Mapping[str, tuple[str, ...]]
    """For each tensor of the adapter, by its name in the model, the names that it may have in files."""
    scalings: Mapping[str, tuple[float, int]]
    """The scaling and the rank of each LoRA module, by its name in the base model."""

    def holds(self, name: str) -> bool:
        """Return whether a tensor of the model belongs to the adapter and not to the base model."""
        return name in self.stored


def live_adapter(root: nn.Module) -> LiveAdapter | None:
    """Return the adapter that a model trains, or None if it has no adapters. The model can be wrapped and sharded.

    Raises:
        EngineError: several adapters are active, or an adapter is merged into the base weights.
    """
    found = _adapted(root)
    if found is None:
        return None
    path, model = found
    name = _active(model)
    _require_unmerged(model)
    prefix, unwrap = f"{path}." if path else "", name_unwrapper(root)
    names = _names(model)
    marks = {raw: torch.empty(0) for raw in names}
    own = {id(mark): unwrap(prefix + names[raw]) for raw, mark in marks.items()}
    files = _in_files(model, name, marks)
    plain = without_wrappers(files)
    stored = {own[id(mark)]: _spellings(plain[raw]) for raw, mark in files.items() if id(mark) in own}
    kind = _text(model.peft_config[name].peft_type)
    if not stored:
        raise EngineError(
            f"adapter {name!r} ({kind}): its file holds tensors that the model computes from its parameters, not the "
            "parameters. Average such adapters without a model: twa-scale average."
        )
    return LiveAdapter(name, kind, stored, dict(_scalings(model, name)))


def require_fitting(adapter: LiveAdapter, candidates: Sequence[Candidate]) -> None:
    """Check that the rank and scaling of the live adapter fit the candidates.

    Raises:
        CandidateError: names the module, and how to create an adapter that fits.
    """
    last = candidates[-1]
    sums = ranks_of(last)
    expected = dict.fromkeys(sums, 1.0) if sums else scalings(last)
    for module, scaling in expected.items():
        live, rank = adapter.scalings.get(module.removeprefix(_PREFIX), (scaling, 0))
        if rank and rank != sums.get(module, rank):
            raise CandidateError(
                f"space: product: the ranks of the candidates add up to {sums[module]} in {module!r}, but the adapter "
                f"of the model has rank {rank}. Create its adapter with `twa-scale average ... --space product --out "
                "START`, and load it with PeftModel.from_pretrained(base, 'START', is_trainable=True)."
            )
        if not isclose(live, scaling, rel_tol=1e-6):
            where = "with `space: product`" if sums else f"in {last.label}"
            raise CandidateError(
                f"{module!r}: the product of the factors is scaled by {scaling:g} {where}, but by {live:g} in the "
                "model. Load the adapter of the model from "
                f"{'the output of `twa-scale average ... --space product`' if sums else last.label} "
                "(PeftModel.from_pretrained(..., is_trainable=True)), or set its lora_alpha accordingly."
            )


def _adapted(root: nn.Module) -> tuple[str, Any] | None:
    """Return the path and the outermost module with adapters: a PeftModel, or a model with injected adapters."""
    return next(((path, module) for path, module in root.named_modules() if _has_adapters(module)), None)


def _has_adapters(module: nn.Module) -> bool:
    """Return whether the module itself has adapters. Wrappers forward the attributes of the wrapped module."""
    own = "peft_config" in vars(module) or isinstance(getattr(type(module), "peft_config", None), property)
    configs = getattr(module, "peft_config", None) if own else None
    return isinstance(configs, dict) and bool(configs)


def _active(model: Any) -> str:
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    names = [active] if isinstance(active, str) else list(active or model.peft_config)
    if len(names) != 1:
        raise EngineError(
            f"the model has {len(names)} active adapters ({some(names)}), but an average has one. Select it with "
            "model.set_adapter(name)."
        )
    return str(names[0])


def _require_unmerged(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if getattr(module, "merged_adapters", None):
            raise EngineError(
                f"{path!r}: the adapter is merged into the base weights, so training it has no effect. Call "
                "model.unmerge_adapter() before attach."
            )


def _names(model: nn.Module) -> dict[str, str]:
    """Return all names of parameters and buffers. The value of a buffer's name is the first name of the same buffer."""
    first = {id(buffer): name for name, buffer in model.named_buffers()}
    names = {name: name for name, _ in model.named_parameters(remove_duplicate=False)}
    return names | {name: first[id(buffer)] for name, buffer in model.named_buffers(remove_duplicate=False)}


def _in_files(model: Any, name: str, marks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that PEFT would write, by their names in files."""
    from peft import get_peft_model_state_dict

    # Without embeddings, because these have the names of the model in files.
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, marks, adapter_name=name, save_embedding_layers=False
    )
    return found


def _spellings(stored: str) -> tuple[str, ...]:
    """Return a name with and without the prefix of PEFT, which injected adapters do not have."""
    bare = stored.removeprefix(_PREFIX)
    return tuple(dict.fromkeys((stored, _PREFIX + bare, bare)))


def _scalings(model: nn.Module, name: str) -> Iterator[tuple[str, tuple[float, int]]]:
    unwrap = name_unwrapper(model)
    for path, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if hasattr(module, "lora_A") and isinstance(scaling, Mapping) and name in scaling:
            rank: Any = module.r
            yield unwrap(path).removeprefix(_PREFIX), (float(scaling[name]), int(rank[name]))


def _text(kind: object) -> str:
    return str(getattr(kind, "value", kind))
