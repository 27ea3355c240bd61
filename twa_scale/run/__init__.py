"""The config-driven run behind `twa-scale run`."""

from twa_scale.run.loop import run

__all__ = ["run"]
