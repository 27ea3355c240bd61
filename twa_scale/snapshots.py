"""Candidates written while a model trains, each rank its own part."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from twa_scale.engines import Engine, choose_engine
from twa_scale.errors import ConfigError
from twa_scale.export import write_live
from twa_scale.writer import Files, TensorSpec, stored_as, writing
from twa_scale.writer.publish import reported


class Snapshots:
    """Writes `directory/step-00000120/` and so on: safetensors candidates of a plain, DDP or FSDP2 model.

    No rank gathers the model: each writes the spans that it holds into the same files. A candidate appears
    when it is complete; one that a crash cut short is left under a hidden name, which no glob of candidates
    matches.

    Args:
        directory: where the candidates go; the same file system on every rank.
        every_n_steps: steps between two candidates.
        start_step: the first step that may be written; others follow every `every_n_steps`.
        keep_last: delete the oldest candidates beyond this many; None keeps all.
        dtype: type of the floating point tensors in the files; the model's own when not given.
        files: small files for each candidate, such as config.json: content, or what to copy, by name.
        max_shard_size: most bytes in one file.

    Raises:
        ConfigError: numbers that make no sense.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_n_steps: int,
        start_step: int = 0,
        keep_last: int | None = None,
        dtype: torch.dtype | None = None,
        files: Files | None = None,
        max_shard_size: str | int = "5GB",
    ) -> None:
        if every_n_steps < 1 or start_step < 0 or (keep_last is not None and keep_last < 1):
            raise ConfigError(
                f"snapshots: every_n_steps={every_n_steps}, start_step={start_step}, keep_last={keep_last}; "
                "give at least 1, 0 and 1."
            )
        self._directory = Path(directory).expanduser().resolve()
        self._every = every_n_steps
        self._start = start_step
        self._keep = keep_last
        self._dtype = dtype
        self._files = files
        self._max_shard_size = max_shard_size

    def step(self, model: nn.Module, step: int) -> Path | None:
        """Write a candidate if `step` (from 1 on, after its update) is due, and return its path. Collective.

        Raises:
            OutputError: on every rank; nothing is left behind.
            EngineError: a model that is wrapped in an unknown way.
        """
        if step < self._start or step < 1 or (step - self._start) % self._every:
            return None
        return self.save(model, step)

    def save(self, model: nn.Module, step: int) -> Path:
        """Write a candidate now, due or not; one of the same step is replaced. Collective."""
        path = self._directory / f"step-{step:08d}"
        engine = choose_engine(model)
        with engine.replica_group.agree():
            if engine.replica_group.rank == 0:  # replicas hold the same weights: one of them writes
                self._write(engine, path)
                with engine.shard_group.agree():
                    if self._keep is not None and engine.shard_group.rank == 0:
                        with reported(self._directory):
                            _delete(_old(self._directory, step, self._keep))
        return path

    def _write(self, engine: Engine, path: Path) -> None:
        tensors = {info.name: (info.shape, info.dtype) for info in engine.parameters.values()}
        tensors |= {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in engine.buffers().items()}
        specs = [TensorSpec(name, shape, stored_as(own, self._dtype)) for name, (shape, own) in tensors.items()]
        limit = self._max_shard_size
        with writing(
            path, specs, engine.shard_group, max_shard_size=limit, files=self._files, overwrite=True
        ) as writer:
            write_live(writer, engine, {name: (name,) for name in tensors})


def _old(directory: Path, step: int, keep: int) -> Sequence[Path]:
    """Return all but the newest candidates up to `step`; later ones are of another run, and not ours to delete."""
    steps = {
        path: int(path.name.removeprefix("step-"))
        for path in directory.iterdir()
        if re.fullmatch(r"step-\d{8,}", path.name)
    }
    return sorted((path for path in steps if steps[path] <= step), key=lambda path: steps[path])[:-keep]


def _delete(paths: Sequence[Path]) -> None:
    for path in paths:
        # Hidden first: a reader must never find a candidate that is half deleted.
        hidden = path.with_name(f".{path.name}.tmp-old")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
