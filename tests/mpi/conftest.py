"""A fixture that runs mpirun."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Mpirun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def mpirun() -> Mpirun:
    """Run `python -m MODULE ...` on ranks that mpirun starts, and return the results."""
    program = shutil.which("mpirun")
    if program is None:
        pytest.fail("mpirun is not installed: these tests need Debian's openmpi-bin (`make setup` as root).")

    def run(size: int, module: str, *words: object, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        ranks = [program, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(size)]
        return subprocess.run(
            [*ranks, sys.executable, "-m", module, *map(str, words)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=timeout,
            capture_output=True,
            text=True,
        )

    return run
