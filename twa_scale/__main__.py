"""The entry point of a process: the console script `twa-scale`, and `python -m twa_scale` for launchers."""

import sys
from typing import NoReturn

from twa_scale.cli import main


def program() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    try:
        main()
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            raise
        _end(left.code or 0)
    _end(0)


def _end(code: int) -> NoReturn:
    """End the process. The clean-up of ranks is imported only if the process was a rank."""
    if "twa_scale.ranks" in sys.modules:
        from twa_scale.ranks import exit_process

        exit_process(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
