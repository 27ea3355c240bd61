"""The file next to a state with the corrections of rows and their moments: its names, its digest and its reader.

It is a safetensors file of float32 tensors `KIND/NAME` of shape (rows, k). Kinds are `last` (the corrections at the
step of the state), `best` (those of the best average of a run) and `moment.KEY` (of the optimizer).
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType

import torch

from twa_scale.base.inputs import open_regular
from twa_scale.candidates.formats.file_handles import File
from twa_scale.candidates.formats.safetensors import read_header
from twa_scale.errors import CandidateError, StateError
from twa_scale.output.disk import pieces_of
from twa_scale.ranks import Ranks

BASE = "rows"
DIRECTORY = r"state\.rows-[0-9a-f]{8}"
"""The pattern of the name of its directory. Each save creates a new one."""
LAST, BEST, MOMENT = "last", "best", "moment."
FIX = "Restore a copy of it, or start a new run in another output or with resume=false."
_CHUNK_BYTES = 32 << 20  # the bytes that one rank reads at a time for the digest


def new_directory() -> str:
    """Return a new name for the directory of a file of rows."""
    return f"state.rows-{secrets.token_hex(4)}"


def rows_path(directory: Path) -> Path:
    """Return the path of the file in its directory."""
    return directory / f"{BASE}.safetensors"


def remove_rows(directory: Path, used: Callable[[], Collection[str] | None]) -> None:
    """Remove the directories of files of rows that no state names. On one rank.

    Args:
        directory: the directory of the states.
        used: returns the names of the directories to keep, or None to keep all. It is called only if there are any.
    """
    directories = [path for path in directory.glob("state.rows-*") if re.fullmatch(DIRECTORY, path.name)]
    if not directories or (names := used()) is None:
        return
    for path in directories:
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def digest(directory: Path, group: Ranks) -> tuple[int, str]:
    """Return the size of the file and the SHA-256 of the SHA-256 of its chunks of 32 MiB. Collective.

    Each rank reads its part of the chunks, in pieces of 8 MiB. The result is the same on every rank.

    Raises:
        StateError: the file cannot be read, or has another size on another rank; on every rank.
    """
    path, nbytes = rows_path(directory), 0
    local: dict[int, bytes] = {}
    with group.agree(), _readable(path), os.fdopen(open_regular(path, StateError), "rb", buffering=0) as file:
        nbytes = os.fstat(file.fileno()).st_size
        for begin in range(group.rank * _CHUNK_BYTES, nbytes, group.size * _CHUNK_BYTES):
            local[begin] = _digest_of(file.fileno(), begin, min(begin + _CHUNK_BYTES, nbytes))
    sizes, parts = zip(*group.gather((nbytes, local)), strict=True)
    with group.agree():
        if other := [size for size in sizes if size != nbytes]:
            raise StateError(
                f"{path}: is damaged, or another file on some ranks: it has {nbytes} bytes on {group.name}, and "
                f"{other[0]} on another. All ranks have to see the same file. {FIX}"
            )
    chunks = {begin: checksum for of_rank in parts for begin, checksum in of_rank.items()}
    return nbytes, sha256(b"".join(chunks[begin] for begin in sorted(chunks))).hexdigest()


class RowsFile:
    """Reads a file of rows. Use it in a `with` block, which closes it.

    Args:
        directory: the directory of the file.

    Raises:
        StateError: the file is missing, or is not a file of rows.
    """

    def __init__(self, directory: Path) -> None:
        self._path = rows_path(directory)
        with _readable(self._path):
            self._file = File(self._path)
            self._entries, _ = read_header(self._file)
        for name, entry in self._entries.items():
            if "/" not in name or len(entry.shape) != 2 or entry.dtype != torch.float32:
                raise StateError(f"{self._path}: is damaged: tensor {name!r} is not one of rows. {FIX}")

    def __enter__(self) -> "RowsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Keep the file open in a `with` block, so that it can be read even after it was removed."""
        with self._file.descriptor():
            yield

    @property
    def moments(self) -> list[str]:
        """The names of the moments of the optimizer."""
        kinds = dict.fromkeys(name.partition("/")[0] for name in self._entries)
        return [kind.removeprefix(MOMENT) for kind in kinds if kind.startswith(MOMENT)]

    def shapes(self, kind: str) -> dict[str, tuple[int, int]]:
        """Return the shapes (k, rows) of the values of a kind, by tensor of the model."""
        result = {}
        for name, entry in self._entries.items():
            of, _, tensor = name.partition("/")
            if of == kind:
                rows, k = entry.shape
                result[tensor] = (k, rows)
        return result

    def of_tensor(self, kind: str, name: str) -> torch.Tensor:
        """Return the values of all rows of a tensor, (k, rows), float32.

        Raises:
            StateError: the file does not have the tensor, cannot be read, or a value is not finite.
        """
        if f"{kind}/{name}" not in self._entries:
            raise StateError(f"{self._path}: has no tensor '{kind}/{name}'. {FIX}")
        return self.read(kind, name, 0, self._entries[f"{kind}/{name}"].shape[0]).T.contiguous()

    def read(self, kind: str, name: str, first: int, stop: int) -> torch.Tensor:
        """Return the values of rows [first, stop) of a tensor, (stop - first, k), float32.

        Raises:
            StateError: the file cannot be read, or a value is not finite.
        """
        entry = self._entries[f"{kind}/{name}"]
        rows, k = entry.shape
        assert 0 <= first <= stop <= rows
        out = torch.empty(stop - first, k)
        with _readable(self._path):
            bytes_of_out = out.view(-1).view(torch.uint8).numpy().data
            self._file.read(bytes_of_out, entry.offset + 4 * k * first, f"tensor {name!r}")
        if not bool(torch.isfinite(out).all()):
            raise StateError(f"{self._path}: tensor '{kind}/{name}' holds values that are not finite. {FIX}")
        return out


def _digest_of(descriptor: int, begin: int, end: int) -> bytes:
    hasher = sha256()
    for _, piece in pieces_of(descriptor, begin, end):
        hasher.update(piece)
    return hasher.digest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Replace the errors of reading by a StateError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise StateError(f"{path}: is missing, but the state next to it needs it. {FIX}") from None
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror}. {FIX}") from error
    except CandidateError as error:
        raise StateError(f"{path}: the rows of the state cannot be read. {error} {FIX}") from error
