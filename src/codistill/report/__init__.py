"""Tables and figures of runs, studies and evaluations."""

from codistill.report.document import write_report
from codistill.report.run import draw_curves, read_results, results_table

__all__ = ["draw_curves", "read_results", "results_table", "write_report"]
