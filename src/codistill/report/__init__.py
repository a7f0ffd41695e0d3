"""Tables and figures of runs, studies and evaluations."""

from codistill.report.document import write_report
from codistill.report.run import draw_curves, read_results, results_table, skipped_steps

__all__ = ["draw_curves", "read_results", "results_table", "skipped_steps", "write_report"]
