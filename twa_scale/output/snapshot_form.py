"""The form of a model's snapshots: the names and shapes with which its library saves and loads it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from twa_scale.base.notices import ignore_notice, notice
from twa_scale.candidates.adapters import ADAPTER_BASE, ADAPTER_CONFIG
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.candidates.traced import Traced
from twa_scale.candidates.transformers_rules import transformers_rules
from twa_scale.engines import Engine
from twa_scale.engines.live_adapter import LiveAdapter, live_adapter
from twa_scale.engines.module_names import named_modules
from twa_scale.errors import EngineError, OutputError
from twa_scale.output.small_files import Files, check_files
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
    carried = CarriedFiles(wider=_most_common_type(tensors.values()))
    rules = transformers_rules(named_modules(engine.module), {name: shape for name, (shape, _) in stored.items()})
    if rules is not None and not rules.prefix:  # No loader reads a part of a model from these files.
        try:
            return SnapshotForm(form_of_model(tensors, rules.saved(live), dtype), carried)
        except Exception as error:  # The rules are code of another library.
            report(
                "snapshots hold the tensors under the model's own names, which from_pretrained reads, because the form "
                f"in which transformers saves this model is unknown: {type(error).__name__}: {error}."
            )
    return SnapshotForm(form_of_model(tensors, live, dtype), carried)


def with_files(carried: CarriedFiles, files: Files, *, read: bool) -> CarriedFiles:
    """Return `carried` with small files of the user, which replace those of the form.

    Args:
        carried: the files of a form.
        files: the files of the user.
        read: whether this rank reads their content; only the first one needs it.

    Raises:
        ConfigError, OutputError: a name is not valid, or a file cannot be read.
    """
    check_files(files, carried.base)
    content = {name: _content(value) for name, value in files.items()} if read else {}
    return replace(carried, files={**carried.files, **content})


def _content(file: bytes | Path) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        return file.read_bytes()
    except OSError as error:
        raise OutputError(
            f"{file}: cannot be read: {error.strerror or error}. Give another path in `files`."
        ) from error


def _most_common_type(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """Return the floating point type of most elements, which config.json has to name."""
    counts = Counter[torch.dtype]()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] += prod(tensor.shape)
    return counts.most_common(1)[0][0] if counts else None


def _names_in_files(adapter: LiveAdapter, engine: Engine) -> dict[str, str]:
    """Return the names in files of the tensors of an adapter; empty if the model trains other parameters too."""
    owners = {alias: name for name, info in engine.parameters.items() for alias in info.aliases}
    owners |= {name: name for name in engine.buffers()}
    names = {owners[name]: adapter.file_name(name) for name in adapter.stored if name in owners}
    trained = {name for name, info in engine.parameters.items() if info.trainable}
    return names if trained <= names.keys() else {}
