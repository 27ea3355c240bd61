"""The run of `twa-scale run CONFIG`. Start with `loop.py`."""

from twa_scale.run.loop import run

__all__ = ["run"]
