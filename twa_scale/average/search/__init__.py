"""Searching averages by a score: for benchmarks that have no gradient. Start with `driver.py`."""

from twa_scale.average.search.driver import Evaluation, Found, search

__all__ = ["Evaluation", "Found", "search"]
