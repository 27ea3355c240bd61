"""The form of a model's snapshots: the names and shapes with which its library saves and loads it."""

from dataclasses import dataclass

import torch

from twa_scale.base.notices import ignore_notice, notice
from twa_scale.candidates.adapters import ADAPTER_BASE, ADAPTER_CONFIG
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.candidates.traced import Traced
from twa_scale.candidates.transformers_rules import transformers_rules
from twa_scale.engines import Engine
from twa_scale.engines.live_adapter import LiveAdapter, live_adapter
from twa_scale.engines.module_names import named_modules
from twa_scale.errors import EngineError
from twa_scale.output.stored_form import StoredForm, Tensor, form_of_model


@dataclass(frozen=True)
class SnapshotForm:
    """How files hold the weights of a model."""

    tensors: StoredForm
    """The tensors of the files."""
    carried: CarriedFiles
    """The name of the weight files, and the small files that belong to them."""
    adapter: LiveAdapter | None = None
    """The adapter, if the files hold an adapter only."""


def snapshot_form(engine: Engine, dtype: torch.dtype | None) -> SnapshotForm:
    """Return the form in which PEFT saves a model that trains an adapter, and transformers its own models.

    The tensors of other models are stored unchanged. Snapshots of an adapter do not hold the base model.

    Args:
        engine: the engine of the model.
        dtype: the type of floating point tensors in the files; None for their type in the model.
    """
    pairs = engine.complex_names
    stored = {info.name: (info.shape, info.dtype) for info in engine.parameters.values()}
    stored |= {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in engine.buffers().items()}
    tensors = {name: Tensor(shape, own_dtype, name in pairs) for name, (shape, own_dtype) in stored.items()}
    live = {name: Traced.stored(name, shape, own_dtype) for name, (shape, own_dtype) in stored.items()}
    report = notice if engine.shard_group.rank == 0 else ignore_notice
    adapter = None
    try:
        adapter = live_adapter(engine.module)
    except EngineError as error:
        report(f"snapshots hold the base model too, because its adapter cannot be written alone. {error}")
    if adapter and (in_files := _names_in_files(adapter, engine)):
        own = {name: tensors[name] for name in in_files}
        saved = {raw: live[name] for name, raw in in_files.items()}
        carried = CarriedFiles(ADAPTER_BASE, files={ADAPTER_CONFIG: adapter.config_file()})
        return SnapshotForm(form_of_model(own, saved, dtype), carried, adapter)
    rules = transformers_rules(named_modules(engine.module), {name: shape for name, (shape, _) in stored.items()})
    if rules is not None and not rules.prefix:  # No loader reads a part of a model from these files.
        try:
            return SnapshotForm(form_of_model(tensors, rules.saved(live), dtype), CarriedFiles())
        except Exception as error:  # The rules are code of another library.
            report(
                "snapshots hold the tensors under the model's own names, which from_pretrained reads, because the form "
                f"in which transformers saves this model is unknown: {type(error).__name__}: {error}."
            )
    return SnapshotForm(form_of_model(tensors, live, dtype), CarriedFiles())


def _names_in_files(adapter: LiveAdapter, engine: Engine) -> dict[str, str]:
    """Return the names in files of the tensors of an adapter; empty if the model trains other parameters too."""
    owners = {alias: name for name, info in engine.parameters.items() for alias in info.aliases}
    owners |= {name: name for name in engine.buffers()}
    names = {owners[name]: adapter.file_name(name) for name in adapter.stored if name in owners}
    trained = {name for name, info in engine.parameters.items() if info.trainable}
    return names if trained <= names.keys() else {}
