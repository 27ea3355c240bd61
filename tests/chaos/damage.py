"""Damage real files at random, reproducibly from a seed."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

_PAGE = 4096
_HEAD = 2048  # bytes at each end of a file, where headers and directories are; half of the damage is there


def _position(raw: bytearray, chance: random.Random) -> int:
    resident = chance.choice((0, max(0, len(raw) - _HEAD), None, None))
    return chance.randrange(len(raw)) if resident is None else min(len(raw) - 1, resident + chance.randrange(_HEAD))


def flip_bits(raw: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        raw[_position(raw, chance)] ^= 1 << chance.randrange(8)


def overwrite_bytes(raw: bytearray, chance: random.Random) -> None:
    start = _position(raw, chance)
    stop = min(len(raw), start + chance.choice((1, 2, 4, 8, 64)))
    raw[start:stop] = chance.choice((b"\0", b"\xff", chance.randbytes(1))) * (stop - start)


def zero_page(raw: bytearray, chance: random.Random) -> None:
    start = _position(raw, chance) // _PAGE * _PAGE
    stop = min(len(raw), start + _PAGE)
    raw[start:stop] = bytes(stop - start)


def swap_ranges(raw: bytearray, chance: random.Random) -> None:
    size = chance.choice((1, 4, 32, 512))
    a, b = _position(raw, chance), _position(raw, chance)
    first, second = raw[a : a + size], raw[b : b + size]
    raw[a : a + len(first)], raw[b : b + len(first)] = second[: len(first)], first[: len(second)]


def truncate(raw: bytearray, chance: random.Random) -> None:
    del raw[chance.choice((0, 1, 8, len(raw) // 2, len(raw) - 1, _position(raw, chance))) :]


def extend(raw: bytearray, chance: random.Random) -> None:
    size = chance.choice((1, 8, _PAGE))
    raw += chance.choice((bytes(size), chance.randbytes(size), raw[:size]))


def insert(raw: bytearray, chance: random.Random) -> None:
    at = _position(raw, chance)
    raw[at:at] = chance.randbytes(chance.choice((1, 8, 100)))


def remove(raw: bytearray, chance: random.Random) -> None:
    at = _position(raw, chance)
    del raw[at : at + chance.choice((1, 8, 100))]


def edit_text(raw: bytearray, chance: random.Random) -> None:
    """Replace one character of the readable parts of a file."""
    positions = [i for i in range(min(len(raw), 4 * _HEAD)) if chr(raw[i]).isalnum() or raw[i] in b'{}[]":,']
    if positions:
        raw[chance.choice(positions)] = chance.choice(b'0123456789abcXYZ{}[]":,-.')


IN_FILE: list[Callable[[bytearray, random.Random], None]] = [
    flip_bits,
    overwrite_bytes,
    zero_page,
    swap_ranges,
    truncate,
    extend,
    insert,
    remove,
    edit_text,
]


def drop(file: Path, _: Path, __: random.Random) -> None:
    file.unlink()


def empty(file: Path, _: Path, __: random.Random) -> None:
    file.write_bytes(b"")


def exchange(file: Path, other: Path, _: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def copy_over(file: Path, other: Path, _: random.Random) -> None:
    file.write_bytes(other.read_bytes())


def duplicate(file: Path, _: Path, chance: random.Random) -> None:
    shutil.copy(file, file.with_name(chance.choice(("copy-", "z-", "a")) + file.name))


def rename(file: Path, _: Path, chance: random.Random) -> None:
    name = list(file.name)
    name[chance.randrange(len(name))] = chance.choice("0123456789abc")
    file.rename(file.with_name("".join(name)))


def make_pipe(file: Path, _: Path, __: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def make_folder(file: Path, _: Path, __: random.Random) -> None:
    file.unlink()
    file.mkdir()


def link_to_itself(file: Path, _: Path, __: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.name)


OF_FILES: list[Callable[[Path, Path, random.Random], None]] = [
    drop,
    empty,
    exchange,
    copy_over,
    duplicate,
    rename,
    make_pipe,
    make_folder,
    link_to_itself,
]


def damage(path: Path, seed: int) -> str:
    """Damage a file, or one file of a directory, and return a description of the damage."""
    chance = random.Random(seed)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    file = chance.choice(files)
    if path.is_dir() and chance.random() < 0.2:
        of_files = chance.choice(OF_FILES)
        of_files(file, chance.choice(files), chance)
        return f"{of_files.__name__} {file.name}"
    raw = bytearray(file.read_bytes())
    if not raw:
        return "nothing: an empty file"
    in_file = chance.choice(IN_FILE)
    in_file(raw, chance)
    file.write_bytes(raw)
    return f"{in_file.__name__} {file.name}"
