"""The files of the last candidate, in which only the values of its weights are replaced."""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from twa_scale.base.names import quoted
from twa_scale.base.notices import notice
from twa_scale.candidates.formats.dcp import DcpFolder, files_in_dcp
from twa_scale.candidates.formats.megatron import copies_of_weights
from twa_scale.candidates.formats.origin import Keys, Origin
from twa_scale.candidates.formats.placement import Placeable
from twa_scale.candidates.formats.torch_file import tensors_in
from twa_scale.errors import OutputError
from twa_scale.output.file_layout import TensorSpec
from twa_scale.output.formats.copying import Copy, version_of
from twa_scale.output.formats.format import OutputFormat, WeightFiles
from twa_scale.output.formats.placed_files import PlacedFiles

Extent = tuple[int, int]
"""The range of bytes of a tensor in a file: the first byte, and the byte after the last."""


class SameFormat(OutputFormat):
    """A copy of files of torch with other values of the weights.

    Everything else in these files keeps its bits and is not unpickled: the state of the optimizer, counters, other sets
    of weights.

    Args:
        origin: the format of the last candidate, and the positions of the weights in its files.
        root: the directory that becomes the output directory.
        extra_files: the other files to copy.
    """

    name = "same"
    keeps_dtypes = True

    def __init__(self, origin: Origin, root: Path, extra_files: Sequence[tuple[str, Path]]) -> None:
        self._origin = origin
        self._root = root
        self.extra_files = extra_files

    def files(
        self, specs: Sequence[TensorSpec], max_shard_size: int, base: str, metadata: Mapping[str, str] | None
    ) -> WeightFiles:
        """Return the same files as those of the last candidate.

        Raises:
            OutputError: the files lack a tensor.
        """
        stored = {name for names in self._origin.keys.values() for name in names}
        if absent := next((spec.name for spec in specs if spec.name not in stored), None):
            raise OutputError(
                f"{self._root}: tensor {absent!r} is not in the files of the last candidate under this name, and "
                "--format same (format='same') keeps them. Choose hf, dcp or pt."
            )
        return _SameFiles(specs, self._origin, self._root)


class _SameFiles(PlacedFiles):
    def __init__(self, specs: Sequence[TensorSpec], origin: Origin, root: Path) -> None:
        keys = {path.relative_to(root): stored_keys for path, stored_keys in origin.keys.items()}
        names = {spec.name for spec in specs}
        super().__init__(
            specs,
            {
                path: {name: stored_keys[name] for name in stored_keys if name in names}
                for path, stored_keys in keys.items()
            },
        )
        self._root = root
        self._versions = origin.versions
        self._sources = [file for path in origin.keys for file in (files_in_dcp(path) if path.is_dir() else [path])]
        self._copies: list[Copy] = []

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self._sources)

    @property
    def names(self) -> Sequence[str]:
        return [str(path.relative_to(self._root)) for path in self._sources]

    @property
    def copies(self) -> Sequence[Copy]:
        return self._copies

    def create(self, directory: Path) -> None:
        """Determine the ranges of bytes to copy."""
        versions = {path: self._versions.get(path, version_of(path.stat())) for path in self._sources}
        self._storages_of_files = self.places(self._root)
        weights = [stored for spec in self._specs for stored in self._storages(spec) if stored.numel]
        written: dict[Path, list[Extent]] = {}
        replaced: dict[Path, list[Extent]] = {}
        views: dict[Path, set[tuple[Extent, object]]] = {}
        for stored in weights:
            path, extent = Path(stored.record.file.path), stored.extent()
            written.setdefault(path, []).append(extent)
            views.setdefault(path, set()).add((extent, None if stored.row_major() else stored.memory_key))
            if stored.row_major():  # Other tensors may have gaps between their elements, which are copied.
                replaced.setdefault(path, []).append(extent)
            stored.record.file.close()
        for path, path_views in views.items():
            _require_apart(path, path_views)
        self._copies = [
            Copy(name, source, versions[source], replaced.get(source, ()))
            for source, name in zip(self._sources, self.names, strict=True)
        ]
        for path, keys in self._keys.items():
            if (source := self._root / path) in written and source.is_file():
                _tell_what_shares_storage(source, {*keys.values()}, written[source])

    def places(self, directory: Path) -> Mapping[str, Sequence[Placeable]]:
        """Return the tensors that hold each weight, and its copies by an optimizer in a folder of DCP."""
        tensors_by_name = {name: [*tensors] for name, tensors in super().places(directory).items()}
        for path, stored_keys in self._keys.items():
            if (directory / path).is_dir():
                folder = DcpFolder(directory / path)
                copies = copies_of_weights(stored_keys.values(), folder.shapes)
                tensors = folder.tensors({".".join(copy): copy for others in copies.values() for copy in others})
                for name, keys in stored_keys.items():
                    tensors_by_name[name] += [tensors[".".join(copy)] for copy in copies[keys]]
        return tensors_by_name


def _require_apart(path: Path, views: Collection[tuple[Extent, object]]) -> None:
    """Check that weights do not overlap in part; one tensor may be stored under several names.

    Args:
        path: the file.
        views: the bytes of each weight, and a key of its strides, None for row-major ones.

    Raises:
        OutputError: two weights overlap in part.
    """
    for (before, _), (after, _) in pairwise(sorted(views, key=lambda view: view[0])):
        if after[0] < before[1]:
            raise OutputError(
                f"{path}: holds weights that overlap in part, or in other strides, at byte {after[0]}, which --format "
                "same (format='same') cannot write one by one. Choose hf, dcp or pt."
            )


def _tell_what_shares_storage(path: Path, weights: Collection[Keys], written: Sequence[Extent]) -> None:
    """Report tensors that are not weights but share their storage in the file, such as an EMA without a copy.

    Args:
        path: a file of torch.save.
        weights: the paths of keys of the weights.
        written: the bytes of the weights.
    """
    extents = sorted(written)
    starts = [begin for begin, _ in extents]
    furthest = list(accumulate((end for _, end in extents), max))
    others = set()
    for keys, tensor in tensors_in(path).items():
        if keys not in weights and tensor.numel:
            begin, end = tensor.extent()
            before = bisect_left(starts, end) - 1
            if before >= 0 and furthest[before] > begin:
                others.add(".".join(keys))
    if others:
        notice(
            f"{path}: {quoted(sorted(others))} are the same numbers in the file as weights, and become the average too."
        )
