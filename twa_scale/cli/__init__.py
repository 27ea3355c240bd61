"""The command line, one module for each command. A command parses options, calls the library and prints."""

from twa_scale.cli.app import app
from twa_scale.cli.program import main

__all__ = ["app", "main"]
