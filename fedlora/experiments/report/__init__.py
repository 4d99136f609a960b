"""From a store of runs to what people read: tables, figures and one page. Knows no torch."""

from fedlora.experiments.report.build import build_report, write_report
from fedlora.experiments.report.results import Results, read_results

__all__ = ["Results", "build_report", "read_results", "write_report"]
