"""Run trainings that are killed at random: `python -m tests.chaos.killed_trainings DIRECTORY SEED`.

A Trainer of transformers, one of Lightning and a loop with Accelerate train a small model and keep averages. Each life
is a fork of this process, which has imported the libraries once, and resumes from the newest checkpoint that is whole.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file

from tests.integrations import train_accelerate, train_lightning, train_transformers
from tests.integrations.small import ACCUMULATE, DECAY, LEARN, SIZE, STEPS, WINDOW, rows, same
from twa_scale.integrations.accelerate import optimizer_of, prepare
from twa_scale.integrations.lightning import TwaCallback

KILLS, SECONDS = 5, 40.0
"""Kills of each trainer, and the seconds after which no more are tried."""
LIFE = 60.0
"""Seconds after which a life hangs."""


def fork(function: Callable[..., Any], *arguments: Any) -> int:
    """Call a function in a fork of this process and return the process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        function(*arguments)
        code = 0
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """Return the exit code of a fork, or None if it still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


class Transformers:
    """A training with transformers' Trainer. Complete checkpoints contain the state of the averages."""

    def do(self, directory: Path) -> None:
        whole = self.whole(directory)
        resume = str(whole[-1]) if whole else None
        options: dict[str, Any] = {"learn": train_transformers.LEARN, "learn_steps": 3}
        train_transformers.train("plain", directory, resume, **options)

    def whole(self, directory: Path) -> list[Path]:
        actual = [path.parent for path in directory.glob("checkpoint-*/averages-00000-of-00001.pt")]
        return sorted(actual, key=lambda path: int(path.name.rpartition("-")[2]))

    def kept(self, checkpoint: Path) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        return {
            "weights": load_file(checkpoint / "model.safetensors"),
            "average": load_file(checkpoint / "average/model.safetensors"),
            "averages": torch.load(checkpoint / "averages-00000-of-00001.pt", weights_only=True),
            "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        }

    def left(self, directory: Path) -> dict[str, Any]:
        """Return the results of a completed training."""
        history = json.loads((self.whole(directory)[-1] / "trainer_state.json").read_text())["log_history"]
        return {
            "learned": load_file(directory / "average/model.safetensors"),
            "evaluated": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        }


class Lightning:
    """A training with Lightning. A checkpoint that was written when the process was killed is incomplete.

    Each step is a batch and an epoch: Lightning itself loses the gradients of an accumulation, and repeats the batches
    of an epoch, within which it resumes.
    """

    def do(self, directory: Path) -> None:
        whole = self.whole(directory)
        callback = TwaCallback(ema=[DECAY], window=WINDOW, evaluate_also=["last"], learn=LEARN, learn_steps=3)
        trainer = train_lightning.trainer_with("automatic", directory, callback)
        trainer.accumulate_grad_batches = trainer.limit_train_batches = 1
        data = train_lightning.data
        trainer.fit(train_lightning.Module(), data(), data(), ckpt_path=whole[-1] if whole else None)

    def whole(self, directory: Path) -> list[Path]:
        actual = []
        for path in directory.glob("step=*.ckpt"):
            try:
                actual.append((torch.load(path, weights_only=True)["global_step"], path))
            except (RuntimeError, EOFError, UnpicklingError):
                continue
        return [path for _, path in sorted(actual)]

    def kept(self, checkpoint: Path) -> dict[str, Any]:
        stored = torch.load(checkpoint, weights_only=True)
        return {key: stored[key] for key in ("state_dict", "twa_scale", "optimizer_states", "global_step")}

    def left(self, directory: Path) -> dict[str, Any]:
        return {"learned": torch.load(directory / "average/average.ckpt", weights_only=True)["state_dict"]}


class Accelerate:
    """A training loop with Accelerate. A state directory is renamed when it is complete."""

    def do(self, directory: Path) -> None:
        whole = self.whole(directory)
        training = train_accelerate.Training("plain")
        averages = prepare(training.accelerator, training.model, ema=[DECAY], window=WINDOW)
        if whole:
            training.accelerator.load_state(str(whole[-1]))
        epoch = rows().split(SIZE)
        for step in range(averages.num_steps, STEPS):
            for i in range(ACCUMULATE):
                training.micro_step(epoch[(ACCUMULATE * step + i) % len(epoch)])
            shutil.rmtree(directory / "unfinished", ignore_errors=True)
            training.accelerator.save_state(str(directory / "unfinished"))
            (directory / "unfinished").rename(directory / f"state-{step + 1}")
        with averages.learning(LEARN) as twa:
            training.epoch(optimizer_of(training.accelerator, twa, save=False))
            torch.save(training.weights(), directory / "learned.pt")

    def whole(self, directory: Path) -> list[Path]:
        return sorted(directory.glob("state-*"))

    def kept(self, checkpoint: Path) -> dict[str, Any]:
        files = [path for path in checkpoint.rglob("*") if path.suffix == ".pt" or path.name == "optimizer.bin"]
        stored = {path.name: torch.load(path, weights_only=True) for path in files}
        return stored | {"weights": load_file(checkpoint / "model.safetensors")}

    def left(self, directory: Path) -> dict[str, Any]:
        learned: dict[str, Any] = torch.load(directory / "learned.pt", weights_only=True)
        return learned


def require_same(trainer: Any, directory: Path, undisturbed: Path) -> None:
    """Check that a killed and resumed training has the results of an undisturbed one."""
    wanted = {checkpoint["name"]: checkpoint for checkpoint in contents(trainer, undisturbed)}
    for checkpoint in contents(trainer, directory):
        for key, value in checkpoint.items():
            assert same(value, wanted[checkpoint["name"]][key]), f"{checkpoint['name']}: {key}"
    assert {checkpoint["name"] for checkpoint in contents(trainer, directory)} == set(wanted)
    assert same(trainer.left(directory), trainer.left(undisturbed))


def contents(trainer: Any, directory: Path) -> list[dict[str, Any]]:
    """Return the content of complete checkpoints. Lightning writes `step=4-v1.ckpt` if `step=4.ckpt` exists."""
    return [
        {"name": path.name.removesuffix(".ckpt").partition("-v")[0], **trainer.kept(path)}
        for path in trainer.whole(directory)
    ]


def kill_and_resume(trainer: Any, root: Path, chance: random.Random) -> str:
    """Kill processes at random moments until a training completes. Repeat until there were enough kills."""
    began = time.monotonic()
    undisturbed = root / "undisturbed"
    assert ended(fork(trainer.do, undisturbed), LIFE) == 0
    usual = time.monotonic() - began
    kills = trainings = 0
    while kills < KILLS and time.monotonic() - began < SECONDS:
        directory = root / str(trainings)
        lives = 0
        while True:
            kept = {path.name for path in trainer.whole(directory)}
            child = fork(trainer.do, directory)
            code = ended(child, LIFE if lives == 3 else chance.random() * usual)
            if code is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
            lives += 1
            assert kept <= {path.name for path in trainer.whole(directory)}
            if code is not None:
                assert code == 0, f"a life that resumed from {sorted(kept)} has failed"
                break
        require_same(trainer, directory, undisturbed)
        shutil.rmtree(directory)
        trainings += 1
    assert kills
    return f"{type(trainer).__name__}: {kills} kills, {trainings} trainings, {time.monotonic() - began:.0f} s"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in (Transformers(), Lightning(), Accelerate()):
        print(kill_and_resume(one, Path(sys.argv[1]) / type(one).__name__, random.Random(int(sys.argv[2]))), flush=True)
