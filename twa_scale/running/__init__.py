"""Averages of a model while it trains. Start with `averages.py`."""

from twa_scale.running.averages import RunningAverages

__all__ = ["RunningAverages"]
