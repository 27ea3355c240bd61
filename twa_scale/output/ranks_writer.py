"""Ranks that write their spans of the same files at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from twa_scale.base.spans import Span
from twa_scale.errors import OutputError
from twa_scale.output.disk import OpenFile
from twa_scale.output.file_layout import Shard, TensorSpec, index_name, index_of, lay_out, parse_size
from twa_scale.output.finite import require_finite
from twa_scale.output.overwriting import check_replaceable
from twa_scale.output.publish import check_target, publish, reported, target_of, write_file
from twa_scale.output.small_files import Files, is_below
from twa_scale.output.temporary import HiddenName, sweep
from twa_scale.ranks import Group, require_same_settings

_PIECE_BYTES = 4 << 20  # of a file that are converted at a time: all that writing holds in memory, or rather in a cache


class Writer:
    """One rank's access to the files; made by `writing`, or `begin`. The first rank owns the hidden name of all."""

    def __init__(
        self,
        directory: Path,
        target: Path,
        specs: Sequence[TensorSpec],
        shards: Sequence[Shard],
        base: str,
        hidden: HiddenName | None,
        overwrite: bool,
    ) -> None:
        self.directory = directory
        """Where the files are until they are published."""
        self._base = base
        self._hidden = hidden
        self._overwrite = overwrite
        self.target = target
        self._shards = shards
        self._specs = {spec.name: spec for spec in specs}
        self._shard_of = {name: shard for shard in shards for name in shard.offsets}
        self._files: dict[str, OpenFile] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.elements: dict[str, int] = dict.fromkeys(self._specs, 0)
        """Number of elements written by this rank, by tensor."""

    def write(self, span: Span, values: torch.Tensor, *, masks: bool = False) -> None:
        """Write the elements of a span, converted to the type of its tensor once.

        Args:
            span: of a tensor that the writer was made for.
            values: 1-D, of any type and on any device.
            masks: whether they may be infinite, as in attention masks.

        Raises:
            OutputError: a number that is not finite, or too large for the type; or the disk is full, or fails.
        """
        spec, shard = self._specs[span.name], self._shard_of[span.name]
        assert values.shape == (len(span),) and 0 <= span.start <= span.stop <= spec.numel
        size = spec.dtype.itemsize
        with reported(self.target):
            for offset, piece in span.pieces(max(1, _PIECE_BYTES // size)):
                part = values[offset : offset + len(piece)].detach()
                stored = self._converted(part, spec.dtype)
                require_finite(piece, part, stored, masks=masks)
                left: memoryview = stored.view(torch.uint8).numpy().data
                for start, stop in piece.runs():
                    run, left = left[: (stop - start) * size], left[(stop - start) * size :]
                    self._file(shard).write(run, shard.offsets[span.name] + start * size)
        self.elements[span.name] += len(span)

    def sync(self) -> None:
        """Make what this rank wrote survive a power cut."""
        with reported(self.target):
            for file in self._files.values():
                file.sync()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def publish(self, files: Files) -> None:
        """Add the small files and let the directory appear under its name; for one rank, when all have written."""
        extra = dict(files)
        if len(self._shards) > 1:
            extra[index_name(self._base)] = index_of(self._shards, list(self._specs.values()))
        with reported(self.target):
            for name, content in extra.items():
                assert is_below(name) and name not in {shard.file for shard in self._shards}
                path = self.directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, content)
            if self.target.is_dir():  # something may have been put there while this was written
                check_replaceable(self.target, self._overwrite)
            publish(self.directory, self.target)

    def hand_over(self) -> None:
        """Let a thread finish the files: signals have the meaning in this one that they had before."""
        if self._hidden:
            self._hidden.hand_over()

    def discard(self) -> None:
        """Remove what was not published, or the older output that was replaced; for the first rank."""
        if self._hidden:
            self._hidden.discard()

    def _converted(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a piece in the type of the file: where it lies, or in a buffer that the next piece takes again."""
        if values.dtype != dtype or values.device.type != "cpu" or not values.is_contiguous():
            nbytes = len(values) * dtype.itemsize
            if self._buffer.numel() < nbytes:
                self._buffer = torch.empty(nbytes, dtype=torch.uint8)
            values = self._buffer[:nbytes].view(dtype).copy_(values)
        return values

    def _file(self, shard: Shard) -> OpenFile:
        if shard.file not in self._files:
            self._files[shard.file] = OpenFile(self.directory / shard.file)
        return self._files[shard.file]


@contextmanager
def writing(
    out: str | Path,
    specs: Sequence[TensorSpec],
    group: Group,
    *,
    max_shard_size: str | int = "5GB",
    files: Files | None = None,
    overwrite: bool = False,
    base: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Writer]:
    """Write `specs` to the directory `out`; it appears when the body has succeeded on every rank. Collective.

    The body writes this rank's spans; over the group they must tile every tensor. It may hold collectives
    only where an error of one rank reaches all (`Group.agree`). `files` are taken from rank 0 when the body
    has ended.

    Args:
        out: the directory; its parents are made. The same file system on every rank.
        specs: the same on every rank; their order is that of the files.
        group: the ranks that write.
        max_shard_size: most bytes of tensor data in one file, unless a single tensor is larger.
        files: further files for the directory.
        overwrite: replace an earlier output that was written with `marked` files and metadata, and nothing else;
            without it a directory that is not empty is refused.
        base: what the files of weights are called, without suffix and number.
        metadata: what their headers say beside the tensors.

    Raises:
        OutputError: on every rank; nothing is left behind, and what stood at `out` is as it was.
    """
    writer = begin(out, specs, group, max_shard_size=max_shard_size, overwrite=overwrite, base=base, metadata=metadata)
    try:
        with group.agree():
            try:
                yield writer
                writer.sync()
            finally:
                writer.close()
        check_tiling(writer.elements, specs, group)
        with group.agree():
            if group.rank == 0:
                writer.publish(files or {})
    finally:
        if group.rank == 0:
            writer.discard()


def begin(
    out: str | Path,
    specs: Sequence[TensorSpec],
    group: Group,
    *,
    max_shard_size: str | int,
    overwrite: bool,
    base: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> Writer:
    """Make the files, of full size and without values, in a hidden directory beside `out`. Collective.

    Raises:
        ConfigError: ranks that were told to write something else, or to another place.
        OutputError: on every rank; nothing is left behind.
    """
    with group.agree():
        own = target_of(out)
    told = {"output": str(own), "max_shard_size": max_shard_size, "overwrite": overwrite}
    tensors = {f"tensor {spec.name!r}": (str(spec.dtype), spec.shape) for spec in specs}
    require_same_settings(group, {**told, **tensors})
    target = group.broadcast(own)
    base, metadata = group.broadcast((base, metadata))  # decide where in the files each tensor lies
    hidden: HiddenName | None = None
    try:
        with group.agree():
            shards = lay_out(specs, parse_size(max_shard_size), base, metadata)
            if group.rank == 0:
                hidden = _prepare(target, shards, overwrite)
        temporary = group.broadcast(hidden.path if hidden else target)
        with group.agree():
            _check_shared(target, temporary, shards[0])
            return Writer(temporary, target, specs, shards, base, hidden, overwrite)
    except BaseException:
        if hidden:
            hidden.discard()
        raise


def _prepare(target: Path, shards: Sequence[Shard], overwrite: bool) -> HiddenName:
    with reported(target):
        sweep(target.parent, target.name)
        check_target(target, sum(shard.nbytes for shard in shards), overwrite)
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
        hidden = HiddenName(target)
        try:
            hidden.path.mkdir()
            for shard in shards:
                with (hidden.path / shard.file).open("wb") as file:
                    file.write(shard.header)
                    file.truncate(shard.nbytes)
        except BaseException:
            hidden.discard()
            raise
        return hidden


def _check_shared(target: Path, temporary: Path, shard: Shard) -> None:
    path = temporary / shard.file
    if not path.exists() or path.stat().st_size != shard.nbytes:
        raise OutputError(
            f"{target}: this rank does not see the file that rank 0 made there: it is not on a shared file "
            "system. Choose a directory that every node mounts."
        )


def check_tiling(elements: Mapping[str, int], specs: Sequence[TensorSpec], group: Group) -> None:
    """A hole would be a wrong span list: our bug, but one that must never reach a published file. Collective.

    Args:
        elements: how many of each tensor this rank writes.
        specs: the tensors.
        group: the ranks that write.
    """
    total = sum(group.gather(sum(elements.values())))
    if total != sum(spec.numel for spec in specs):
        written = group.gather(elements)
        wrong = [spec.name for spec in specs if sum(counts[spec.name] for counts in written) != spec.numel]
        raise AssertionError(f"spans do not tile the tensors {wrong}: nothing was published")
