"""The directory of a zip archive of torch.save, whose members are uncompressed and consecutive."""

import struct
from collections.abc import Callable
from typing import NamedTuple

Read = Callable[[int, int], bytes]
"""A function of (offset in the archive, number of bytes) that returns these bytes."""

_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s4xHH4xIIIHHHHHII")
_LOCAL = struct.Struct("<4s2xHH4xIIIHH")
_EXTRA = struct.Struct("<HH")
_MAX_COMMENT = 0xFFFF
_MAX_DIRECTORY = 256 << 20  # bytes; a member takes about a hundred
_UNKNOWN = 0xFFFFFFFF  # marks a number that is stored in the extra field (Zip64)
_ENCRYPTED, _SIZES_FOLLOW = 0x1, 0x8
_CRC_IN_HEADER, _CRC_IN_ENTRY = 14, 16  # offsets


class Member(NamedTuple):
    """A file in the archive."""

    name: bytes
    flags: int
    crc: int
    """The CRC-32 of its bytes, or 0 if the writer did not compute it."""
    nbytes: int
    header: int
    """The offset of its local header."""
    entry: int
    """The offset of its entry in the directory."""


def read_directory(read: Read, size: int) -> dict[str, Member]:
    """Return the members of an archive of `size` bytes, by name without their common folder.

    Raises:
        ValueError: the bytes are not an archive, or it is damaged or was not written by torch.save.
    """
    begin, nbytes, count = _directory(read, size)
    if nbytes > _MAX_DIRECTORY:
        raise ValueError(f"its directory has {nbytes} bytes, more than {_MAX_DIRECTORY}")
    raw = read(begin, nbytes)
    members: dict[str, Member] = {}
    position = 0
    while position < nbytes:
        member, position = _member(raw, position, begin)
        name = member.name.decode().partition("/")[2]
        if name in members:
            raise ValueError(f"two members are called {name!r}")
        members[name] = member
    if len(members) != count:
        raise ValueError(f"its directory has {len(members)} members, not {count} as its end record says")
    _check_no_overlap(members, begin)
    return members


def _directory(read: Read, size: int) -> tuple[int, int, int]:
    """Return the offset and size of the directory, and the number of its members."""
    tail_size = min(size, _END.size + _MAX_COMMENT)
    tail = read(size - tail_size, tail_size)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > tail_size:
        raise ValueError("the archive has no end: it is truncated")
    *_, count, nbytes, begin, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != tail_size:
        raise ValueError("there are bytes after the end of the archive")
    end = size - tail_size + at
    if end >= _LOCATOR.size:
        magic, _, at_64, _ = _LOCATOR.unpack(read(end - _LOCATOR.size, _LOCATOR.size))
        if magic == b"PK\6\7":
            end -= _LOCATOR.size + _END_64.size
            if at_64 != end:
                raise ValueError("the end of its directory is not where it should be")
            magic, *_, count, nbytes, begin = _END_64.unpack(read(end, _END_64.size))
            if magic != b"PK\6\6":
                raise ValueError("the end of its directory is damaged")
    if begin + nbytes != end:
        raise ValueError("its directory is not between its members and its end")
    return begin, nbytes, count


def _member(raw: bytes, position: int, begin: int) -> tuple[Member, int]:
    """Return the member whose entry is at `position`, and the position of the next entry.

    Args:
        raw: the directory.
        position: the position of the entry in it.
        begin: the offset of the directory in the archive.
    """
    if position + _ENTRY.size > len(raw):
        raise ValueError("its directory is cut short")
    magic, flags, method, crc, packed, nbytes, *lengths, _, _, _, header = _ENTRY.unpack_from(raw, position)
    start = position + _ENTRY.size
    stop = start + sum(lengths)
    if magic != b"PK\1\2" or stop > len(raw):
        raise ValueError("its directory is damaged")
    name = raw[start : start + lengths[0]]
    extra = raw[start + lengths[0] : start + lengths[0] + lengths[1]]
    nbytes, packed, header = _zip64_values([nbytes, packed, header], extra)
    if b"/code/" in name or name.endswith(b"/constants.pkl"):
        raise ValueError("it is a program of torch.jit (TorchScript): save the state_dict() of the module in it")
    if method or packed != nbytes or flags & _ENCRYPTED:
        raise ValueError(f"its member {name!r} is compressed or encrypted, which members of torch.save never are")
    return Member(name, flags, crc, nbytes, header, begin + position), stop


def _zip64_values(numbers: list[int], extra: bytes) -> list[int]:
    """Return the numbers of an entry. Those that need 64 bits come from the extra field."""
    position = 0
    while _UNKNOWN in numbers and position + _EXTRA.size <= len(extra):
        kind, nbytes = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        if kind == 1:
            value = extra[position : position + nbytes]
            wide = iter([int.from_bytes(value[i : i + 8], "little") for i in range(0, len(value) - 7, 8)])
            return [next(wide, _UNKNOWN) if number == _UNKNOWN else number for number in numbers]
        position += nbytes
    return numbers


def _check_no_overlap(members: dict[str, Member], end: int) -> None:
    """Check that members do not overlap, so that a small file cannot claim many large tensors."""
    position = 0
    for member in sorted(members.values(), key=lambda member: member.header):
        if member.header < position:
            raise ValueError(f"its member {member.name!r} overlaps another")
        position = member.header + _LOCAL.size + len(member.name) + member.nbytes
    if position > end:
        raise ValueError("a member reaches into its directory")


def data_offset(read: Read, member: Member, end: int) -> int:
    """Return the offset of a member's first byte, from its local header.

    Args:
        read: reads bytes of the archive.
        member: the member, from the directory.
        end: the size of the archive in bytes.

    Raises:
        ValueError: the local header does not agree with the directory.
    """
    magic, flags, method, crc, packed, nbytes, *lengths = _LOCAL.unpack(read(member.header, _LOCAL.size))
    name = read(member.header + _LOCAL.size, len(member.name))
    sizes = (0, 0) if flags & _SIZES_FOLLOW else (member.crc, member.nbytes)
    if magic != b"PK\3\4" or (flags, method, lengths[0], name) != (member.flags, 0, len(member.name), member.name):
        raise ValueError(f"the header of member {member.name!r} is damaged")
    if nbytes not in (sizes[1], member.nbytes, _UNKNOWN) or packed not in (sizes[1], member.nbytes, _UNKNOWN):
        raise ValueError(f"the header of member {member.name!r} gives another size than the directory")
    if crc not in (sizes[0], member.crc):
        raise ValueError(f"the header of member {member.name!r} gives another checksum than the directory")
    begin: int = member.header + _LOCAL.size + sum(lengths)
    if begin + member.nbytes > end:
        raise ValueError(f"member {member.name!r} reaches beyond the archive")
    return begin


def crc_fields(read: Read, member: Member, end: int) -> list[int]:
    """Return the offsets of the 4 bytes of each place in the archive that holds the CRC-32 of a member.

    Args:
        read: reads bytes of the archive.
        member: the member, from the directory.
        end: the size of the archive in bytes.

    Raises:
        ValueError: the local header does not agree with the directory.
    """
    begin = data_offset(read, member, end)
    fields = [member.entry + _CRC_IN_ENTRY]
    if not member.flags & _SIZES_FOLLOW:
        return [member.header + _CRC_IN_HEADER, *fields]
    after = begin + member.nbytes
    if read(after, 4) == b"PK\7\10":
        fields.append(after + 4)
    return fields
