"""The writer of output directories: all ranks write their spans to the same files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from twa_scale.base.spans import Span
from twa_scale.errors import CandidateError, OutputError
from twa_scale.output.disk import OpenFile
from twa_scale.output.file_layout import TensorSpec, parse_size
from twa_scale.output.finite import require_finite
from twa_scale.output.formats import OutputFormat, PlaceFunction, SafetensorsFormat, WeightFiles
from twa_scale.output.formats.copying import Copy, copy_file, version_of
from twa_scale.output.overwriting import check_replaceable
from twa_scale.output.provenance import with_signatures
from twa_scale.output.publish import check_target, output_errors, publish, target_of, write_file
from twa_scale.output.shared import not_shared
from twa_scale.output.signatures import signature
from twa_scale.output.small_files import Files, is_below
from twa_scale.output.temporary import TemporaryName, remove_leftovers
from twa_scale.ranks import Group, require_same_settings

_PIECE_BYTES = 4 << 20  # bytes that are converted at a time; they fit in a cache
SAFETENSORS = SafetensorsFormat()


class Writer:
    """The access of one rank to the files of an output. Use `writing` or `open_writer` to create it.

    Args:
        directory: the temporary directory of the files.
        target: the output directory.
        specs: the tensors.
        files: the weight files, which exist in `directory`.
        temporary: on the first rank the owner of `directory`, else None.
        overwrite: whether the output may replace an earlier one.
        copied: the files that the format has copied unchanged, by their path in the directory.
    """

    def __init__(
        self,
        directory: Path,
        target: Path,
        specs: Sequence[TensorSpec],
        files: WeightFiles,
        temporary: TemporaryName | None,
        overwrite: bool,
        copied: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        """The directory of the files before they are published."""
        self._weights = files
        self._runs_of = _opened(files, directory, target)
        self._temporary = temporary
        self._overwrite = overwrite
        self._copied = copied
        self.target = target
        self._specs = {spec.name: spec for spec in specs}
        self._files: dict[str, OpenFile] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.shared = files.shared
        """Pairs of tensors that have one place in the files, so that their values must be equal."""
        self.elements: dict[str, int] = dict.fromkeys(self._specs, 0)
        """The number of elements that this rank has written, by tensor."""

    def write(self, span: Span, values: torch.Tensor, *, allow_infinite: bool = False) -> None:
        """Convert the elements of a span to the type of its tensor in the file, and write them.

        Args:
            span: a span of one of the writer's tensors.
            values: the elements, 1-D of len(span), of any type and on any device.
            allow_infinite: whether values may be infinite, as in attention masks.

        Raises:
            OutputError: a value is not finite or too large for the type, or the disk is full or fails.
        """
        spec = self._specs[span.name]
        assert values.shape == (len(span),) and 0 <= span.start <= span.stop <= spec.numel
        with output_errors(self.target):
            for offset, piece in span.pieces(max(1, _PIECE_BYTES // spec.dtype.itemsize)):
                part = values[offset : offset + len(piece)].detach()
                stored = self._converted(part, spec.dtype)
                require_finite(piece, part, stored, allow_infinite=allow_infinite)
                for start, stop in piece.runs():
                    run, stored = stored[: stop - start], stored[stop - start :]
                    for file, at, data in self._runs_of(span.name, start, run):
                        self._file(file).write(data, at)
        self.elements[span.name] += len(span)

    def sync(self) -> None:
        """Flush the data of this rank to the disk."""
        with output_errors(self.target):
            for file in self._files.values():
                file.sync()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def checksums(self, group: Group) -> Mapping[int, int]:
        """Return this rank's part of the checksums that the files hold, when all ranks have written."""
        with output_errors(self.target):
            return self._weights.checksums(group.rank, group.size)

    def finish(self, checksums: Sequence[Mapping[int, int]]) -> None:
        """Write the checksums of all ranks into the files. For one rank, after all ranks have written."""
        with output_errors(self.target):
            self._weights.finish(
                {number: crc for rank_checksums in checksums for number, crc in rank_checksums.items()}
            )

    def publish(self, files: Files, published: Callable[[], None] | None = None) -> None:
        """Add the small files, publish the directory and call `published`. For one rank, after all ranks have written.

        A process that is killed before `published` has returned leaves its lock to `remove_leftovers`, which then calls
        its own `published`.
        """
        if published:
            self.leave_to_next_start()
        extra = {**files, **self._weights.small}
        with output_errors(self.target):
            unsigned = [*self._weights.unsigned, *(name for name in self._copied if name not in extra)]
            if unsigned:
                extra = with_signatures(extra, {name: signature(self.directory / name) for name in unsigned})
            for name, content in extra.items():
                assert is_below(name) and name not in self._weights.names
                path = self.directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, content)
            if self.target.is_dir():  # Its content may have changed since `open_writer`.
                check_replaceable(self.target, self._overwrite)
            publish(self.directory, self.target)
        if published:
            published()

    def leave_to_next_start(self) -> None:
        """Leave the files to `remove_leftovers` when a signal ends the process. Another thread may then write them."""
        if self._temporary:
            self._temporary.leave_to_next_start()

    def discard(self) -> None:
        """Remove the unpublished files, or the earlier output that was replaced. For the first rank."""
        if self._temporary:
            self._temporary.discard()

    def _converted(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the values as a contiguous CPU tensor of type `dtype`: the same tensor, or a buffer that is reused."""
        if values.dtype != dtype or values.device.type != "cpu" or not values.is_contiguous():
            nbytes = len(values) * dtype.itemsize
            if self._buffer.numel() < nbytes:
                self._buffer = torch.empty(nbytes, dtype=torch.uint8)
            values = self._buffer[:nbytes].view(dtype).copy_(values)
        return values

    def _file(self, name: str) -> OpenFile:
        if name not in self._files:
            self._files[name] = OpenFile(self.directory / name)
        return self._files[name]


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
    published: Callable[[], None] | None = None,
    form: OutputFormat = SAFETENSORS,
) -> Iterator[Writer]:
    """Write tensors to the directory `out`, and publish it when the body has succeeded on every rank. Collective.

    The body writes the spans of this rank, which must tile every tensor over the group. It may contain collectives only
    if an error of one rank is raised on every rank (`Group.agree`). `files` are read on rank 0 after the body.

    Args:
        out: the directory, on a file system that all ranks share. Parent directories are created.
        specs: the tensors in the order of the files; equal on every rank.
        group: the ranks that write.
        max_shard_size: the maximum size of one file's tensors; a larger tensor gets its own file.
        files: further files for the directory.
        overwrite: whether to replace an earlier output that has the files and metadata of `with_provenance`. Other
            directories that are not empty are never replaced.
        base: the name of the weight files without suffix and number.
        metadata: the metadata of their headers.
        published: called on rank 0 after the directory is published. Its errors are raised on every rank.
        form: the format of the weight files.

    Raises:
        OutputError: the output could not be written. Raised on every rank; no temporary files remain, and `out` is
            unchanged.
    """
    writer = open_writer(
        out, specs, group, max_shard_size=max_shard_size, overwrite=overwrite, base=base, metadata=metadata, form=form
    )
    try:
        with group.agree():
            try:
                yield writer
                writer.sync()
            finally:
                writer.close()
        check_tiling(writer.elements, specs, group)
        with group.agree():
            checksums = writer.checksums(group)
        gathered = group.gather(checksums)
        with group.agree():
            if group.rank == 0:
                writer.finish(gathered)
                writer.publish(files or {}, published)
    finally:
        if group.rank == 0:
            writer.discard()


def open_writer(
    out: str | Path,
    specs: Sequence[TensorSpec],
    group: Group,
    *,
    max_shard_size: str | int,
    overwrite: bool,
    base: str = "model",
    metadata: Mapping[str, str] | None = None,
    form: OutputFormat = SAFETENSORS,
) -> Writer:
    """Create the files, of full size and without values, in a temporary directory next to `out`. Collective.

    The arguments are those of `writing`.

    Raises:
        ConfigError: the arguments differ between ranks.
        OutputError: the files could not be created. Raised on every rank; no temporary files remain.
    """
    with group.agree():
        own_target = target_of(out)
    settings = {
        "output": str(own_target),
        "max_shard_size": max_shard_size,
        "overwrite": overwrite,
        "format": form.name,
    }
    tensors = {f"tensor {spec.name!r}": (str(spec.dtype), spec.shape) for spec in specs}
    require_same_settings(group, {**settings, **tensors})
    target = group.broadcast(own_target)
    base, metadata = group.broadcast((base, metadata))  # The layout depends on them.
    temporary: TemporaryName | None = None
    copies: list[Copy] = []
    sizes: dict[str, int] = {}
    try:
        with group.agree(), output_errors(target):
            files = form.files(specs, parse_size(max_shard_size), base, metadata)
            if group.rank == 0:
                temporary = _prepare(target, files, form, overwrite)
                copies = [*files.copies, *_unchanged(form)]
        directory = group.broadcast(temporary.path if temporary else target)
        copies = group.broadcast(copies)
        _copy(copies, target, directory, group)
        with group.agree(), output_errors(target):
            if group.rank == 0:
                sizes = {name: (directory / name).stat().st_size for name in files.names}
        sizes = group.broadcast(sizes)
        with group.agree():
            _check_shared(target, directory, sizes)
            return Writer(directory, target, specs, files, temporary, overwrite, [name for name, _ in form.extra_files])
    except BaseException:
        if temporary:
            temporary.discard()
        raise


def _prepare(target: Path, files: WeightFiles, form: OutputFormat, overwrite: bool) -> TemporaryName:
    with output_errors(target):
        remove_leftovers(target.parent, target.name)
        check_target(target, files.nbytes + sum(path.stat().st_size for _, path in form.extra_files), overwrite)
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryName(target)
        try:
            temporary.path.mkdir()
            files.create(temporary.path)
        except BaseException:
            temporary.discard()
            raise
        return temporary


def _unchanged(form: OutputFormat) -> list[Copy]:
    return [Copy(name, path, version_of(path.stat())) for name, path in form.extra_files]


def _copy(copies: Sequence[Copy], target: Path, directory: Path, group: Group) -> None:
    """Copy files on all ranks that see them, one each at a time, so that no rank waits long for another. Collective."""
    if not copies:
        return
    ready = directory.is_dir() and all(copy.is_visible for copy in copies)
    rank, size = (group.rank, group.size) if all(group.gather(ready)) else (group.rank, 1)
    for first in range(0, len(copies), size):
        with group.agree(), output_errors(target):
            for copy in copies[first + rank : first + size][:1]:
                copy_file(copy, directory)


def _opened(files: WeightFiles, directory: Path, target: Path) -> PlaceFunction:
    try:
        return files.open(directory)
    except CandidateError as error:
        text = str(error).replace(str(directory), str(target))
        raise OutputError(f"{target}: its new files cannot be read back, and were removed. {text}") from error


def _check_shared(target: Path, directory: Path, sizes: Mapping[str, int]) -> None:
    if any(not (directory / name).exists() or (directory / name).stat().st_size != n for name, n in sizes.items()):
        raise not_shared(target)


def check_tiling(elements: Mapping[str, int], specs: Sequence[TensorSpec], group: Group) -> None:
    """Check that the ranks together write every element once, so that a wrong span list is never published. Collective.

    Args:
        elements: the number of elements that this rank writes, by tensor.
        specs: the tensors.
        group: the ranks that write.

    Raises:
        AssertionError: the numbers of elements do not add up.
    """
    total = sum(group.gather(sum(elements.values())))
    if total != sum(spec.numel for spec in specs):
        written = group.gather(elements)
        wrong = [spec.name for spec in specs if sum(counts[spec.name] for counts in written) != spec.numel]
        raise AssertionError(f"spans do not tile the tensors {wrong}: nothing was published")
