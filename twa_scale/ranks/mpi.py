"""Finding MPI. mpi4py is optional and importing it initializes MPI, so it is imported only by ranks started for it."""

import atexit
import ctypes
import importlib.util
import sys
from functools import cache
from typing import Any

from twa_scale.errors import ConfigError

_FIX = ": `pip install 'twa-scale[mpi]'`, or make a torch process group and use comm: auto."


def mpi4py_is_installed() -> bool:
    """Return whether `load_mpi` can be tried; initializes nothing."""
    return importlib.util.find_spec("mpi4py") is not None


def require_mpi4py() -> None:
    """Check that mpi4py is there; initializes nothing.

    Raises:
        ConfigError: it is not.
    """
    if not mpi4py_is_installed():
        raise ConfigError(f"ranks that mpirun has started are to reduce over MPI, but mpi4py is not installed{_FIX}")


def load_mpi(size: int | None = None) -> Any:
    """Import and return mpi4py's MPI; its world has to have `size` ranks, where that is known.

    Raises:
        ConfigError: mpi4py is missing, does not find its MPI library, or belongs to another MPI than `mpirun` does.
    """
    require_mpi4py()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # a wheel that finds no MPI library: RuntimeError
        raise ConfigError(f"mpi4py cannot load MPI ({error}){_FIX}") from None
    found = MPI.COMM_WORLD.size
    if size not in (None, found):
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise ConfigError(
            f"{size} ranks were started, but mpi4py sees {found}: it uses {library}, and mpirun belongs to another "
            "MPI. Rebuild mpi4py with the mpicc that stands beside this mpirun."
        )
    return MPI


@cache
def mpi_takes_cuda() -> bool:
    """Return whether MPI says that it reads and writes GPU memory: an extension that Open MPI and MPICH share."""
    query = getattr(ctypes.CDLL(load_mpi().__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())


def abort_at_exit() -> None:
    """End all ranks when this one, which fails alone, exits: where MPI runs, each would wait for the other's end."""
    if mpi := _running():
        atexit.register(mpi.COMM_WORLD.Abort, 1)


def finalize_mpi() -> None:
    """Take leave of the other ranks, where MPI runs: mpirun reports those that end without it."""
    if mpi := _running():
        mpi.Finalize()


def _running() -> Any:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None
