"""`python -m twa_scale`, for launchers that start a module."""

from twa_scale.cli import main

main()
