"""One HTML file about a records folder: it needs no network, no script to be read, and no other file."""

from imnet_prep.report.write import ReportOptions, write_report

__all__ = ["ReportOptions", "write_report"]
