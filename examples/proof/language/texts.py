"""Real text of several kinds: Python's sources, the documentation of the Linux kernel, an English dictionary.

The kernel's documentation and the dictionary come from Debian packages, which are read without being installed.
"""

import gzip
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.proof.packages import members, package_file
from examples.shared_directory import make_once

CONTEXT = 129  # bytes of an example: 128 that are read and one more that is predicted
PIECE = 8 * CONTEXT  # bytes that a source gives to a held-out split
TRAIN_BYTES = 8_000_000  # of each kind
PACKAGES = {"kernel": "linux-doc-6.1", "dictionary": "dict-gcide"}
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def write_texts(directory: Path, kinds: list[str], pieces: dict[str, int], packages: Path) -> None:
    """Write train/, validation/ and test/ into `directory`: no source is in two of them.

    Args:
        directory: if it is finished, with the same arguments, it is left as it is.
        kinds: of `python`, `kernel`, `dictionary`.
        pieces: how many sources of each kind give a piece to each held-out split.
        packages: where the Debian packages are.
    """

    def write_kinds(into: Path) -> None:
        for kind in kinds:
            write_kind(into, kind, pieces, packages)

    make_once(directory, {"kinds": kinds, "pieces": pieces}, write_kinds)


def write_kind(directory: Path, kind: str, pieces: dict[str, int], packages: Path) -> None:
    sources = [text for text in SOURCES[kind](packages) if len(text) >= PIECE]
    random.Random(0).shuffle(sources)
    for split, count in pieces.items():
        for i in range(count):
            write(directory / split / f"{kind}-{i:03}.txt", next_piece(sources))
    write(directory / "train" / f"{kind}.txt", b"\n".join(sources)[:TRAIN_BYTES])


def next_piece(sources: list[bytes]) -> bytes:
    """Remove the last source and return a piece of its middle, since many begin alike.

    Sources whose piece is also in another one, as in copies of a file, are left out.
    """
    while True:
        text = sources.pop()
        start = (len(text) - PIECE) // 2
        piece = text[start : start + PIECE]
        if not any(piece in other for other in sources):
            return piece


def write(path: Path, text: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


def python(_: Path) -> Iterator[bytes]:
    """Yield the modules of Python's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not NOT_READ & set(path.relative_to(library).parts):
            yield path.read_bytes()


def kernel(packages: Path) -> Iterator[bytes]:
    """Yield the documents of the kernel's documentation, as reStructuredText."""
    for name, content in members(packages, PACKAGES["kernel"]):
        if name.endswith((".rst.gz", ".rst")) and "/html/" not in name:
            yield gzip.decompress(content) if name.endswith(".gz") else content


def dictionary(packages: Path) -> Iterator[bytes]:
    """Yield the GNU Collaborative International Dictionary of English in parts of 16 KB."""
    for name, content in members(packages, PACKAGES["dictionary"]):
        if name.endswith(".dict.dz"):
            text = gzip.decompress(content)
            yield from (text[start : start + 16384] for start in range(0, len(text), 16384))


def check_sources(kinds: list[str], packages: Path) -> None:
    """Check that the Debian packages of all kinds are there.

    Raises:
        SystemExit: one is missing.
    """
    for kind in kinds:
        if kind in PACKAGES:
            package_file(packages, PACKAGES[kind])


SOURCES: dict[str, Callable[[Path], Iterator[bytes]]] = {"python": python, "kernel": kernel, "dictionary": dictionary}
