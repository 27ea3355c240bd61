"""The version of this package, in a module that imports nothing."""

__version__ = "0.1.0"
TESTED_TORCH = "2.6 to 2.14"
"""The versions of torch with which the tests were run."""
