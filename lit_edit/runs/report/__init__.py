"""The report: one self-contained page about a run, or about several side by side."""

from .page import FILE_NAME, Report, write_report

__all__ = ["FILE_NAME", "Report", "write_report"]
