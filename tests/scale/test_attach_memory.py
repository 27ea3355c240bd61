"""Attaching needs little memory besides its store, measured in a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twa_scale.candidates.streaming import scratch_bytes

N, WIDTH, LAYERS = 16, 2048, 2  # 8.4 M elements: 268 MB of candidates, 537 MB of deltas in float32
MIB = 1 << 20

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch import nn
import twa_scale

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

def attach(model, candidates):
    return twa_scale.attach(model, candidates, {"store": "packed4"})

n, width, layers, pattern = *map(int, sys.argv[1:4]), sys.argv[4]
start = status("RssAnon")
tiny = nn.Linear(300, 300, bias=False)
attach(tiny, [{"weight": torch.randn(300, 300).bfloat16()} for _ in range(n)]).close()
loaded = status("RssAnon") - start  # compiled kernels, and what the first optimizer imports
model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # reset the peak
twa = attach(model, pattern)
print(json.dumps({"loaded": loaded, "peak": status("VmHWM") - before, "store": twa.store_bytes}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_packed4_needs_less_than_256_mib_besides_the_store(tmp_path: Path) -> None:
    """Two buffers, some rows and the overhead of allocators. With compiled kernels it is below the limit, too.

    Library files that are mapped are left out: ranks of a node share them.
    """
    for i in range(N):
        state = {f"{k}.weight": torch.randn(WIDTH, WIDTH).bfloat16() for k in range(LAYERS)}
        save_file(state, tmp_path / f"step-{i}.safetensors")
    arguments = [*map(str, (N, WIDTH, LAYERS)), str(tmp_path / "step-*")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], check=True, capture_output=True, text=True, env=environment
    )
    actual = json.loads(done.stdout)
    elements = LAYERS * WIDTH * WIDTH
    assert 12 * elements < actual["store"] < 13 * elements
    extra = actual["peak"] - actual["store"]
    print({key: f"{value / MIB:.0f} MiB" for key, value in {**actual, "extra": extra}.items()})
    assert extra < scratch_bytes(N, WIDTH * WIDTH, 2) + 24 * MIB
    assert actual["loaded"] + extra < 256 * MIB
