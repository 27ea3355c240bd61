"""Compare the exported average with the last candidate, the center and the last step."""

from collections.abc import Mapping
from typing import Any

from twa_scale.config import RunConfig
from twa_scale.run.best import BestAverage

BEST, LAST = "best candidate", "last candidate"
CENTER, TRAINED, EXPORTED = "center", "trained", "exported"
MEMORIZED = 0.7
"""The ratio of training loss to held-out loss below which a run reports that the training data is memorized."""
Measured = dict[str, dict[str, float]]


def compared_candidate(measured: Mapping[str, Any]) -> str:
    """Return the candidate that the average is compared with: the best one if all were evaluated, else the last."""
    return BEST if BEST in measured else LAST


def verdict(kept: BestAverage, split: str, measured: Measured) -> str:
    """Return the comparison of the exported average with the best or last candidate and with the center."""
    best_candidate, center = _against_candidate(kept, split, measured), measured.get(CENTER)
    if center is None or kept.better(measured[EXPORTED], center):
        return best_candidate
    relation = "better" if kept.better(center, measured[EXPORTED]) else "as good"
    return f"{best_candidate} The center, which needs no training, is {relation}: {kept.value(center):.6g}."


def _against_candidate(kept: BestAverage, split: str, measured: Measured) -> str:
    other = compared_candidate(measured)
    exported, candidate = measured[EXPORTED], measured[other]
    name = f"{split}/{kept.metric}"
    numbers = f"{name} {kept.value(exported):.6g} against {kept.value(candidate):.6g}"
    if kept.better(exported, candidate):
        return f"The average is better than the {other}: {numbers}."
    if kept.better(candidate, exported):
        return (
            f"The average is WORSE than the {other}: {numbers}. Use that candidate, or train with another rate, center "
            "or set of candidates."
        )
    return f"The average is not better than the {other}: {numbers}."


def evaluated_on(config: RunConfig) -> str:
    """Return a title with the split of the evaluations."""
    trained = ", on which the coefficients were trained" if config.evaluate_split == config.split else ""
    return f"Evaluation on the {config.evaluate_split} split{trained}"


def caveat(config: RunConfig) -> str | None:
    """Return a warning if the evaluations are not on held-out data, else None."""
    split = config.evaluate_split
    if split == config.split:
        return f"evaluate_split is {split!r}, the training split: the evaluations are not on held-out data"
    choosing = {"keep: best": config.keep == "best", "start: best": config.start == "best"}
    choosing["optimizer.lr: auto"] = config.optimizer.lr == "auto"
    named = [name for name, does in choosing.items() if does]
    if split != "test" or not named:
        return None
    if named == ["keep: best"]:
        fix = "give keep: last, or evaluate_split: validation"
    else:
        fix = "give evaluate_split: validation"
    verb = "choose" if len(named) > 1 else "chooses"
    return f"{', '.join(named)} {verb} by the test split, so results on it are biased: {fix}"


def exported_as(kept: BestAverage, split: str, keep: str, step: int) -> str:
    """Return a sentence with the exported coefficients and the reason for their choice. `step` is the last step."""
    name = f"{split}/{kept.metric}"
    if keep == "last":
        return f"exported: step {step}, the last (keep: last)"
    if kept.best is None:
        return f"exported: step {step}, the last: no evaluation had a finite {name}"
    which = "the highest" if kept.higher else "the lowest"
    last = "the last, and " if kept.best.step == step else ""
    return f"exported: {kept.best.name}, {last}{which} {name} of the evaluations (keep: best)"


def advice(kept: BestAverage, config: RunConfig, step: int, training_loss: float | None) -> str | None:
    """Return advice if the start was better than each later evaluation, else None.

    Args:
        kept: the best average.
        config: the settings of the run.
        step: the last step.
        training_loss: the mean loss of the first steps, if they were taken by this process.
    """
    if kept.best is None or kept.best.step > 0 or kept.best.trial_lr is not None or step == 0:
        return None
    result = f"No step was better than the start on the {config.evaluate_split} split."
    is_held_out = config.evaluate_split != config.split
    held_out = kept.best.metrics.get("loss", 0.0) if is_held_out else 0.0
    if training_loss is None or held_out <= 0 or training_loss > MEMORIZED * held_out:
        return f"{result} Try a lower optimizer.lr, fewer coefficients (groups), or candidates that are further apart."
    return (
        f"{result} There the loss at the start is {held_out:.4g}, and on the {config.split} split {training_loss:.4g}: "
        "the candidates have memorized these data. Train the coefficients on data that they have not seen, and few of "
        "them (groups: global)."
    )


def with_split(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with the prefix `split`/, as in records."""
    return {f"{split}/{name}": value for name, value in metrics.items()}


def rows(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Return the rows of the comparison table: a label, with the step if there is one, and the metrics."""
    exported = summary.get("exported_from") or f"step {summary['exported_step']}"
    steps = {TRAINED: f"step {summary['steps']}", EXPORTED: exported}
    return [
        (f"{name}, {steps[name]}" if name in steps else name, metrics)
        for name, metrics in summary["comparison"].items()
    ]
