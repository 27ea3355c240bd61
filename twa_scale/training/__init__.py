"""The config-driven run behind `twa-scale run`."""

from twa_scale.training.loop import run

__all__ = ["run"]
