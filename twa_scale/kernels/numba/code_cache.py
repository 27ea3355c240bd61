"""numba's cache of machine code in files. A damaged, full or forbidden cache costs time, but no result."""

import logging
from contextlib import suppress
from functools import cache
from typing import Any

from numba.core.caching import FunctionCache
from numba.core.sigutils import normalize_signature


class CodeCache(FunctionCache):  # type: ignore[misc]
    """The cached machine code of one kernel. With numba's own class, these files end the program, or give its results.

    - A file that was being written when the machine crashed cannot be unpickled.
    - A file cannot be written because the disk or a quota is full.
    - If two processes compile one kernel for other types at the same time, both may write the first data file. Then the
      index names code for one of them that is code for the other.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the code for the types `sig`, or None if it has to be compiled."""
        try:
            loaded = super().load_overload(sig, target_context)
        except Exception:  # pickle raises errors of many kinds
            with suppress(OSError):  # `save_overload` reports it
                self.flush()
            return None
        args, _ = normalize_signature(sig)
        return loaded if loaded is None or loaded.signature.args == args else None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save compiled code; report once if that is not possible."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # also of pickle, if `load_overload` could not replace a damaged index
            _report(self.cache_path, getattr(error, "strerror", None) or repr(error))


@cache
def _report(directory: str, reason: str) -> None:
    logging.getLogger(__name__).warning(
        "%s: %s, so compiled kernels cannot be saved, and are compiled again in each process, which takes up to a "
        "minute. Free some space, or set NUMBA_CACHE_DIR to another directory.",
        directory,
        reason,
    )
