"""The form of a model's snapshots: the names and shapes with which its library saves and loads it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from twa_scale.base.names import quoted
from twa_scale.base.notices import notice
from twa_scale.candidates.adapters import ADAPTER_BASE, ADAPTER_CONFIG
from twa_scale.candidates.buffers import is_statistic
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.candidates.traced import Traced
from twa_scale.candidates.transformers_rules import transformers_rules
from twa_scale.engines import Engine
from twa_scale.engines.live_adapter import LiveAdapter, live_adapter
from twa_scale.engines.module_names import named_modules
from twa_scale.errors import EngineError, OutputError
from twa_scale.output.model_files import files_of_model
from twa_scale.output.publish import content_of
from twa_scale.output.small_files import Files, check_files
from twa_scale.output.stored_form import StoredForm, Tensor, form_of_model
from twa_scale.ranks import Pods


@dataclass(frozen=True)
class SnapshotForm:
    """How files hold the weights of a model."""

    stored: StoredForm
    """The tensors of the files."""
    carried: CarriedFiles
    """The name of the weight files, and on the first rank the small files."""
    adapter: LiveAdapter | None = None
    """The adapter, if the files hold an adapter only."""


def snapshot_form(engine: Engine, pods: Pods, dtype: torch.dtype | None, files: Files) -> SnapshotForm:
    """Return the form in which PEFT saves a model that trains an adapter, and transformers its own models. Collective.

    The tensors of other models are stored unchanged. Snapshots of an adapter do not hold the base model.

    Args:
        engine: the engine of the model.
        pods: all ranks.
        dtype: the type of floating point tensors in the files; None for their type in the model.
        files: small files of the user, which the first rank reads. They replace those of the library.

    Raises:
        ConfigError, OutputError: on every rank; the name of a file is not valid, or it cannot be read.
    """
    adapter, small = None, dict[str, bytes]()
    with pods.agree():
        check_files(files)
        if pods.rank == 0:
            adapter = _adapter_alone(engine)
            small = {ADAPTER_CONFIG: adapter.config_file()} if adapter else files_of_model(engine.module)
            small |= {name: _content(file) for name, file in files.items()}
    is_alone, with_embeddings = pods.broadcast((adapter is not None, adapter is not None and adapter.has_embeddings))
    with pods.agree():
        if is_alone and adapter is None:
            adapter = live_adapter(engine.module, with_embeddings=with_embeddings)
        form = _form(engine, dtype, adapter, reports=pods.rank == 0)
        return replace(form, carried=replace(form.carried, files=small))


def _adapter_alone(engine: Engine) -> LiveAdapter | None:
    """Return the adapter of the model if files can hold it without the base model; otherwise report the reason."""
    try:
        adapter = live_adapter(engine.module)
        if adapter and adapter.vocabulary_was_resized():
            adapter = live_adapter(engine.module, with_embeddings=True)
        reason = _needs_base(adapter, engine) if adapter else None
    except EngineError as error:
        adapter, reason = None, f"its adapter cannot be written alone. {error}"
    if reason is None:
        return adapter
    notice(f"files of this model hold the base model too, because {reason}")
    return None


def _needs_base(adapter: LiveAdapter, engine: Engine) -> str | None:
    """Return why the files of an adapter would not hold all that changes in training; None if they do."""
    trained = [name for name, info in engine.parameters.items() if info.trainable]
    others = [name for name in trained if not any(map(adapter.holds, engine.parameters[name].aliases))]
    if others or not trained:
        return f"it trains {quoted(others, 2)}, which its adapter does not hold." if others else "it trains nothing."
    unused = {name for name in engine.buffers() if adapter.holds(name) or adapter.replaces(name)}
    if statistics := [name for name in engine.buffers() if is_statistic(name) and name not in unused]:
        return f"its statistics ({quoted(statistics, 2)}) change in training, and its adapter does not hold them."
    return None


def _form(engine: Engine, dtype: torch.dtype | None, adapter: LiveAdapter | None, *, reports: bool) -> SnapshotForm:
    """Return the form of an adapter, or of a whole model, without small files.

    `reports` is whether this rank reports that the form of the library is unknown.
    """
    pairs = engine.complex_names
    stored = {info.name: (info.shape, info.dtype) for info in engine.parameters.values()}
    stored |= {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in engine.buffers().items()}
    tensors = {name: Tensor(shape, own_dtype, name in pairs) for name, (shape, own_dtype) in stored.items()}
    live = {name: Traced.stored(name, shape, own_dtype) for name, (shape, own_dtype) in stored.items()}
    if adapter:
        owners = _owners(adapter, engine)
        own = {name: tensors[name] for name in owners.values()}
        saved = {adapter.file_name(alias): live[name] for alias, name in owners.items()}
        return SnapshotForm(form_of_model(own, saved, dtype), CarriedFiles(ADAPTER_BASE), adapter)
    carried = CarriedFiles(wider=_most_common_type(tensors.values()))
    rules = transformers_rules(named_modules(engine.module), {name: shape for name, (shape, _) in stored.items()})
    if rules is not None and not rules.prefix:  # No loader reads a part of a model from these files.
        try:
            return SnapshotForm(form_of_model(tensors, rules.saved(live), dtype), carried)
        except Exception as error:  # The rules are code of another library.
            if reports:
                notice(
                    "snapshots hold the tensors under the model's own names, which from_pretrained reads, because the "
                    f"form in which transformers saves this model is unknown: {type(error).__name__}: {error}."
                )
    return SnapshotForm(form_of_model(tensors, live, dtype), carried)


def _content(file: bytes | Path) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        return content_of(file)
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


def _owners(adapter: LiveAdapter, engine: Engine) -> dict[str, str]:
    """Return the name in the engine of each tensor of an adapter. Tied tensors have one."""
    owners = {alias: name for name, info in engine.parameters.items() for alias in info.aliases}
    owners |= {name: name for name in engine.buffers()}
    return {name: owners[name] for name in adapter.stored if name in owners}
