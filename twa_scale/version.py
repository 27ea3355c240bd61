"""The version of this package, where modules can import it without the package's own door."""

__version__ = "0.1.0"
