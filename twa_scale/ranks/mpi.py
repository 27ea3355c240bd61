"""Access to the optional mpi4py. Importing it initializes MPI, so only ranks that use MPI import it."""

import atexit
import ctypes
import importlib.util
import sys
from functools import cache
from typing import Any

from twa_scale.errors import ConfigError

_FIX = ": `pip install 'twa-scale[mpi]'`, or make a torch process group and use comm: auto."


def mpi4py_is_installed() -> bool:
    """Return whether mpi4py is installed, without initializing MPI."""
    return importlib.util.find_spec("mpi4py") is not None


def require_mpi4py() -> None:
    """Check that mpi4py is installed, without initializing MPI.

    Raises:
        ConfigError: mpi4py is not installed.
    """
    if not mpi4py_is_installed():
        raise ConfigError(f"ranks that mpirun has started reduce over MPI, but mpi4py is not installed{_FIX}")


def load_mpi(size: int | None = None) -> Any:
    """Import and return the module `mpi4py.MPI`, which initializes MPI.

    Args:
        size: the number of ranks that the launcher has started, if known.

    Raises:
        ConfigError: mpi4py is not installed, does not find its MPI library, or uses another MPI than `mpirun`, so that
            its world does not have `size` ranks.
    """
    require_mpi4py()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # A wheel that finds no MPI library raises RuntimeError.
        raise ConfigError(f"mpi4py cannot load MPI ({error}){_FIX}") from None
    mpi_size = MPI.COMM_WORLD.size
    if size not in (None, mpi_size):
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise ConfigError(
            f"{size} ranks were started, but mpi4py sees {mpi_size}: it uses {library}, and mpirun belongs to another "
            "MPI. Rebuild mpi4py with the mpicc in the directory of this mpirun."
        )
    return MPI


@cache
def mpi_takes_cuda() -> bool:
    """Return whether MPI reads and writes GPU memory, according to an extension of Open MPI and MPICH."""
    query = getattr(ctypes.CDLL(load_mpi().__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())


def abort_at_exit() -> None:
    """Abort all MPI ranks when this process exits, after a failure on this rank only. MPI would wait for all ranks."""
    if mpi := _running():
        atexit.register(mpi.COMM_WORLD.Abort, 1)


def finalize_mpi() -> None:
    """Finalize MPI if it runs. mpirun reports ranks that end without this."""
    if mpi := _running():
        mpi.Finalize()


def _running() -> Any:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None
