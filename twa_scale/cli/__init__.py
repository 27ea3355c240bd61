"""The command line: one file for each command. Each parses, calls one function of the library, and prints."""

from twa_scale.cli.app import app
from twa_scale.cli.program import main

__all__ = ["app", "main"]
