"""The check that all ranks see the same directory."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile

from twa_scale.errors import OutputError
from twa_scale.output.publish import output_errors
from twa_scale.ranks import Ranks


def require_shared(directory: Path, group: Ranks) -> None:
    """Check that all ranks see the files of the first rank in a directory, which is created. Collective.

    Raises:
        OutputError: on every rank.
    """
    name = ""
    with ExitStack() as until_seen:
        with group.agree(), output_errors(directory):
            if group.rank == 0:
                directory.mkdir(parents=True, exist_ok=True)
                file = until_seen.enter_context(NamedTemporaryFile(prefix=".twa-scale-", dir=directory))
                name = Path(file.name).name
        name = group.broadcast(name)
        with group.agree():
            if not (directory / name).exists():
                raise not_shared(directory)


def not_shared(path: Path) -> OutputError:
    """Return the error of a rank that does not see a file that the first rank has created in a directory."""
    return OutputError(
        f"{path}: this rank does not see the file that rank 0 created there, because it is not on a shared file "
        "system. Choose a directory that every node mounts."
    )
