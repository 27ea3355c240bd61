"""Debian packages, which are read without being installed."""

import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path


def package_file(packages: Path, package: str) -> Path:
    """Return the newest file of a Debian package in the directory `packages`.

    Raises:
        SystemExit: there is none.
    """
    found = sorted(packages.glob(f"{package}_*.deb"))
    if not found:
        raise SystemExit(f"{packages}/{package}_*.deb is missing: `make proof` downloads it with apt-get")
    return found[-1]


def members(packages: Path, package: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files of a Debian package."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package_file(packages, package))]
    unpacking = subprocess.Popen(command, stdout=subprocess.PIPE)
    with unpacking, tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)):
                yield member.name, file.read()
