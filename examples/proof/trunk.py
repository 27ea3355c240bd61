"""The training that all methods start from: at a constant rate after the warmup."""

import shutil
from pathlib import Path
from typing import Any

from examples.proof.cost import clock
from examples.proof.files import load, save
from examples.training import Training
from twa_scale import RunningAverages


class Trunk:
    """The files of a trunk: candidates, exponential averages, the last state, and those that decayed runs start from.

    Args:
        directory: where they are.
        settings: `steps`, `candidates`, `every`, `ema`, `save_every`, and `branches`, the steps whose states are kept.
        recorded: all settings that the trunk depends on. It goes on only from a state of the same.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], recorded: dict[str, Any]) -> None:
        self.directory = directory
        self.settings = settings
        self.recorded = recorded

    def run(self, training: Training) -> dict[str, float]:
        """Train, or go on from the last saved state, and return the seconds of all of it."""
        averages = RunningAverages(
            training.model,
            ema=self.settings["ema"],
            window={"every": self.settings["every"], "keep": self.settings["candidates"], "store": "dense32"},
        )
        first, before = self._resume(training, averages)
        start = clock(training.device)
        for step in range(first, self.settings["steps"]):
            if step in self.settings["branches"]:
                save(training.state(), self.state(step))
            loss = training.update(step, 1.0)
            averages.step()
            if (step + 1) % self.settings["save_every"] == 0:
                spent = before + clock(training.device) - start
                self._keep(training, averages, step + 1, spent)
                print(f"{self.directory}: step {step + 1}, {spent:.0f} s, loss {loss:.3f}", flush=True)
        spent = before + clock(training.device) - start
        save(training.state(), self.state(self.settings["steps"]))
        write_candidates(averages, self.directory / "candidates")
        for name in self.ema_names:
            with averages.weights(name):
                save(training.model.state_dict(), self.ema(name))
        return {"steps": self.settings["steps"], "seconds": spent}

    @property
    def ema_names(self) -> list[str]:
        return [f"ema:{decay}" for decay in self.settings["ema"]]

    @property
    def candidates(self) -> str:
        return f"{self.directory}/candidates/step-*"

    def state(self, step: int) -> Path:
        return self.directory / f"state-{step}.pt"

    def ema(self, name: str) -> Path:
        return self.directory / f"{name.replace(':', '-')}.pt"

    def _keep(self, training: Training, averages: RunningAverages, step: int, spent: float) -> None:
        """Write what `_resume` needs, then remove what it needed before."""
        states = self.directory / "resume"
        averages.save_state(states / str(step))
        state = {**training.state(), "step": step, "seconds": spent, "settings": self.recorded}
        save(state, self.directory / "resume.pt")
        for older in states.iterdir():
            if older.name != str(step):
                shutil.rmtree(older)

    def _resume(self, training: Training, averages: RunningAverages) -> tuple[int, float]:
        """Go on from the last state. Return its step, and the seconds until then."""
        path = self.directory / "resume.pt"
        if not path.exists():
            return 0, 0.0
        state = load(path)
        if state.get("settings") != self.recorded:
            print(f"{path} was written with other settings: the trunk begins anew", flush=True)
            return 0, 0.0
        training.restore(state)
        states = self.directory / "resume" / str(state["step"])
        if not averages.load_state(states):
            raise SystemExit(f"{states} has no averages for {path}: remove that file to begin anew")
        return state["step"], state["seconds"]


def write_candidates(averages: RunningAverages, directory: Path) -> None:
    """Write the snapshots of the window, in the place of those of a process that was killed while it wrote them."""
    shutil.rmtree(directory, ignore_errors=True)
    averages.save(directory)
