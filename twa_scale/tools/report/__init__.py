"""A report on a run as one page of HTML."""

from twa_scale.tools.report.write import REPORT, write_report

__all__ = ["REPORT", "write_report"]
