"""One HTML file of what a run file or a track file holds: pictures and tables that need nothing else to be read."""

from ckptdiff.page.assemble import diff_html, run_page
from ckptdiff.page.shown_run import ShownRun, read_run

__all__ = ["ShownRun", "diff_html", "read_run", "run_page"]
