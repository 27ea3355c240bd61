"""The tests that need a GPU."""

import subprocess
import sys
from collections.abc import Iterator

from tests.gpu.stages.setup import Row, Setup


def run(setup: Setup) -> Iterator[Row]:
    options = ["--collect-only"] if setup.tiny else ["--durations=10"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *options, "tests/gpu"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(ended.stdout)
    yield Row("pytest -m gpu", ended.stdout.strip().splitlines()[-1], "all pass", ended.returncode == 0)
