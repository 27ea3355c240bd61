"""Run `python -m MODULE` as a fork of the server of rank processes, which has imported what most programs need."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.pool import PRELOAD


def run_module(module: str, *words: object, timeout: float) -> "subprocess.CompletedProcess[str]":
    """Run a module of the tests with these arguments, and return its exit code, output and errors.

    The environment is that of the server, which keeps the one in which it was started.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="forked-") as directory:
        out, err = (Path(directory) / name for name in ("out", "err"))
        process = context.Process(target=_run, args=(module, [*map(str, words)], str(out), str(err)))
        process.start()
        process.join(timeout)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *map(str, words)], timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess([module, *map(str, words)], code, out.read_text(), err.read_text())


def _run(module: str, words: list[str], out: str, err: str) -> None:
    for path, stream in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    torch.set_num_threads(1)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
