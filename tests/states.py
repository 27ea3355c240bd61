"""The state of a run, created from an average alone."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from twa_scale import TrainableAverage
from twa_scale.average.state import AverageState, save_state


def save_run(average: TrainableAverage, candidates: Sequence[str | Path], directory: Path) -> None:
    """Write what `twa-scale run` saves of an average at its first step."""
    state = {"twa": average.state_dict(), "candidates": [str(path) for path in candidates], "course": {}}
    save_state(directory, {**state, "step": 0, "keep": "last", "kept": None, "finished": False})


def values_of_rows(state: AverageState, directory: Path) -> dict[str, Tensor]:
    """Return the corrections of all rows of a state, from its directory."""
    assert state.rows is not None
    with state.rows.reader(directory) as values:
        return {name: values(name) for name in state.rows.names.values()}
