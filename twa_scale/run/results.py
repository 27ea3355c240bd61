"""The results of a run: when coefficients are recorded, the cost of a step, and the files at the end."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from twa_scale.average.average import TrainableAverage
from twa_scale.average.measures import DISTANCE, EFFECTIVE
from twa_scale.base.clock import read_bandwidth
from twa_scale.base.process_memory import peak_resident
from twa_scale.output.publish import replace_file
from twa_scale.ranks import Group
from twa_scale.run.own_files import PICTURE, ROWS_PICTURE
from twa_scale.run.records import read_records
from twa_scale.run.resume import SUMMARY
from twa_scale.version import __version__

_RECORDED = 100  # the number of times in a run that the coefficients are recorded


def are_due(step: int, num_steps: int, log_every: int) -> bool:
    """Return whether the coefficients of a step are recorded: about 100 times in a run, and after its last step."""
    every = max(1, num_steps // log_every // _RECORDED) * log_every
    return step % every == 0 or step == num_steps


def of_average(twa: TrainableAverage) -> dict[str, Any]:
    """Return the values of the average for the summary of a run. Collective."""
    return {
        "version": __version__,
        EFFECTIVE: twa.effective_candidates,
        DISTANCE: twa.distance(),
        "candidate_distances": twa.candidate_distances,
    }


def costs(
    twa: TrainableAverage, group: Group, device: torch.device, steps: int, forward_backward: float
) -> dict[str, Any]:
    """Return the mean cost of a step of this process: seconds, and bytes moved in memory. Collective.

    Args:
        twa: the average.
        group: all ranks.
        device: the device of the model.
        steps: the number of steps of this process.
        forward_backward: the seconds of forward and backward passes of a step, including `project` and `combine`
            inside them.
    """
    cost = twa.cost(steps)
    overlapped = cost["project"]["seconds_in_backward"] + cost["combine"]["seconds_in_forward"]
    return {
        "bytes_read_per_rank": group.gather(twa.bytes_read),
        "store_bytes_per_rank": group.gather(twa.store_bytes),
        "rounding": twa.rounding and asdict(twa.rounding),
        "peak_resident_bytes_per_rank": group.gather(peak_resident()),
        "forward_backward_seconds": forward_backward - overlapped,
        "cost": cost,
        "read_bandwidth": read_bandwidth(device),
    }


def write_results(
    output: Path, twa: TrainableAverage, summary: Mapping[str, Any], rows: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write the plots and the summary of a run. On one rank.

    Args:
        output: the directory of the run.
        twa: the average.
        summary: the content of summary.json.
        rows: the norms of the corrections of rows, by tensor.
    """
    _draw_pictures(output, twa, rows)
    replace_file(output / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def _draw_pictures(output: Path, twa: TrainableAverage, rows: Mapping[str, npt.NDArray[Any]]) -> None:
    # Imported here, on one rank only: matplotlib is slow to import.
    from twa_scale.run.plots import plot_rows, plot_training

    plot_training(
        output / PICTURE,
        twa.coefficients.cpu().numpy(),
        [Path(label).name for label in twa.fingerprint.labels],
        list(twa.layout.groups),
        read_records(output),
    )
    if rows:
        plot_rows(output / ROWS_PICTURE, rows)
