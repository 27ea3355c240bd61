"""`twa-scale evaluate`: the metrics of weights in files."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

from twa_scale.average.state import STATE, load_state
from twa_scale.candidates.expand import expand
from twa_scale.config import RunConfig, TwaConfig
from twa_scale.errors import ConfigError
from twa_scale.ranks import World
from twa_scale.run.attached import AttachedRun
from twa_scale.run.comparison import Measured
from twa_scale.run.progress import Report
from twa_scale.run.resume import AVERAGE

# The settings of a run that map the tensors of a file to those of the model. Others concern averages.
_READ_KEYS = {
    "kernels", "read_chunk", "reads_in_flight", "include", "exclude", "ignore", "missing", "space", "weights_key",
    "rename", "prefix",
}  # fmt: skip


def evaluate_weights(
    config: RunConfig,
    weights: Sequence[str] = (),
    report: Report | None = None,
    *,
    recalibrate: bool = False,
    callback: Callable[[Measured], object] = lambda _: None,
) -> Measured:
    """Evaluate weights in files on `evaluate_split`, one after another, on all ranks of the launcher. Collective.

    Args:
        config: the settings of a run; only those of the model, the data, the engine and the reading of candidates are
            used.
        weights: paths and globs, in any format of candidates. By default, the last candidate and the average that the
            run has exported.
        report: the console output; by default, none.
        recalibrate: whether to compute the BatchNorm statistics of each from training data, as runs do.
        callback: called after each evaluation, on every rank, with the metrics so far.

    Returns:
        The metrics of the task by path.

    Raises:
        TwaError: settings, data or weights are invalid; on every rank.
    """
    world = World.from_environment()
    device = world.device(config.device)
    with world.joined(device, config.output, config.timeout):
        run = AttachedRun(config, world, device, report or Report(active=False), trains=recalibrate)
        paths: list[str] = []
        with run.group.agree():
            if run.group.rank == 0:
                paths = _expanded(weights) if weights else _of_run(config)
        measured: Measured = {}
        for path in run.group.broadcast(paths):
            measured[path] = _measured(run, path, recalibrate)
            with run.group.agree():
                callback(measured)
        return measured


def _measured(run: AttachedRun, path: str, recalibrate: bool) -> dict[str, float]:
    """Read the weights as the only candidate of an average, so that each rank reads its own part of any format.

    Each set of weights gets a new model, because tensors that a file lacks keep the values of the model.
    """
    usual = TwaConfig(store="dense16", buffers="last")
    update = {name: getattr(usual, name) for name in TwaConfig.model_fields if name not in _READ_KEYS}
    if Path(path) == Path(run.config.output) / AVERAGE:  # the export of the run, which is one set of weights
        update["weights_key"] = None
    run.attach(run.config.model_copy(update={**update, "candidates": [path]}), minimum=1)
    metrics = run.measure(recalibrate=recalibrate)
    run.report.log(f"{path}: " + ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))
    run.twa.close()
    del run.twa, run.model  # before the next model is built
    gc.collect()
    return metrics


def _expanded(weights: Sequence[str]) -> list[str]:
    """Return the paths that patterns match, each once."""
    return list(dict.fromkeys(str(path) for pattern in weights for path in expand(pattern)[0]))


def _of_run(config: RunConfig) -> list[str]:
    """Return the last candidate and the exported average of a run.

    Raises:
        ConfigError: the run has not finished.
        StateError: its state is damaged.
    """
    output = Path(config.output)
    state = load_state(output, rows="none") if (output / STATE).exists() else None
    if state is None or not state.finished:
        raise ConfigError(
            f"{output}: has no finished run. Name the weights to evaluate, or finish it with `twa-scale run`."
        )
    (average,) = _expanded([str(output / AVERAGE)])
    # With averaged products, the rank of the model's adapter is the sum of those of all candidates.
    return [average] if config.space == "product" else [state.candidates[-1], average]
