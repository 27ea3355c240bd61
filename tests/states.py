"""The state of a run, made of an average alone."""

from collections.abc import Sequence
from pathlib import Path

from twa_scale import TrainableAverage
from twa_scale.average.state import save_state


def save_run(average: TrainableAverage, candidates: Sequence[str | Path], directory: Path) -> None:
    """Write what `twa-scale run` would have saved of an average at its first step."""
    state = {"twa": average.state_dict(), "candidates": [str(path) for path in candidates], "course": {}}
    save_state(directory, {**state, "step": 0, "keep": "last", "kept": None, "finished": False})
