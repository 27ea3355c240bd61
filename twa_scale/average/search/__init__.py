"""Search averages by a score that has no gradient, such as a benchmark. Start with `driver.py`."""

from twa_scale.average.search.driver import Evaluation, SearchResult, search

__all__ = ["Evaluation", "SearchResult", "search"]
