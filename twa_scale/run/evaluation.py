"""`twa-scale evaluate`: the metrics of weights in files."""

from collections.abc import Sequence
from pathlib import Path

from twa_scale.average.state import STATE, load_state
from twa_scale.candidates.expand import expand
from twa_scale.config import RunConfig, SelectConfig
from twa_scale.errors import ConfigError
from twa_scale.ranks import World
from twa_scale.run.attached import AttachedRun
from twa_scale.run.progress import Report
from twa_scale.run.resume import AVERAGE, with_known_lr

Measured = dict[str, dict[str, float]]


def evaluate_weights(
    config: RunConfig, weights: Sequence[str] = (), report: Report | None = None, *, recalibrate: bool = False
) -> Measured:
    """Evaluate weights in files on `evaluate_split`, one after another, on all ranks of the launcher. Collective.

    Args:
        config: the settings of a run; the model, the data, the engine and how candidates are read are used.
        weights: paths and globs, in any format of candidates. By default, the last candidate and the average that the
            run has exported.
        report: the console output; by default, none.
        recalibrate: compute the BatchNorm statistics of each anew from training data, as runs do.

    Returns:
        The metrics of the task by path.

    Raises:
        TwaError: settings, data or weights are invalid; on every rank.
    """
    world = World.from_environment()
    device = world.device(config.device)
    with world.joined(device, config.output, config.timeout):
        run = AttachedRun(config, world, device, report or Report(active=False))
        paths: list[str] = []
        with run.group.agree():
            if run.group.rank == 0:
                paths = _expanded(weights) if weights else _of_run(config)
        paths = run.group.broadcast(paths)
        run.build(config)
        return {path: _measured(run, path, recalibrate) for path in paths}


def _measured(run: AttachedRun, path: str, recalibrate: bool) -> dict[str, float]:
    """Read the weights as the only candidate of an average, so that each rank reads its own part of any format."""
    plain = {"basis": "normalized", "groups": "global", "center": "mean", "start": "center", "store": "dense16"}
    update = {**plain, "candidates": [path], "select": SelectConfig(), "num_components": None}
    run.read(with_known_lr(run.config.model_copy(update=update), None), minimum=1)
    if (count := run.twa.num_candidates) != 1:
        raise ConfigError(f"{path}: holds {count} candidates. Give the path of each, or a pattern that matches them.")
    metrics = run.measure(recalibrate=recalibrate)
    run.report.say(f"{path}: " + ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()))
    run.twa.close()
    return metrics


def _expanded(weights: Sequence[str]) -> list[str]:
    """Return the paths that patterns match, without those that are there twice."""
    return list(dict.fromkeys(str(path) for given in weights for path in expand(given)[0]))


def _of_run(config: RunConfig) -> list[str]:
    """Return the last candidate and the exported average of a run.

    Raises:
        ConfigError: the run has not finished.
        StateError: its state is damaged.
    """
    output = Path(config.output)
    state = load_state(output) if (output / STATE).exists() else None
    if state is None or not state.finished:
        raise ConfigError(
            f"{output}: has no finished run. Name the weights to evaluate, or finish it with `twa-scale run`."
        )
    return [state.candidates[-1], str(output / AVERAGE)]
