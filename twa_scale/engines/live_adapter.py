"""The PEFT adapter of a live model: its tensors, their names in files, and its scalings."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from twa_scale.base.names import quoted
from twa_scale.base.notices import notice
from twa_scale.candidates import Candidate
from twa_scale.candidates.adapters import ADAPTER_CONFIG, PREFIX, adapter_config, ranks_of, scalings
from twa_scale.engines.module_names import name_unwrapper, own_class, unwrapped
from twa_scale.engines.private_attributes import require, version
from twa_scale.engines.wrappers_removed import wrappers_removed
from twa_scale.errors import CandidateError, EngineError

_MODEL = ("peft_config",)
_MODULE = ("merged_adapters",)  # attributes of each module with an adapter
_LORA = ("scaling", "r")  # attributes of each module with factors
_PARAMETER = ("parameter_name",)  # attributes of a module that adapts a parameter (`target_parameters`)
_NOT_IN_MODEL = {"RANDLORA": "random projections", "SHIRA": "indices"}  # further contents of files
_ORIGINAL = "original_module"  # the module that an adapter replaces by one of `modules_to_save`
_OF_PEFT_MODEL = "base_model."  # the start of all names of a PeftModel
_WITHOUT_MODEL = "Average such adapters without a model: twa-scale average."


@dataclass(frozen=True)
class LiveScaling:
    """The scaling of the product of the factors of a LoRA module."""

    scaling: float
    rank: int
    looked_up: str
    """The name that PEFT compares with `rank_pattern` and `alpha_pattern`."""


@dataclass(frozen=True)
class LiveAdapter:
    """The active adapter of a model. It is the same on every rank."""

    name: str
    kind: str
    """The `peft_type`, such as LORA or IA3."""
    stored: Mapping[str, tuple[str, ...]]
    """For each tensor of the adapter, by its name in the model, the names that it may have in files."""
    scalings: Mapping[str, "LiveScaling"]
    """The scaling of each LoRA module, by its name in the base model."""
    model: Any
    """The PeftModel, or the model with injected adapters."""
    has_embeddings: bool = False
    """Whether `stored` has the embeddings of the base model, which PEFT saves after their size has changed."""

    def holds(self, name: str) -> bool:
        """Return whether a tensor of the model belongs to the adapter and not to the base model."""
        return name in self.stored

    def replaces(self, name: str) -> bool:
        """Return whether a module of an adapter (`modules_to_save`) is used in place of the one of this tensor."""
        return not {_ORIGINAL, "modules_to_save"}.isdisjoint(name.split(".")) and not self.holds(name)

    def file_name(self, name: str) -> str:
        """Return the name of a tensor of the adapter in the files that PEFT and transformers write."""
        stored = self.stored[name][0]
        return stored if stored.startswith(_OF_PEFT_MODEL) else PREFIX + stored

    def config_file(self) -> bytes:
        """Return the content of adapter_config.json, as PEFT writes it.

        Raises:
            OSError: there is no space for a temporary file.
        """
        settings = copy(self.model.peft_config[self.name])
        settings.inference_mode = True
        mapping = None
        if hasattr(self.model, "get_base_model"):
            settings.base_model_name_or_path = self._base_name()
            if settings.task_type is None:
                kind = own_class(unwrapped(self.model.get_base_model()))
                mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        with TemporaryDirectory() as directory:
            settings.save_pretrained(directory, auto_mapping_dict=mapping)
            return Path(directory, ADAPTER_CONFIG).read_bytes()

    def vocabulary_was_resized(self) -> bool:
        """Return whether the model has another vocabulary than its base model, if that is in a directory or the cache.

        PEFT then saves the embeddings with the adapter.
        """
        config: Any = getattr(self.model, "config", None)
        size = _vocabulary(config)
        if size is None or (name := self._base_name()) is None:
            return False
        try:
            base = type(config).from_pretrained(name, local_files_only=True)
        except Exception:  # of another library, for example because there is no such file
            notice(
                f"the configuration of the base model {name!r} is not in a directory or in the cache. If you have "
                "resized the embeddings, files of the adapter lack them."
            )
            return False
        return _vocabulary(base) not in (None, size)

    def _base_name(self) -> str | None:
        """Return the name or path of the base model, as PEFT does."""
        name = self.model.peft_config[self.name].base_model_name_or_path
        base = unwrapped(self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model)
        return name or vars(base).get("name_or_path") or None


def live_adapter(root: nn.Module, *, with_embeddings: bool = False) -> LiveAdapter | None:
    """Return the adapter that a model trains, or None if it has no adapters. The model can be wrapped and sharded.

    `with_embeddings` adds the embeddings of the base model, as PEFT does after their size has changed.

    Raises:
        EngineError: several adapters are active, an adapter is merged into the base weights, or its tensors are not
            those of its file.
    """
    adapted = _adapted(root)
    if adapted is None:
        return None
    path, model = adapted
    require("peft", model, _MODEL)
    name = _active(model)
    kind = _text(model.peft_config[name].peft_type)
    _require_unmerged(model)
    _require_no_views(model)
    plain_path = name_unwrapper(root)(path)
    prefix = f"{plain_path}." if plain_path else ""
    with wrappers_removed(root):
        names = _names(model)
        marks = {raw: torch.empty(1, 2, device="cpu") for raw in names}
        files = _in_files(model, name, kind, marks)
        if with_embeddings:
            files |= _embeddings_in_files(model, name, kind, marks, files)
        factors = dict(_scalings(model, name))
    live_names = {_key(mark): prefix + names[raw] for raw, mark in marks.items()}
    stored = {live_names[_key(mark)]: _spellings(raw) for raw, mark in files.items() if _key(mark) in live_names}
    _require_own(name, kind, stored, [raw for raw, mark in files.items() if _key(mark) not in live_names])
    return LiveAdapter(name, kind, stored, factors, model, with_embeddings)


def require_no_adapter(candidates: Sequence[Candidate], names: Collection[str]) -> None:
    """Check that candidates are not adapters, for a model without one, of tensors with these names.

    Raises:
        CandidateError: names the kind of the adapter.
    """
    config = adapter_config(candidates[0])
    if config is not None and not set(candidates[0].names()) & set(names):
        raise CandidateError(
            f"{candidates[0].label}: is an adapter ({config.kind}), and the model has none. In a run, set task.adapter "
            "to one of the candidates. With attach, give PeftModel.from_pretrained(model, directory, "
            f"is_trainable=True). {_WITHOUT_MODEL}"
        )


def require_fitting(adapter: LiveAdapter, candidates: Sequence[Candidate]) -> None:
    """Check that the rank and scaling of the live adapter fit the candidates.

    Raises:
        CandidateError: names the module, and how to create an adapter that fits.
    """
    last = candidates[-1]
    sums = ranks_of(last)
    looked_up = {module: entry.looked_up for module, entry in adapter.scalings.items()}
    expected = dict.fromkeys(sums, 1.0) if sums else scalings(last, looked_up)
    for module, scaling in expected.items():
        live = adapter.scalings.get(module.removeprefix(PREFIX))
        if live is None:
            continue
        if live.rank != sums.get(module, live.rank):
            raise CandidateError(
                f"space: product: the ranks of the candidates add up to {sums[module]} in {module!r}, but the adapter "
                f"of the model has rank {live.rank}. Create its adapter with `twa-scale average ... --space product "
                "--out START`, and load it with PeftModel.from_pretrained(base, 'START', is_trainable=True), or "
                "in a run with task.adapter: START."
            )
        if not isclose(live.scaling, scaling, rel_tol=1e-6):
            location = "with `space: product`" if sums else f"in {last.label}"
            raise CandidateError(
                f"{module!r}: the product of the factors is scaled by {scaling:g} {location}, but by {live.scaling:g} "
                "in the model. Load the adapter of the model from "
                f"{'the output of `twa-scale average ... --space product`' if sums else last.label} "
                "(PeftModel.from_pretrained(..., is_trainable=True)), or set its lora_alpha accordingly."
            )


def _adapted(root: nn.Module) -> tuple[str, Any] | None:
    """Return the path and the outermost module with adapters: a PeftModel, or a model with injected adapters."""
    return next(((path, module) for path, module in root.named_modules() if _has_adapters(module)), None)


def _has_adapters(module: nn.Module) -> bool:
    """Return whether the module itself has adapters. Wrappers forward the attributes of the wrapped module."""
    has_config = "peft_config" in vars(module) or isinstance(getattr(type(module), "peft_config", None), property)
    configs = getattr(module, "peft_config", None) if has_config else None
    return isinstance(configs, dict) and bool(configs)


def _active(model: Any) -> str:
    active = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    names = [active] if isinstance(active, str) else list(active or model.peft_config)
    if len(names) != 1:
        raise EngineError(
            f"the model has {len(names)} active adapters ({quoted(names)}), but an average has one. Select it with "
            "model.set_adapter(name)."
        )
    return str(names[0])


def _require_unmerged(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        require("peft", module, _MODULE)
        if module.merged_adapters:
            raise EngineError(
                f"{path!r}: the adapter is merged into the base weights, so training it has no effect. Call "
                "model.unmerge_adapter() before attach."
            )


def _require_no_views(model: nn.Module) -> None:
    """Check that no factors are transposed views of others, which PEFT creates for `ensure_weight_tying`.

    Raises:
        EngineError: names both parameters.
    """
    parameters = dict(model.named_parameters())
    owners = {parameter.data_ptr(): path for path, parameter in parameters.items() if parameter.is_contiguous()}
    for path, parameter in parameters.items():
        address = parameter.data_ptr()  # 0 for tensors that are sharded or empty
        owner = None if parameter.is_contiguous() or not address else owners.get(address)
        if owner is not None:
            raise EngineError(
                f"parameter {path!r} is a transposed view of {owner!r} (ensure_weight_tying of PEFT), so one average "
                f"would be written into the memory of the other. {_WITHOUT_MODEL}"
            )


def _names(model: nn.Module) -> dict[str, str]:
    """Return all names of parameters and buffers. The value of a buffer's name is the first name of the same buffer."""
    first = {id(buffer): name for name, buffer in model.named_buffers()}
    names = {name: name for name, _ in model.named_parameters(remove_duplicate=False)}
    return names | {name: first[id(buffer)] for name, buffer in model.named_buffers(remove_duplicate=False)}


def _vocabulary(config: Any) -> int | None:
    """Return the number of tokens that a configuration of transformers names, if it does."""
    with suppress(AttributeError, ValueError):  # of another library; of several models of text
        config = config.get_text_config()
    return getattr(config, "vocab_size", None)


def _embeddings_in_files(
    model: Any, name: str, kind: str, marks: dict[str, torch.Tensor], others: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the embeddings that PEFT would write with an adapter, except those that the adapter has or replaces."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {_key(mark): id(parameters.get(raw, mark)) for raw, mark in marks.items()}
    held = {tensors.get(_key(mark)) for mark in others.values()}
    files = _in_files(model, name, kind, marks, with_embeddings=True)
    return {raw: mark for raw, mark in files.items() if tensors.get(_key(mark)) not in held and _ORIGINAL not in raw}


def _key(mark: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Return what identifies a mark. PEFT detaches it if transformers has made the model parallel, or transposes it."""
    return mark.data_ptr(), tuple(mark.shape)


def _in_files(
    model: Any, name: str, kind: str, marks: dict[str, torch.Tensor], *, with_embeddings: bool = False
) -> dict[str, torch.Tensor]:
    """Return the tensors that PEFT would write, by their names in files.

    The embeddings of the base model are left out by default, because in files they have the names of the model.

    Raises:
        EngineError: PEFT cannot find them without the values of the tensors, or this version of PEFT is not supported.
    """
    from peft import get_peft_model_state_dict

    if model.peft_config[name].is_prompt_learning:  # PEFT would run the encoder of the prompts.
        _require_own(name, kind, {}, [])
    try:
        state: dict[str, torch.Tensor] = get_peft_model_state_dict(
            model, marks, adapter_name=name, save_embedding_layers=with_embeddings
        )
    except Exception as error:
        raise EngineError(
            f"adapter {name!r} ({kind}): get_peft_model_state_dict of peft {version('peft')} does not return the "
            f"tensors in files ({type(error).__name__}: {error}). Merge each adapter into its base model "
            "(merge_and_unload), and average the full weights."
        ) from error
    return state


def _require_own(name: str, kind: str, stored: Mapping[str, object], others: Sequence[str]) -> None:
    """Check that the file of an adapter contains only parameters and buffers of the model.

    Raises:
        EngineError: names the kind, and how such adapters are averaged.
    """
    if not stored:
        raise EngineError(
            f"adapter {name!r} ({kind}): its file holds tensors that the model computes from its parameters, not the "
            f"parameters. {_WITHOUT_MODEL}"
        )
    if others or kind in _NOT_IN_MODEL:
        reason = _NOT_IN_MODEL.get(kind) or quoted(others, 2)
        raise EngineError(
            f"adapter {name!r} ({kind}): its file holds {reason}, which are not parameters or buffers that the model "
            f"saves. {_WITHOUT_MODEL}"
        )


def _spellings(stored: str) -> tuple[str, ...]:
    """Return a name with and without the prefix of PEFT, which injected adapters do not have."""
    bare = stored.removeprefix(PREFIX)
    return tuple(dict.fromkeys((stored, PREFIX + bare, bare)))


def _scalings(model: nn.Module, name: str) -> Iterator[tuple[str, LiveScaling]]:
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        require("peft", module, _LORA)
        if name in module.scaling:
            module_name = path.removeprefix(PREFIX)
            yield (
                module_name,
                LiveScaling(float(module.scaling[name]), int(module.r[name]), _looked_up(module_name, module)),
            )


def _looked_up(path: str, module: nn.Module) -> str:
    """Return the name that PEFT compares with patterns, which is the name of the module or of its adapted parameter."""
    from peft.tuners.lora.layer import ParamWrapper

    if not isinstance(module, ParamWrapper):
        return path
    require("peft", module, _PARAMETER)
    return f"{path.replace('.base_layer', '')}.{module.parameter_name}"


def _text(kind: object) -> str:
    return str(getattr(kind, "value", kind))
