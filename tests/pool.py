"""A pool of rank processes for the whole test session, with real process groups and without start-up time.

Each call runs one module-level function on ranks 0..size-1 in a fresh gloo group of exactly that size, which meets
through a file. Workers are forked from a server that has imported torch, DeepSpeed and the kernels once (preload.py).
"""

import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.old_torch import forget_sharding, train_fsdp2_on_cpus
from twa_scale.errors import TwaError
from twa_scale.ranks.destroying import KEPT, destroy_process_group

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ["tests.pool", "tests.preload"]
MAX_RANKS = 4
MAX_THREADS = 50  # of a worker: tensor parallelism of torch keeps those of process groups that were destroyed
GRACE = 10.0  # seconds that the other ranks have to return after the first one raised


class RanksDisagree(AssertionError):
    """Some ranks raised an error, and others did not or raised another one."""


class RanksHang(AssertionError):
    """Ranks were killed because they did not return in time."""


@dataclass
class Outcome:
    """The result of one rank: a value, or an error and its traceback."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""

    def same_error(self, other: "Outcome") -> bool:
        return type(self.error) is type(other.error) and str(self.error) == str(other.error)


@dataclass
class Worker:
    """The parent's end of one rank process."""

    process: BaseProcess
    pipe: Connection
    stack: Path


class Pool:
    """Calls functions on ranks: `ranks(function, world_size, **kwargs)` returns their results by rank."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._calls = 0
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")

    def __call__(
        self, function: Callable[..., Any], world_size: int, *, timeout: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Return the results by rank; raise the error that every rank raised, or RanksDisagree, or RanksHang."""
        outcomes = self.outcomes(function, world_size, timeout=timeout, **kwargs)
        raised = [rank for rank, outcome in enumerate(outcomes) if outcome.error is not None]
        if not raised:
            return [outcome.value for outcome in outcomes]
        first = outcomes[raised[0]]
        traces = "\n".join(f"rank {rank}:\n{outcomes[rank].trace}" for rank in raised)
        if len(raised) < world_size or not all(outcome.same_error(first) for outcome in outcomes):
            raise RanksDisagree(f"{_summary(outcomes)}\n{traces}")
        assert first.error is not None
        if sys.version_info >= (3, 11):
            first.error.add_note(f"on all {world_size} ranks; rank 0:\n{first.trace}")
        raise first.error

    def error(self, function: Callable[..., Any], world_size: int, **kwargs: Any) -> TwaError:
        """Return the TwaError that every rank raised, with the same class and message."""
        try:
            values = self(function, world_size, **kwargs)
        except TwaError as error:
            return error
        raise AssertionError(f"no rank raised; the results are {values!r}")

    def outcomes(
        self, function: Callable[..., Any], world_size: int, *, timeout: float = 60.0, **kwargs: Any
    ) -> list[Outcome]:
        """Run, and return the outcome of each rank."""
        self._start(world_size)
        self._calls += 1
        store = str(Path(self._directory.name) / f"store-{self._calls}")
        call = pickle.dumps((function.__module__, function.__qualname__, kwargs))
        workers = self._workers[:world_size]
        for rank, worker in enumerate(workers):
            worker.pipe.send((call, rank, world_size, store, timeout))
        return self._collect(workers, time.monotonic() + timeout)

    def close(self) -> None:
        """Kill the workers and delete their files."""
        self._kill()
        self._directory.cleanup()

    def _start(self, size: int) -> None:
        if size > MAX_RANKS:
            raise ValueError(f"{size} ranks; the pool has at most {MAX_RANKS}")
        if any(_num_threads(worker) > MAX_THREADS for worker in self._workers):
            self._kill()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        while len(self._workers) < size:
            working_directory, there = context.Pipe()
            stack = Path(self._directory.name) / f"stack-{self._calls}-{len(self._workers)}"
            process = context.Process(target=_work, args=(there, str(stack)), daemon=True)
            process.start()
            there.close()
            self._workers.append(Worker(process, working_directory, stack))

    def _collect(self, workers: list[Worker], deadline: float) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        pipes = {worker.pipe: rank for rank, worker in enumerate(workers)}
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(pipes.values())
                message = f"{_summary(outcomes, late)}\n" + "\n".join(_stack_of(rank, workers[rank]) for rank in late)
                message += "".join(
                    f"\nrank {rank}:\n{outcome.trace}" for rank, outcome in outcomes.items() if outcome.error
                )
                self._kill()
                raise (RanksDisagree if any(o.error for o in outcomes.values()) else RanksHang)(message)
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pipes.pop(pipe)
                try:
                    outcomes[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    workers[rank].process.join()
                    code = workers[rank].process.exitcode
                    self._kill()
                    message = f"rank {rank} died with exit code {code}\n{_stack_of(rank, workers[rank])}"
                    raise RanksHang(message) from None
                if outcomes[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return [outcomes[rank] for rank in range(len(workers))]

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers = []


def _num_threads(worker: Worker) -> int:
    """Return the number of threads. Caches of torch or DeepSpeed keep three for each group."""
    try:
        return len(os.listdir(f"/proc/{worker.process.pid}/task"))  # noqa: PTH208
    except FileNotFoundError:  # the process has ended, which the reader notices
        return 0


def _summary(outcomes: "list[Outcome] | dict[int, Outcome]", late: list[int] | None = None) -> str:
    pairs = list(outcomes.items()) if isinstance(outcomes, dict) else list(enumerate(outcomes))
    messages = [f"rank {r} raised {type(o.error).__name__}: {o.error}" for r, o in pairs if o.error is not None]
    quiet = [str(r) for r, o in pairs if o.error is None]
    if quiet:
        messages.append(f"rank{'s' * (len(quiet) > 1)} {', '.join(quiet)} did not raise")
    if late:
        messages.append(f"rank{'s' * (len(late) > 1)} {', '.join(map(str, late))} did not come back and were killed")
    return "; ".join(messages)


def _stack_of(rank: int, worker: Worker) -> str:
    stack = worker.stack.read_text().strip() if worker.stack.exists() else ""
    return f"rank {rank} was last seen in:\n{stack or '(no stack was written)'}"


def _work(pipe: Connection, stack: str) -> None:
    """Run a worker: receive a call, run it in a new group, and send the result."""
    os.chdir(ROOT)  # the test that started this worker may have had a directory that is removed after it
    torch.set_num_threads(1)
    train_fsdp2_on_cpus()
    with Path(stack).open("w") as file:
        faulthandler.enable(file)  # a crash leaves its stack, too
        while True:
            try:
                call, rank, size, store, timeout = pipe.recv()
            except EOFError:
                return
            faulthandler.dump_traceback_later(0.9 * timeout, file=file)
            outcome = _run(call, rank, size, store)
            faulthandler.cancel_dump_traceback_later()
            try:
                result = pickle.dumps(outcome)
            except Exception as error:
                result = pickle.dumps(Outcome(error=RuntimeError(f"the result cannot be pickled: {error}")))
            pipe.send_bytes(result)  # as bytes, because `send` would share each tensor with an open file


_LINEAR = torch.nn.functional.linear


def _run(call: bytes, rank: int, size: int, store: str) -> Outcome:
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    close_at_once = False
    try:
        dist.barrier()  # a rank that is done must not leave while others still connect
        module, name, kwargs = pickle.loads(call)
        return Outcome(value=getattr(importlib.import_module(module), name)(**kwargs))
    except Exception as error:
        close_at_once = True
        return Outcome(error=_portable(error), trace=traceback.format_exc())
    finally:
        destroy_process_group()
        if close_at_once:  # otherwise other ranks would wait for this one until their time limit
            time.sleep(0.1 * bool(KEPT))
            KEPT.clear()
        forget_sharding()  # DTensor would reuse the equal mesh of an earlier call, whose groups were destroyed
        torch.nn.functional.linear = _LINEAR  # ZeRO-3 keeps one, which fails in inference mode
        gc.collect()


def _portable(error: Exception) -> Exception:
    try:
        copy = pickle.loads(pickle.dumps(error))
        assert str(copy) == str(error)
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
