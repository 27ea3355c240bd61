"""The directory of a run that has started, created without training."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import twa_scale
from tests.states import save_run

MARKUP = """<script>alert('a')<&"b">"""
RECORDS = [
    {"step": 0, "validation/loss": 1.5, "distance": 0.0, "effective_candidates": 4.0},
    *({"step": s, "loss": 2 - s / 10, "lr": 0.1, "seconds": 0.25, **{f"coefficients/{i}": 0.25 for i in range(4)}}
      for s in range(1, 9)),
    {"step": 8, "validation/loss": float("nan")},
]  # fmt: skip


def write_run(root: Path) -> Path:
    """Write candidates whose names are markup and the files of a run at step 8 of 20, and return its directory."""
    paths = [root / f"{MARKUP}-step-{i}" for i in (10, 20, 30, 40)]
    for i, path in enumerate(paths):
        path.mkdir()
        random = torch.Generator().manual_seed(i)
        state = {name: torch.randn(value.shape, generator=random) for name, value in _model().state_dict().items()}
        save_file(state, path / "model.safetensors")
    twa = twa_scale.attach(_model(), list(map(str, paths)), {"groups": "tensor", "start": "last"})
    twa.start_from([0.75, 0.5, 0.25, -0.5])
    save_run(twa, paths, root / "run")
    (root / "run/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + '{"step": 9')
    (root / "run/config.json").write_text(json.dumps({"steps": 20, "task": {"name": MARKUP}, "start": "last"}))
    return root / "run"


def _model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
