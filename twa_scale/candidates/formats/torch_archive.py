"""Archives of torch.save. Only the pickle is loaded; tensors become byte ranges of the file."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from twa_scale.base.inputs import integers
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.pickle_stubs import PickleStub
from twa_scale.candidates.formats.pickles import MAX_PICKLE, SafeUnpickler
from twa_scale.candidates.formats.stored_tensors import Record, Stored
from twa_scale.candidates.formats.zip_directory import Member, crc_fields, data_offset, read_directory
from twa_scale.errors import CandidateError

_MAX_DIMS = 64  # the limit of torch
_FIX = "Copy it again, or leave this candidate out."


class Archive:
    """An archive of torch.save: a whole file, or a part of one.

    Raises:
        CandidateError: the file is not such an archive, or is truncated.
    """

    def __init__(self, file: File, start: int = 0, length: int | None = None) -> None:
        self._file = file
        self._start = start
        self._length = file.size if length is None else length
        self._label = file.path if length is None else f"{file.path} at byte {start}"
        self._records: dict[tuple[str, torch.dtype, int], Record] = {}
        self.unresolved: list[str] = []
        """Set by `content`: the classes and functions in the pickle that have no replacement."""
        try:
            self._members = read_directory(self._read, self._length)
        except ValueError as error:
            raise CandidateError(f"{self._label}: is not an archive of torch.save: {error}. {_FIX}") from error

    def content(self) -> Any:
        """Return the saved value, with tensors as `Stored` and objects of unknown classes as `PickleStub`.

        Raises:
            CandidateError: the archive is damaged or was not written by torch.save.
        """
        try:
            if "byteorder" in self._members and self._small("byteorder") != b"little":
                raise ValueError("it was written on a big-endian machine")
            unpickler = SafeUnpickler(self._small("data.pkl"), self._record, _tensor)
            content = unpickler.load()
        except ValueError as error:
            raise CandidateError(f"{self._label}: cannot be parsed: {error}. {_FIX}") from error
        self.unresolved = unpickler.unresolved
        return content

    def _read(self, offset: int, nbytes: int) -> bytes:
        if not 0 <= offset <= offset + nbytes <= self._length:
            raise ValueError("it refers to bytes that it does not have")
        buffer = bytearray(nbytes)
        self._file.read(memoryview(buffer), self._start + offset, "the archive")
        return bytes(buffer)

    def _small(self, name: str) -> bytes:
        """Return the bytes of a member that is not a tensor, and check its CRC."""
        if name not in self._members:
            raise ValueError(f"it has no member {name!r}; it may be a file of torch.export")
        member = self._members[name]
        if member.nbytes > MAX_PICKLE:
            raise ValueError(f"its member {name!r} has {member.nbytes} bytes, more than {MAX_PICKLE}")
        raw = self._read(data_offset(self._read, member, self._length), member.nbytes)
        if member.crc and zlib.crc32(raw) != member.crc:
            raise ValueError(f"its member {name!r} does not have the CRC of the archive's directory")
        return raw

    def _record(self, dtype: torch.dtype, key: str, numel: int) -> Record:
        name = f"data/{key}"
        crc = self._members[name].crc if name in self._members else 0
        record = Record(
            self._file, dtype, numel, lambda size: self._begin(name, size), crc, lambda: self._crc_fields(name)
        )
        return self._records.setdefault((name, dtype, numel), record)  # tensors that share a record share its CRC check

    def _begin(self, name: str, nbytes: int) -> int:
        """Return the offset of a record's data in the file."""
        member: Member | None = self._members.get(name)
        if member is None or member.nbytes != nbytes:
            raise CandidateError(
                f"{self._label}: has no record {name!r} of {nbytes} bytes, which its pickle needs; it is damaged. "
                f"{_FIX}"
            )
        try:
            return self._start + data_offset(self._read, member, self._length)
        except ValueError as error:
            raise CandidateError(f"{self._label}: {error}. {_FIX}") from error

    def _crc_fields(self, name: str) -> list[int]:
        """Return the offsets in the file of the places that hold the CRC-32 of a member."""
        return [self._start + offset for offset in crc_fields(self._read, self._members[name], self._length)]


def is_tensor(value: Any) -> bool:
    """Return whether a value in the content of an archive is a tensor of any kind."""
    return isinstance(value, Stored) or (isinstance(value, PickleStub) and "_rebuild_" in value.kind)


def dense_tensors(values: Mapping[Any, Any], path: object, fix: str) -> dict[str, Stored]:
    """Return the tensors among `values`.

    Args:
        values: the content of an archive, by name.
        path: the file, for error messages.
        fix: the sentence of the error message with the fix.

    Raises:
        CandidateError: a tensor is sparse, quantized or of another kind that cannot be read by slices.
    """
    for name, value in values.items():
        if is_tensor(value) and not isinstance(value, Stored):
            if value.class_name.startswith("torch.distributed."):
                fix = (
                    "It holds the shards of one rank, and nothing in it was run: save the model with "
                    "torch.distributed.checkpoint.save, or with Snapshots."
                )
            raise CandidateError(f"{path}: {name!r} is a {value.class_name}, which is not a dense tensor. {fix}")
    return {str(name): value for name, value in values.items() if isinstance(value, Stored)}


def _tensor(
    record: Record, first: int, shape: Any, stride: Any, dtype: torch.dtype | None = None, *, lazy: Any = ()
) -> Stored:
    if not isinstance(record, Record):
        raise ValueError("a tensor has no storage")
    if any(lazy):
        raise ValueError(f"a tensor is saved as a lazy view ({lazy[0]}); save it after clone()")
    if dtype is not None and dtype != record.dtype:
        numel = record.nbytes // dtype.itemsize
        record = replace(record, dtype=dtype, numel=numel)
    (begin,) = integers([first])
    stored = Stored(record, begin, integers(shape), integers(stride))
    if len(stored.shape) != len(stored.stride) or len(stored.shape) > _MAX_DIMS or min(stored.shape, default=0) < 0:
        raise ValueError(f"a tensor has the shape {stored.shape} and the strides {stored.stride}")
    return stored
