"""The interface between the writer of an output and the format of its weight files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from twa_scale.output.file_layout import TensorSpec
from twa_scale.output.formats.copying import Copy


class Run(NamedTuple):
    """Consecutive bytes in a file."""

    file: str
    """The path of the file in the output directory."""
    offset: int
    data: memoryview


PlaceFunction = Callable[[str, int, torch.Tensor], Iterator[Run]]
"""A function of the name of a tensor, its first element in the row-major flattening, and 1-D contiguous CPU elements of
its type. It yields the positions of their bytes."""


class WeightFiles(ABC):
    """The weight files of one output. They are created by one rank, and then written by all ranks at any offset.

    Writing values and publishing the directory are not part of it, because they are the same for every format.
    """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The size of the files in bytes."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """The paths of the files in the output directory. Small files must not have these names."""

    @property
    def unsigned(self) -> Sequence[str]:
        """The files without a mark that this program wrote them. twa_scale.json has their signatures."""
        return self.names

    @property
    def shared(self) -> Sequence[tuple[str, str]]:
        """Pairs of tensors that have one place in the files, so that their values must be equal. Known after `open`."""
        return []

    @property
    def small(self) -> Mapping[str, bytes]:
        """Small files that belong to the format, such as an index, by name."""
        return {}

    @property
    def copies(self) -> Sequence[Copy]:
        """Weight files that are first copied from a candidate. Known after `create` on the rank that called it."""
        return []

    @abstractmethod
    def create(self, directory: Path) -> None:
        """Create the files in full size, with everything but the values. Called on one rank.

        Files in `copies` are created after this call, by all ranks.

        Raises:
            OSError: the disk is full or fails.
            OutputError: the format cannot hold a tensor.
        """

    @abstractmethod
    def open(self, directory: Path) -> PlaceFunction:
        """Return the function that gives the positions of elements. Called on every rank, before any rank writes."""

    @abstractmethod
    def checksums(self, rank: int, size: int) -> Mapping[int, int]:
        """Return this rank's part of the checksums that the files hold, when all ranks have flushed their values.

        Args:
            rank: the index of this rank among the ranks that write.
            size: the number of ranks that write.
        """

    @abstractmethod
    def finish(self, checksums: Mapping[int, int]) -> None:
        """Write the checksums of all ranks. Called on one rank, because several machines must not write to one page."""


class OutputFormat(ABC):
    """A format, with the settings of its candidates that an output keeps."""

    name: str
    """The name of the format in messages and settings."""
    keeps_dtypes = False
    """Whether each tensor has the dtype of the last candidate, not the widest one of all."""
    extra_files: Sequence[tuple[str, Path]] = ()
    """Files to copy unchanged, by their path in the output directory."""

    @abstractmethod
    def files(
        self, specs: Sequence[TensorSpec], max_shard_size: int, base: str, metadata: Mapping[str, str] | None
    ) -> WeightFiles:
        """Return the weight files of an output.

        Args:
            specs: the tensors, in order.
            max_shard_size: the maximum size of the tensors of one file in bytes, for formats that can have several.
            base: the name of weight files without suffix and number.
            metadata: the metadata of headers, for formats that have them.

        Raises:
            OutputError: the format cannot hold a tensor.
        """
