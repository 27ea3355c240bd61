"""Attach an average to a model: match tensors, load the candidates into the store, write the first weights."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from twa_scale.average.assemble import assemble
from twa_scale.average.average import TrainableAverage
from twa_scale.average.layout import Layout, match, require_same_kinds, wanted_tensors
from twa_scale.average.load_candidates import load_candidates
from twa_scale.average.optimizer import check_optimizer, check_settings
from twa_scale.average.parts import Parts
from twa_scale.base.normal_mode import in_normal_mode
from twa_scale.candidates import Candidate, Wanted, open_together
from twa_scale.candidates.carry_over import carried_files
from twa_scale.candidates.complex_tensors import complex_in_files
from twa_scale.candidates.mapped import mapped, refuse_overlap
from twa_scale.candidates.read_ahead import Progress
from twa_scale.candidates.rounding import choose_coding
from twa_scale.config import TwaConfig, block_settings, center_weights, validated
from twa_scale.config.kinds import MappedFiles, store_kind
from twa_scale.engines import Engine, ParameterInfo, choose_engine
from twa_scale.engines.live_adapter import LiveAdapter, live_adapter, require_fitting, require_no_adapter
from twa_scale.engines.model_checks import require_device, require_materialized, require_same_model
from twa_scale.engines.split_spans import SplitEngine
from twa_scale.engines.stacked_experts import StackedExperts, stacked_experts
from twa_scale.errors import ConfigError
from twa_scale.kernels import Coding
from twa_scale.ranks import Pods, Reduction, publish_failure, require_same_settings
from twa_scale.store import Store, make_store

Candidates = str | Sequence[str | Path] | Sequence[Mapping[str, torch.Tensor]]


def attach(
    model: nn.Module | Engine,
    candidates: Candidates | None = None,
    config: TwaConfig | dict[str, Any] | None = None,
    *,
    replica_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> TrainableAverage:
    """Put a trainable average of `candidates` into `model`, for any supported sharding library. Collective.

    The weights of the model are overwritten. Each rank reads only the spans that it holds. Run forward and backward
    passes as before, then call `step()` in place of the step of your optimizer. A plain module on several ranks of a
    process group is a replica: every rank calls this function, holds all weights, and sees its own data.

    Args:
        model: a plain module, DistributedDataParallel, a module sharded by `fully_shard`, a DeepSpeedEngine, or
            another kind that docs/engines.md lists; or an `Engine` of your own.
        candidates: a glob, a list of paths, or a list of state dicts, in training order. The JSON configuration of a
            DeepSpeedEngine may name them, with the settings: `"twa": {"candidates": ..}`.
        config: a `TwaConfig`, or a dict of its fields; by default, the fields in the JSON configuration of DeepSpeed.
        replica_group: the group over pods, which has the first rank of every pod, or the counterparts of each rank, as
            `get_group("pods")` of a 2-D mesh. Pods are shard groups that see different data and exchange only
            coefficient gradients, each rank with the same weight. The pod of a plain module is one rank; its default
            replica group is all ranks.
        progress: called on every rank with the number of bytes just read and the total number of bytes to read.

    After an error the model may hold a part of the average.

    Raises:
        ConfigError, CandidateError, EngineError: on every rank, also when only one of them finds the error. An
            EngineError about the model itself (parameters that share memory, an unsupported wrapper) is raised where it
            is found; other ranks report it when they miss this rank.
    """
    return attach_at_least(2, model, candidates, config, replica_group=replica_group, progress=progress)


@in_normal_mode
def attach_at_least(
    minimum: int,
    model: nn.Module | Engine,
    candidates: Candidates | None,
    config: TwaConfig | dict[str, Any] | None,
    *,
    replica_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> TrainableAverage:
    """Attach as `attach`, with another minimum number of candidates. The average of one candidate is its weights."""
    with publish_failure():
        engine = choose_engine(model, replica_group)
    pods = Pods(engine.shard_group, engine.replica_group)
    with pods.agree():
        require_materialized(engine)
        adapter = live_adapter(engine.module)
        require_device(engine)
        engine.check()
        candidates, config = _candidates_and_config(engine, candidates, config)
        require_trainable(config, engine, pods)
        stacked = experts_of(engine.module, engine.parameters, config)
    require_same_model(engine, pods)
    engine = SplitEngine(engine, stacked) if stacked else engine
    require_same_settings(pods, config.model_dump(mode="json", include=set(TwaConfig.model_fields)))
    with ExitStack() as undo:  # after an error, close all files, so that the caller can try again
        reduction = Reduction(config.comm, pods, engine.shard_group, engine.replica_group)
        undo.callback(reduction.close)
        opened = open_together(candidates, pods, minimum, _wanted(engine, config, adapter), config.select)
        for candidate in opened:
            undo.callback(candidate.close)
        with pods.agree():
            carried = carried_files(opened, files=pods.rank == 0, code=config.carry_code)
            layout = matched(engine, opened, config, adapter, stacked)
            weights = center_weights(config.center, len(opened))
            check_settings(config, weights)
        sources = [layout.source(name) for name in layout.group_of]
        coding = choose_coding(config, weights, pods, engine.device, opened, sources)
        with pods.agree():
            store = _store(engine, layout, opened, config, coding)
            undo.callback(store.close)
            loaded = load_candidates(engine, layout, opened, weights, config, store, progress)
        parts = Parts(config, engine, pods, reduction, layout, store, opened, carried)
        average = assemble(parts, loaded, weights)
        undo.pop_all()
    if average.rounding is not None and pods.rank == 0:
        logging.getLogger("twa_scale").info("%s", average.rounding)
    return average


def _candidates_and_config(
    engine: Engine, candidates: Candidates | None, config: TwaConfig | dict[str, Any] | None
) -> tuple[Candidates, TwaConfig]:
    """Return the arguments of `attach`, with the JSON configuration of DeepSpeed as the default.

    Raises:
        ConfigError: settings are invalid, or there are no candidates.
    """
    block_candidates, fields = block_settings(engine.settings())
    candidates = block_candidates if candidates is None else candidates
    if candidates is None:
        raise ConfigError('candidates: give them to attach, or as "twa": {"candidates": ..} in DeepSpeed\'s JSON.')
    return candidates, validated(TwaConfig, fields if config is None else config)


def require_trainable(config: TwaConfig, engine: Engine, pods: Pods) -> None:
    """Check that the settings can be trained with this engine, before any candidate is opened.

    Raises:
        ConfigError, EngineError: names the setting.
    """
    check_optimizer(config)
    if config.start == "best":
        raise ConfigError(
            "start: 'best' needs the evaluations of `twa-scale run`. With attach, evaluate averages inside weights(), "
            "and call start_from() with the best."
        )
    if config.optimizer.lr == "auto":
        raise ConfigError(
            "optimizer.lr: 'auto' needs the held-out data of `twa-scale run`. With attach, give a number, and call "
            "twa_scale.choose_rate to try rates."
        )
    if config.max_weight_grad_norm is not None and pods.count > 1 and not engine.averages_replicas:
        raise ConfigError(
            "max_weight_grad_norm: needs the norm of the mean gradient over all data, and these replicas exchange "
            "gradients of the coefficients only. Wrap the model in DistributedDataParallel or shard it over all "
            "ranks, or set max_grad_norm, which clips the gradient of the coefficients."
        )
    if config.combine == "forward":
        engine.units()  # raises for engines without units


def _wanted(engine: Engine, config: TwaConfig, adapter: LiveAdapter | None) -> Wanted:
    return wanted_tensors(engine.parameters, engine.buffers(), config, engine.module, adapter)


def experts_of(
    module: nn.Module, parameters: Mapping[str, ParameterInfo], config: TwaConfig
) -> dict[str, StackedExperts]:
    """Return the tensors of the model that stack experts, if experts have groups of their own."""
    return stacked_experts(module, parameters) if config.groups == "expert" else {}


def matched(
    engine: Engine,
    candidates: Sequence[Candidate],
    config: TwaConfig,
    adapter: LiveAdapter | None = None,
    stacked: Mapping[str, StackedExperts] | None = None,
) -> Layout:
    """Find the tensors of the model in the candidates. The arguments are those of `match`.

    Raises:
        CandidateError, ConfigError: as `match` and `require_same_kinds` do.
    """
    first, buffers = candidates[0], engine.buffers()
    if adapter:
        require_fitting(adapter, candidates)
    else:
        require_no_adapter(candidates, engine.parameters)
    layout = match(engine.parameters, buffers, candidates, config, adapter, stacked)
    types = {name: buffer.dtype for name, buffer in buffers.items()}
    types |= {name: info.dtype for name, info in engine.parameters.items()}
    require_same_kinds(layout, types, engine.complex_names, first, complex_in_files(first))
    return layout


def _store(engine: Engine, layout: Layout, candidates: Sequence[Candidate], config: TwaConfig, coding: Coding) -> Store:
    """Return an empty store.

    Raises:
        CandidateError, ConfigError: the store would overwrite a candidate, or a candidate cannot be mapped.
    """
    if isinstance(store_kind(config.store), MappedFiles):
        live = [engine.live(span) for span in engine.spans() if span.name in layout.group_of]
        refuse_overlap(candidates, [layout.source(name) for name in layout.group_of], live)
    return make_store(
        config,
        len(candidates),
        engine.device,
        lambda name: [mapped(candidate, layout.source(name)) for candidate in candidates],
        coding,
    )
