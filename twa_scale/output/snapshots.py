"""Candidates written during training, by all ranks together."""

import logging
import re
from collections.abc import Iterator
from functools import partial
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from twa_scale.base.normal_mode import in_normal_mode
from twa_scale.base.notices import notice
from twa_scale.base.spans import Span, whole_tensor
from twa_scale.engines import Engine, choose_engine
from twa_scale.errors import ConfigError
from twa_scale.output import (
    BackgroundWrite,
    Files,
    check_dtype,
    check_files,
    check_tiling,
    open_writer,
    parse_size,
)
from twa_scale.output.finite import require_finite
from twa_scale.output.live_weights import may_be_mask, write_checkpoint
from twa_scale.output.overwriting import foreign_files, own_weight_files
from twa_scale.output.provenance import provenance, with_provenance
from twa_scale.output.publish import output_errors, target_of
from twa_scale.output.snapshot_form import SnapshotForm, snapshot_form
from twa_scale.output.temporary import TemporaryName, remove_leftovers
from twa_scale.ranks import Group, Pods, publish_failure, require_same_settings

_WROTE = "a snapshot of a training"  # the "wrote" entry of the provenance, which `keep_last` looks for
_LOG = logging.getLogger(__name__)
Self = TypeVar("Self", bound="Snapshots")


class Snapshots:
    """Writes safetensors candidates `directory/step-00000120/` and so on while a model trains under any engine.

    Each rank writes its own spans to the same files, without gathering. A candidate appears when it is complete.
    Temporary files of a killed run match no glob of candidates. They are removed when a `Snapshots` of the same
    directory is created. If the run was killed after it wrote a candidate and before `keep_last` deleted older ones,
    these are then deleted, too. Use a separate directory for each training: a candidate of the same step is replaced,
    whichever `Snapshots` wrote it. A directory of a step that holds other files, such as an optimizer state, is neither
    replaced nor deleted, and `keep_last` deletes only candidates that a `Snapshots` wrote.

    The candidates of a model that trains an adapter of PEFT, and nothing else, are adapters without the base model.

    With `asynchronous`, a due step copies the data of this rank to host memory, in the type of the file, and returns. A
    thread writes the copy while training continues. Only one candidate is written at a time: the next due step waits
    for it. Errors are raised on every rank by the next due step, `wait` or `close`. Use `Snapshots` in a `with` block,
    or call `close` before the process group is destroyed.

    Args:
        directory: the directory of the candidates, on a file system that all ranks share.
        every_n_steps: the number of steps between two candidates.
        start_step: the first step that may be written; others follow every `every_n_steps`.
        keep_last: the number of candidates to keep; older ones are deleted. None keeps all.
        dtype: the type of floating point tensors in the files; None for their type in the model.
        files: small files for each candidate, such as those of a tokenizer: the content of each, or the path of a file
            to copy, by its path in the candidate. A model of transformers writes its configuration itself.
        max_shard_size: the maximum size of one file, such as "5GB".
        replica_group: with pods, the group that is passed to `attach`. The first pod writes.
        asynchronous: whether a thread writes while training continues.

    Raises:
        OutputError: `directory` is not a path.
        ConfigError: a number, type or size is not valid, or a name in `files` is outside the candidate or taken.
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
        minimums = [(every_n_steps, 1), (start_step, 0)] + ([] if keep_last is None else [(keep_last, 1)])
        if not all(_is_integer(number, low) for number, low in minimums):
            raise ConfigError(
                f"snapshots: every_n_steps={every_n_steps!r}, start_step={start_step!r}, keep_last={keep_last!r}; "
                "give integers of at least 1, 0 and 1."
            )
        check_dtype(dtype)
        check_files(files or {})
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
            remove_leftovers(self._directory, published=self._finish)

    def step(self, model: nn.Module, step: int) -> Path | None:
        """Write a candidate if `step` is due, and return its path, else None. Collective.

        With `asynchronous`, the path appears later.

        Args:
            model: the model, wrapped by its engine.
            step: the number of the step, from 1. Call this method after the update of the step.

        Raises:
            OutputError: the candidate, or with `asynchronous` the one before, could not be written. Raised on every
                rank; no temporary files remain.
            EngineError: no engine supports the model.
            ConfigError: `step` is not an integer of at least 0.
        """
        step = _checked(step)
        if step < self._start or step < 1 or (step - self._start) % self._every:
            return None
        return self.save(model, step)

    @in_normal_mode
    def save(self, model: nn.Module, step: int) -> Path:
        """Write a candidate whether or not `step` is due. Replaces a candidate of the same step. Collective.

        The arguments, the result and the errors are those of `step`.
        """
        step = _checked(step)
        if self._pending and self._pending[2] and self._pending[2].alive:
            _LOG.info("snapshots: step %d waits until the previous snapshot is written", step)
        self.wait()
        path = self._directory / f"step-{step:08d}"
        with publish_failure():
            engine = choose_engine(model, self._replica_group)
        pods, group = Pods(engine.shard_group, engine.replica_group), engine.shard_group
        settings = {"step": step, "asynchronous": self._asynchronous, "keep_last": self._keep}
        require_same_settings(pods, settings)  # The writer compares the tensors and the target.
        form = snapshot_form(engine, pods, self._dtype, self._files)
        with pods.agree():
            background = None
            if pods.number == 0:  # All pods hold the same weights.
                if self._asynchronous:
                    background = self._start_writing(engine, form, path, step)
                else:
                    self._write(engine, form, path, step)
        if self._asynchronous:
            self._pending = (pods, group, background)
        return path

    def wait(self) -> None:
        """Wait until the candidate that is being written, if any, is complete. Collective.

        Raises:
            OutputError: it could not be written. Raised on every rank; no temporary files remain.
        """
        if self._pending is None:
            return
        (pods, group, background), self._pending = self._pending, None
        with pods.agree():
            if background:
                background.join(group)

    def close(self) -> None:
        """Call `wait`. Collective."""
        self.wait()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the other ranks may not reach this point. The thread ends by itself.
        if kind is None:
            self.close()

    def _write(self, engine: Engine, form: SnapshotForm, path: Path, step: int) -> None:
        write_checkpoint(
            engine,
            path,
            form,
            max_shard_size=self._max_shard_size,
            overwrite=True,
            published=partial(self._delete_old, step),
            **snapshot_files(step, form.carried.files_for(self._dtype)),
        )

    def _start_writing(self, engine: Engine, form: SnapshotForm, path: Path, step: int) -> BackgroundWrite:
        group, specs = engine.shard_group, form.stored.specs
        extra = snapshot_files(step, form.carried.files_for(self._dtype))
        writer = open_writer(
            path,
            specs,
            group,
            max_shard_size=form.carried.shard_size(self._max_shard_size),
            overwrite=True,
            base=form.carried.base,
            metadata=extra["metadata"],
        )
        try:
            copies: list[tuple[Span, torch.Tensor]] = []
            with group.agree():
                dtypes = {spec.name: spec.dtype for spec in specs}
                for copy, live in _local_values(engine):
                    if copy.name not in form.stored.tensors:
                        continue
                    masks = may_be_mask(engine, copy.name)
                    for span, values in form.stored.spans(copy, live.detach()):
                        copies.append((span, _host_copy(values, dtypes[span.name])))
                        require_finite(span, values, copies[-1][1], allow_infinite=masks)
            counts = dict.fromkeys(dtypes, 0)
            for span, _ in copies:
                counts[span.name] += len(span)
            check_tiling(counts, specs, group)
        except BaseException:
            if group.rank == 0:
                writer.discard()
            raise
        return BackgroundWrite(writer, copies, group, extra["files"], partial(self._delete_old, step))

    def _delete_old(self, step: int) -> None:
        with output_errors(self._directory):
            _delete_older(self._directory, step, self._keep)

    def _finish(self, path: Path) -> None:
        """Delete what a process had to delete that was killed after it had published `path`."""
        if (step := _step_of(path)) is not None:
            _delete_older(self._directory, step, self._keep)


def snapshot_files(step: int, files: Files) -> dict[str, Any]:
    """Return the `files` and the `metadata` of a snapshot, which identify it as one."""
    return with_provenance(provenance(_WROTE, [], step=step), files)


def _local_values(engine: Engine) -> Iterator[tuple[Span, torch.Tensor]]:
    """Yield the spans that this rank writes with their values: its own, and on the first rank the buffers."""
    for span in engine.spans():
        yield span, engine.live(span)
    if engine.shard_group.rank == 0:
        for name, buffer in engine.buffers().items():
            yield whole_tensor(name, tuple(buffer.shape)), buffer.reshape(-1)


def _host_copy(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(values.shape, dtype=dtype).copy_(values.detach())


def _delete_older(directory: Path, step: int, keep: int | None) -> None:
    """Delete all but the newest candidates up to `step`. Later steps belong to another run and are not deleted."""
    if keep is not None:
        snapshots = [(number, path) for path in directory.iterdir() if (number := _step_of(path)) is not None]
        for _, path in sorted(pair for pair in snapshots if pair[0] <= step)[:-keep]:
            _delete(path)


def _step_of(path: Path) -> int | None:
    """Return the step of a candidate by its name; None for another name."""
    return int(path.name.removeprefix("step-")) if re.fullmatch(r"step-\d{8,}", path.name) else None


def _delete(path: Path) -> None:
    weights = own_weight_files(path, _WROTE)
    if not weights or (others := foreign_files(path, weights)):
        reason = f"it holds {others[0]}" if weights else "no Snapshots has written it"
        notice(f"{path}: keep_last does not delete it, because {reason}. Delete it yourself, or use another directory.")
        return
    # Rename it first, so that readers never find a partly deleted candidate.
    with TemporaryName(path) as temporary:
        path.rename(temporary.path)


def _checked(step: int) -> int:
    if not _is_integer(step, 0):
        raise ConfigError(f"snapshots: step={step!r}; give an integer of at least 0.")
    return int(step)


def _is_integer(value: object, minimum: int) -> bool:
    return type(value) is not bool and isinstance(value, Integral) and int(value) >= minimum
