"""The directory of a zip archive as torch.save writes it: members that lie uncompressed, one after another."""

import struct
from collections.abc import Callable
from typing import NamedTuple

Read = Callable[[int, int], bytes]
"""Given an offset in the archive and a number of bytes, returns them."""

_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s4xHH4xIIIHHHHHII")
_LOCAL = struct.Struct("<4s2xHH4xIIIHH")
_EXTRA = struct.Struct("<HH")
_MAX_COMMENT = 0xFFFF
_MAX_DIRECTORY = 256 << 20  # bytes; a member takes about a hundred
_UNKNOWN = 0xFFFFFFFF  # a number that stands in the extra field
_ENCRYPTED, _SIZES_FOLLOW = 0x1, 0x8


class Member(NamedTuple):
    """A file in the archive."""

    name: bytes
    flags: int
    crc: int
    """CRC-32 of its bytes; 0 where the writer did not compute it."""
    nbytes: int
    header: int
    """Offset of its local header."""


def read_directory(read: Read, size: int) -> dict[str, Member]:
    """Return the members of an archive of `size` bytes by name, without the folder that they all are in.

    Raises:
        ValueError: no archive, a damaged one, or one that torch.save does not write.
    """
    begin, nbytes, count = _directory(read, size)
    if nbytes > _MAX_DIRECTORY:
        raise ValueError(f"its directory has {nbytes} bytes, more than {_MAX_DIRECTORY}")
    raw = read(begin, nbytes)
    members: dict[str, Member] = {}
    position = 0
    while position < nbytes:
        member, position = _member(raw, position)
        name = member.name.decode().partition("/")[2]
        if name in members:
            raise ValueError(f"two members are called {name!r}")
        members[name] = member
    if len(members) != count:
        raise ValueError(f"its directory has {len(members)} members where {count} are promised")
    _check_apart(members, begin)
    return members


def _directory(read: Read, size: int) -> tuple[int, int, int]:
    """Return offset and bytes of the directory, and the number of its members."""
    tail_size = min(size, _END.size + _MAX_COMMENT)
    tail = read(size - tail_size, tail_size)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > tail_size:
        raise ValueError("the archive has no end: it is truncated")
    *_, count, nbytes, begin, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != tail_size:
        raise ValueError("something follows the end of the archive")
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
        raise ValueError("its directory does not lie between its members and its end")
    return begin, nbytes, count


def _member(raw: bytes, position: int) -> tuple[Member, int]:
    """Return the member that is described at `position`, and where the next one is."""
    if position + _ENTRY.size > len(raw):
        raise ValueError("its directory is cut short")
    magic, flags, method, crc, packed, nbytes, *lengths, _, _, _, header = _ENTRY.unpack_from(raw, position)
    start = position + _ENTRY.size
    stop = start + sum(lengths)
    if magic != b"PK\1\2" or stop > len(raw):
        raise ValueError("its directory is damaged")
    name = raw[start : start + lengths[0]]
    extra = raw[start + lengths[0] : start + lengths[0] + lengths[1]]
    nbytes, packed, header = _wide([nbytes, packed, header], extra)
    if b"/code/" in name or name.endswith(b"/constants.pkl"):
        raise ValueError("it is a program of torch.jit (TorchScript): save the state_dict() of the module in it")
    if method or packed != nbytes or flags & _ENCRYPTED:
        raise ValueError(f"its member {name!r} is compressed or encrypted, which torch.save never does")
    return Member(name, flags, crc, nbytes, header), stop


def _wide(numbers: list[int], extra: bytes) -> list[int]:
    """Return numbers, of which those that need 64 bits stand in the extra field."""
    position = 0
    while _UNKNOWN in numbers and position + _EXTRA.size <= len(extra):
        kind, nbytes = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        if kind == 1:
            held = extra[position : position + nbytes]
            wide = iter([int.from_bytes(held[i : i + 8], "little") for i in range(0, len(held) - 7, 8)])
            return [next(wide, _UNKNOWN) if number == _UNKNOWN else number for number in numbers]
        position += nbytes
    return numbers


def _check_apart(members: dict[str, Member], end: int) -> None:
    """Refuse members that overlap: a few bytes must not stand for many tensors that differ."""
    position = 0
    for member in sorted(members.values(), key=lambda member: member.header):
        if member.header < position:
            raise ValueError(f"its member {member.name!r} overlaps another")
        position = member.header + _LOCAL.size + len(member.name) + member.nbytes
    if position > end:
        raise ValueError("a member reaches into its directory")


def data_offset(read: Read, member: Member, end: int) -> int:
    """Return the offset of a member's first byte, by its local header.

    Args:
        read: see `Read`.
        member: of the directory.
        end: bytes of the archive.

    Raises:
        ValueError: a header that does not say what the directory says.
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
