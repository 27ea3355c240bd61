"""Averages of a model while it trains: exponential averages and a window of snapshots, beside each rank's weights."""

from twa_scale.running.averages import RunningAverages

__all__ = ["RunningAverages"]
