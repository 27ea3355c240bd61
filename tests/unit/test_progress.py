"""Progress callbacks and progress bars of reads and writes."""

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import twa_scale
from twa_scale.run import progress as reporting
from twa_scale.run.progress import Report
from twa_scale.tools.inspection import inspect

Progress = list[tuple[int, int]]


def progress_of(told: Progress, nbytes: int) -> bool:
    return sum(done for done, _ in told) == nbytes and {total for _, total in told} == {nbytes}


def test_totals_hold_for_buffers_and_narrower_files(tmp_path: Path) -> None:
    """Integer buffers are read from all candidates. Exports are counted with their size in the file."""
    n = 3
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 40))
    states = [{name: value + i for name, value in model.state_dict().items()} for i in range(n)]
    floats = sum(value.nbytes for value in states[0].values() if value.is_floating_point())
    read, actual, written = Progress(), Progress(), Progress()
    twa = twa_scale.attach(model, states, progress=lambda *told: read.append(told))
    assert progress_of(read, n * (floats + 8)) and twa.bytes_read == n * (floats + 8)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    twa.export(tmp_path / "out", dtype=torch.bfloat16, progress=lambda *told: written.append(told))
    assert progress_of(written, 2 * parameters)
    inspect(str(tmp_path / "out"), progress=lambda *told: actual.append(told))
    assert progress_of(actual, floats // 2)


@pytest.mark.parametrize("active", [True, False])
def test_speed_and_time_left_are_shown(monkeypatch: pytest.MonkeyPatch, active: bool) -> None:
    displayed = io.StringIO()
    monkeypatch.setattr(
        reporting,
        "Console",
        lambda **options: Console(file=displayed, force_terminal=True, width=120, quiet=options["quiet"]),
    )
    with Report(active=active).bytes("reading candidates") as progress:
        for _ in range(4):
            progress(1_000_000_000, 10_000_000_000)
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", displayed.getvalue())
    assert bool(re.search(r"reading candidates .* 4\.0/10\.0 GB +[\d.]+ .B/s +\d:\d\d:\d\d", text)) == active, text
