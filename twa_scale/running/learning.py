"""A trainable average of the snapshots of a window, whose store is the window. Nothing is read or copied."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from twa_scale.average.assemble import assemble
from twa_scale.average.attach import experts_of, matched, require_trainable
from twa_scale.average.average import TrainableAverage
from twa_scale.average.bases import basis_class
from twa_scale.average.basis import Gram
from twa_scale.average.layout import Layout
from twa_scale.average.load_candidates import LoadedCandidates
from twa_scale.average.optimizer import check_settings
from twa_scale.average.parts import Parts
from twa_scale.base.spans import Span
from twa_scale.candidates.buffers import buffer_source
from twa_scale.config import TwaConfig, center_weights, validated
from twa_scale.engines import Engine
from twa_scale.engines.split_spans import SpanParts, SplitEngine
from twa_scale.errors import ConfigError, TwaError
from twa_scale.kernels.torch.deltas import inner_products, squared_norms
from twa_scale.output import Files
from twa_scale.output.snapshot_form import snapshot_form
from twa_scale.ranks import Pods, Reduction, require_same_settings
from twa_scale.running.candidate import snapshot_candidates
from twa_scale.running.window import Window
from twa_scale.running.window_store import WindowStore


def require_snapshots(window: Window | None) -> Window:
    """Return the window if it has enough snapshots for `learn`.

    Raises:
        TwaError: there are fewer than two snapshots.
    """
    if window is None or window.count < 2:
        count = window.count if window else 0
        raise TwaError(
            f"learn() needs at least two snapshots, and the window holds {count}; create RunningAverages with "
            "window={'every': .., 'keep': ..}, and train for longer."
        )
    return window


def settings_for(window: Window, config: TwaConfig | Mapping[str, Any] | None, store_device: str) -> TwaConfig:
    """Return the settings of an average whose store is the window.

    Raises:
        ConfigError: a key differs from the window's settings. The message names it.
    """
    settings = validated(TwaConfig, dict(config) if isinstance(config, Mapping) else config)
    packed = window.settings.store.startswith("packed")
    fixed = {"store": window.settings.store, "coding": "increments" if packed else "auto", "store_device": store_device}
    for key, value in fixed.items():
        if key in settings.model_fields_set and getattr(settings, key) not in (value, "auto"):
            raise ConfigError(
                f"{key}: {getattr(settings, key)!r} is set, but the window holds the snapshots with {value!r}; "
                f"leave {key} out, or set it in window={{..}} before training."
            )
    return validated(
        TwaConfig, {**settings.model_dump(include=settings.model_fields_set & set(TwaConfig.model_fields)), **fixed}
    )


def learn(engine: Engine, pods: Pods, window: Window, config: TwaConfig, files: Files) -> TrainableAverage:
    """Return a trainable average of the snapshots, whose first weights are in the model. Collective.

    Args:
        engine: a new engine of the model, because the average takes its gradients.
        pods: all ranks.
        window: holds at least two snapshots.
        config: made by `settings_for`.
        files: the files of the user that exports write next to the weights.

    Raises:
        ConfigError, EngineError, OutputError: on every rank.
    """
    span_parts: SpanParts = {}
    live = engine.live
    form = snapshot_form(engine, pods, None, files)
    with pods.agree():
        engine.keeps_optimizer = True
        engine.check()
        require_trainable(config, engine, pods)
        candidates = snapshot_candidates(engine, window.steps, form.stored)
        stacked = experts_of(engine.module, engine.parameters, config)
        if stacked:
            engine = SplitEngine(engine, stacked)
            window_spans = set(window.spans)
            span_parts = {
                span: parts for span, parts in engine.parts.items() if span.name in stacked and span in window_spans
            }
        layout = matched(engine, candidates, config, form.adapter, stacked)
        _require_all(window, layout)
        weights = center_weights(config.center, len(candidates))
        check_settings(config, weights)
    require_same_settings(pods, {"the steps of the snapshots": window.steps, **config.model_dump(mode="json")})
    with ExitStack() as undo:
        undo.callback(engine.close)
        reduction = Reduction(config.comm, pods, engine.shard_group, engine.replica_group)
        undo.callback(reduction.close)
        store = WindowStore(window, window.row_map(weights), span_parts)
        with pods.agree():
            filled = _measured(engine, layout, window, config, weights, span_parts)
            _write_center(live, layout, window, weights)
        filled.buffers.update(pods.broadcast(_buffers(engine, layout, window, config, weights)))
        parts = Parts(config, engine, pods, reduction, layout, store, candidates, form.carried)
        average = assemble(parts, filled, weights)
        undo.pop_all()
    return average


def _require_all(window: Window, layout: Layout) -> None:
    """Check that all tensors of the snapshots are averaged.

    Raises:
        TwaError: names a parameter that has been frozen since, so that only the adapter of the model is averaged.
    """
    if lost := [span.name for span in window.spans if span.name not in layout.names_in_candidates]:
        raise TwaError(
            f"learn(): the snapshots hold parameter {lost[0]!r}, which was trained when they were taken and is frozen "
            "now, so that only the adapter would be averaged. Let it require a gradient again, or create another "
            "RunningAverages after freezing it."
        )


@torch.no_grad()
def _measured(
    engine: Engine, layout: Layout, window: Window, config: TwaConfig, weights: Sequence[float], span_parts: SpanParts
) -> LoadedCandidates:
    """Return the Gram matrix, errors and checksums, which `attach` computes while it reads the candidates."""
    n, device = window.count, window.store.device
    gram = Gram(len(layout.groups), n, device, diagonal=basis_class(config.basis).norms_only)
    b = torch.tensor(weights, dtype=torch.float32, device=device)
    checksums: dict[str, torch.Tensor] = {}
    for span in window.spans:
        sums, done = torch.zeros(n, dtype=torch.int64, device=device), 0
        for base, increments in window.parts(span):
            offsets = torch.cat([torch.zeros_like(base)[None], increments.cumsum(0)])
            sums += (base + offsets).view(torch.int32).sum(1)
            first, done = done, done + len(base)
            if span.name not in layout.group_of:
                continue
            shift = b @ offsets
            rows = torch.cat([offsets - shift, (base + shift)[None]])
            for start, part in span_parts.get(span, [(0, span)]):
                low, high = max(start, first) - first, min(start + len(part), done) - first
                if low < high:
                    products = gram.of(layout.group(part))
                    chunk = rows[:, low:high]
                    products += inner_products(chunk) if products.ndim == 2 else squared_norms(chunk)
        checksums |= dict.fromkeys(layout.names_in_candidates[span.name], sums.cpu())
    errors = window.squared_errors().to(engine.device)
    return LoadedCandidates(gram.values.to(engine.device), errors, checksums, {}, {})


@torch.no_grad()
def _write_center(
    live: Callable[[Span], torch.Tensor], layout: Layout, window: Window, weights: Sequence[float]
) -> None:
    """Write the tensors that are not trained, averaged with the weights of the center."""
    spans = [span for span in window.spans if span.name not in layout.group_of]
    window.write(torch.tensor(weights, dtype=torch.float64), {span: live(span) for span in spans})


def _buffers(
    engine: Engine, layout: Layout, window: Window, config: TwaConfig, weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Return the values of buffers, 1-D, on ranks that keep them. Only statistics are averaged."""
    values, last = {}, len(weights) - 1
    for name in window.buffers:
        if name not in layout.buffers:
            continue
        averaged = window.buffers[name].is_floating_point()
        source = buffer_source(name, config.buffers, weights) if averaged else last
        if isinstance(source, int):
            value = window.buffer(name, source).clone()
        else:
            weighted = [window.buffer(name, i).double() * weight for i, weight in enumerate(source)]
            value = torch.stack(weighted).sum(0).to(window.buffers[name].dtype)
        values[name] = value.reshape(-1).cpu()
    return values
