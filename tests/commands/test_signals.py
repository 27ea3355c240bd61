"""`average` and `export` remove unfinished outputs when a signal ends them, and exit with 128 plus its number."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sparse import sparse
from twa_scale.ranks import exit_on_signals
from twa_scale.ranks.process_exit import SignalExit

MEBI = 1 << 20


def start_writing(command: list[str], out: Path) -> "subprocess.Popen[bytes]":
    """Start a command that writes `out`, and return when it has started to write."""

    def heed() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # The process that runs the tests may ignore these signals.
            signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heed)
    while not any(out.parent.glob(f".{out.name}.tmp-*/*.safetensors")):
        assert process.poll() is None and not out.exists()
        time.sleep(0.002)
    return process


@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGINT, 1), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow)]
)
def test_signal_leaves_no_files(tmp_path: Path, number: int, ranks: int) -> None:
    candidates = [sparse(tmp_path / f"candidates/{i}.safetensors", 256 * MEBI) for i in range(2)]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    out = tmp_path / "out"
    process = start_writing(
        [sys.executable, *launcher, "-m", "twa_scale", "average", *map(str, candidates), "--out", str(out)], out
    )
    os.kill(process.pid, number)
    _, result = process.communicate(timeout=120)
    assert f"stopped by {signal.Signals(number).name}".encode() in result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidates"]
    assert process.returncode == (128 + number if ranks == 1 else 1)  # the exit code of torchrun


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_each_signal_ends_a_block_once(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    cleaned = False
    try:
        with pytest.raises(SignalExit) as ended, exit_on_signals():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)
                cleaned = True
    finally:
        signal.signal(number, before)
    assert cleaned and ended.value.code == 128 + number and ended.value.signal == number.name


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exit_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(SystemExit) as ended, exit_on_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGINT)  # the signal arrives while the block cleans up
        assert ended.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
