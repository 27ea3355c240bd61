"""Run a program that starts many others: `python -m tests.forked_programs PROGRAM ARGUMENTS`. Tests start it.

Each `subprocess.run([sys.executable, ...])` of the program is a fork of this process, which has imported torch and
transformers once: the import takes longer than what most programs do. Nothing here may start a thread.
"""

import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.bert import modeling_bert, tokenization_bert

import twa_scale.run
from twa_scale.cli import main as _main

LOADED = (transformers, modeling_bert, tokenization_bert, twa_scale.run, _main)


def run_program(words: list[str]) -> None:
    """Run `[-m MODULE | FILE] ARGUMENTS` as Python does."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def fork(command: list[str], check: bool = False, **_: Any) -> "subprocess.CompletedProcess[str]":
    """Replace `subprocess.run` for commands that begin with this Python."""
    assert command[0] == sys.executable, command
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 0
        try:
            run_program(command[1:])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if check and code:
        raise subprocess.CalledProcessError(code, command)
    return subprocess.CompletedProcess(command, code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    subprocess.run = fork  # type: ignore[assignment]
    run_program(sys.argv[1:])
