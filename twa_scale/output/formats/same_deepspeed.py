"""Copies of the files of the last candidate, a checkpoint of DeepSpeed, with replaced weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from twa_scale.candidates.formats.deepspeed import files_in_deepspeed, storages_in_deepspeed
from twa_scale.candidates.formats.origin import Origin
from twa_scale.candidates.formats.placement import Placeable
from twa_scale.errors import OutputError
from twa_scale.output.file_layout import TensorSpec
from twa_scale.output.formats.copying import Copy, version_of
from twa_scale.output.formats.format import OutputFormat, WeightFiles
from twa_scale.output.formats.placed_files import PlacedFiles


class SameDeepSpeedFormat(OutputFormat):
    """A copy of a checkpoint of DeepSpeed with other values of the weights.

    The weights are replaced in the partitions of the optimizer, from which DeepSpeed restores them, and in the files of
    the model. The moments of the optimizer, counters and entries that a script has added are unchanged.

    Args:
        origin: the format of the last candidate, and the versions of its files.
        root: its directory.
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
            OutputError: a tensor is complex.
        """
        return _DeepSpeedFiles(specs, self._origin, self._root)


class _DeepSpeedFiles(PlacedFiles):
    def __init__(self, specs: Sequence[TensorSpec], origin: Origin, root: Path) -> None:
        super().__init__(specs, {})
        self._versions = origin.versions
        self._root = root
        self._sources = files_in_deepspeed(root)
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
        """List the files to copy."""
        self._copies = [
            Copy(name, source, self._versions.get(source, version_of(source.stat())))
            for source, name in zip(self._sources, self.names, strict=True)
        ]

    def places(self, directory: Path) -> Mapping[str, Sequence[Placeable]]:
        """Return the tensors that hold each weight."""
        storages = storages_in_deepspeed(directory)
        if absent := next((spec.name for spec in self._specs if spec.name not in storages), None):
            raise OutputError(
                f"{self._root}: tensor {absent!r} is not in the files of the last candidate under this name, and "
                "--format same (format='same') keeps them. Choose hf, dcp or pt."
            )
        return storages
