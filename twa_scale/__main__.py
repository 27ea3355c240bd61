"""The command line as a process of its own: the console script `twa-scale`, and `python -m twa_scale` of launchers."""

from typing import NoReturn

from twa_scale.cli import main
from twa_scale.ranks import end


def program() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    try:
        main()
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            raise
        end(left.code or 0)
    end(0)


if __name__ == "__main__":
    program()
