"""Candidates written while a model trains, each rank its own part."""

import logging
import re
from collections.abc import Iterator, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from twa_scale.base.notices import notice
from twa_scale.base.spans import Span, whole
from twa_scale.candidates.carry_over import BASE
from twa_scale.engines import Engine, choose_engine
from twa_scale.errors import ConfigError
from twa_scale.output import (
    BackgroundWrite,
    Files,
    begin,
    check_dtype,
    check_files,
    check_tiling,
    parse_size,
    writing,
)
from twa_scale.output.finite import require_finite
from twa_scale.output.live_weights import may_be_mask, write_live
from twa_scale.output.overwriting import foreign, marked_weights
from twa_scale.output.provenance import marked, provenance
from twa_scale.output.publish import reported, target_of
from twa_scale.output.snapshot_form import snapshot_form
from twa_scale.output.temporary import HiddenName, sweep
from twa_scale.ranks import Group, Pods, require_same_settings

_WROTE = "a snapshot of a training"
_LOG = logging.getLogger(__name__)
Self = TypeVar("Self", bound="Snapshots")


class Snapshots:
    """Writes `directory/step-00000120/` and so on: safetensors candidates of a model under any engine.

    No rank gathers the model: each writes the spans that it holds into the same files. A candidate appears
    when it is complete. What a killed run has left under hidden names, which no glob of candidates matches, is removed
    when a Snapshots of the same directory is made. Give each training a directory of its own: a candidate of a step
    that stands there already is replaced, whichever Snapshots wrote it. A directory of a step that holds anything else,
    as the state of an optimizer, is neither replaced nor deleted, and `keep_last` deletes only what a Snapshots wrote.

    With `asynchronous`, a due step copies this rank's part to host memory, in the type of the file, and returns; a
    thread writes the copy while training goes on. At most one candidate is being written at a time: the next due step
    first waits for it. What went wrong is raised on every rank by the next due step, `wait` or `close`. Use it in a
    `with` block, or call `close` before the process group is taken down.

    Args:
        directory: where the candidates go; the same file system on every rank.
        every_n_steps: steps between two candidates.
        start_step: the first step that may be written; others follow every `every_n_steps`.
        keep_last: delete the oldest candidates beyond this many; None keeps all.
        dtype: type of the floating point tensors in the files; the model's own when not given.
        files: small files for each candidate, such as config.json: content, or what to copy, by their path there.
        max_shard_size: most bytes in one file.
        replica_group: with pods, as for `attach`: the first pod writes.
        asynchronous: write while training goes on.

    Raises:
        OutputError: a directory that is no path.
        ConfigError: numbers, types or sizes that make no sense; names of files that are elsewhere or taken.
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
        replica_group: dist.ProcessGroup | None = None,
        asynchronous: bool = False,
    ) -> None:
        least = [(every_n_steps, 1), (start_step, 0)] + ([] if keep_last is None else [(keep_last, 1)])
        if not all(_is_integer(number, low) for number, low in least):
            raise ConfigError(
                f"snapshots: every_n_steps={every_n_steps!r}, start_step={start_step!r}, keep_last={keep_last!r}; "
                "give integers of at least 1, 0 and 1."
            )
        check_dtype(dtype)
        check_files(files or {}, BASE)
        parse_size(max_shard_size)
        self._directory = target_of(directory)
        self._every = every_n_steps
        self._start = start_step
        self._keep = keep_last
        self._dtype = dtype
        self._files = files or {}
        self._max_shard_size = max_shard_size
        self._replica_group = replica_group
        self._asynchronous = asynchronous
        self._pending: tuple[Pods, Group, BackgroundWrite | None] | None = None
        if not dist.is_initialized() or dist.get_rank() == 0:
            sweep(self._directory)

    def step(self, model: nn.Module, step: int) -> Path | None:
        """Write a candidate if `step` (from 1 on, after its update) is due, and return its path. Collective.

        When asynchronous, the path appears later.

        Raises:
            OutputError: on every rank; nothing is left behind. When asynchronous, that of the one before.
            EngineError: a model that is wrapped in an unknown way.
            ConfigError: a step that is no integer of at least 0.
        """
        step = _checked(step)
        if step < self._start or step < 1 or (step - self._start) % self._every:
            return None
        return self.save(model, step)

    def save(self, model: nn.Module, step: int) -> Path:
        """Write a candidate now, due or not; one of the same step is replaced. Collective."""
        step = _checked(step)
        if self._pending and self._pending[2] and self._pending[2].alive:
            _LOG.info("snapshots: step %d waits until the snapshot before is written", step)
        self.wait()
        path = self._directory / f"step-{step:08d}"
        engine = choose_engine(model, self._replica_group)
        pods, group = Pods(engine.shard_group, engine.replica_group), engine.shard_group
        told = {"step": step, "asynchronous": self._asynchronous, "keep_last": self._keep}
        require_same_settings(pods, told)  # what they write, and where, is compared by the writer
        with pods.agree():
            background = None
            if pods.number == 0:  # pods hold the same weights: one of them writes
                if self._asynchronous:
                    background = self._start_writing(engine, path, step)
                else:
                    self._write(engine, path, step)
                    with group.agree():
                        if group.rank == 0:
                            self._delete_old(step)
        if self._asynchronous:
            self._pending = (pods, group, background)
        return path

    def wait(self) -> None:
        """Return when the candidate that is being written, if any, is complete. Collective.

        Raises:
            OutputError: on every rank; it could not be written, and nothing of it is left behind.
        """
        if self._pending is None:
            return
        (pods, group, background), self._pending = self._pending, None
        with pods.agree():
            if background:
                background.join(group)

    def close(self) -> None:
        """Do as `wait`. Collective."""
        self.wait()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the other ranks may not come: what is being written ends by itself.
        if kind is None:
            self.close()

    def _write(self, engine: Engine, path: Path, step: int) -> None:
        form, limit = snapshot_form(engine, self._dtype), self._max_shard_size
        with writing(
            path,
            form.specs,
            engine.shard_group,
            max_shard_size=limit,
            overwrite=True,
            base=BASE,
            **snapshot_files(step, self._files),
        ) as writer:
            write_live(writer, engine, {name: (name,) for name in (*engine.parameters, *engine.buffers())}, form)

    def _start_writing(self, engine: Engine, path: Path, step: int) -> BackgroundWrite:
        form, group = snapshot_form(engine, self._dtype), engine.shard_group
        specs, said, limit = form.specs, snapshot_files(step, self._files), self._max_shard_size
        writer = begin(path, specs, group, max_shard_size=limit, overwrite=True, base=BASE, metadata=said["metadata"])
        try:
            copies: list[tuple[Span, torch.Tensor]] = []
            with group.agree():
                dtypes = {spec.name: spec.dtype for spec in specs}
                for held, live in _held(engine):
                    masks = may_be_mask(engine, held.name)
                    for span, values in form.spans(held, live.detach()):
                        copies.append((span, _host_copy(values, dtypes[span.name])))
                        require_finite(span, values, copies[-1][1], masks=masks)
            counts = dict.fromkeys(dtypes, 0)
            for span, _ in copies:
                counts[span.name] += len(span)
            check_tiling(counts, specs, group)
        except BaseException:
            if group.rank == 0:
                writer.discard()
            raise
        return BackgroundWrite(writer, copies, group, said["files"], partial(self._delete_old, step))

    def _delete_old(self, step: int) -> None:
        if self._keep is not None:
            with reported(self._directory):
                for path in _old(self._directory, step, self._keep):
                    _delete(path)


def snapshot_files(step: int, files: Files) -> dict[str, Any]:
    """Return the `files` and the `metadata` of the candidate of a step, by which it is known as one."""
    return marked(provenance(_WROTE, [], step=step), files)


def _held(engine: Engine) -> Iterator[tuple[Span, torch.Tensor]]:
    """Yield what this rank writes: its spans, and the buffers on the first rank."""
    for span in engine.spans():
        yield span, engine.live(span)
    if engine.shard_group.rank == 0:
        for name, buffer in engine.buffers().items():
            yield whole(name, tuple(buffer.shape)), buffer.reshape(-1)


def _host_copy(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(values.shape, dtype=dtype).copy_(values.detach())


def _old(directory: Path, step: int, keep: int) -> Sequence[Path]:
    """Return all but the newest candidates up to `step`; later ones are of another run, and not ours to delete."""
    steps = {
        path: int(path.name.removeprefix("step-"))
        for path in directory.iterdir()
        if re.fullmatch(r"step-\d{8,}", path.name)
    }
    return sorted((path for path in steps if steps[path] <= step), key=lambda path: steps[path])[:-keep]


def _delete(path: Path) -> None:
    weights = marked_weights(path, _WROTE)
    if not weights or (others := foreign(path, weights)):
        held = f"it holds {others[0]}" if weights else "no Snapshots has written it"
        notice(f"{path}: keep_last does not delete it, because {held}. Delete it yourself, or use another directory.")
        return
    # Hidden first: a reader must never find a candidate that is half deleted.
    with HiddenName(path) as hidden:
        path.rename(hidden.path)


def _checked(step: int) -> int:
    if not _is_integer(step, 0):
        raise ConfigError(f"snapshots: step={step!r}; give an integer of at least 0.")
    return int(step)


def _is_integer(value: object, least: int) -> bool:
    return type(value) is not bool and isinstance(value, Integral) and int(value) >= least
