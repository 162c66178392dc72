"""The parquet report: one row per tensor, or per member of another grouping, through pyarrow."""

from __future__ import annotations

import io
from typing import TextIO

from ckptdiff.figures.result import Diff
from ckptdiff.report.frames import arrow_table, require_pyarrow
from ckptdiff.report.rows import View


def write(diff: Diff, stream: TextIO, view: View) -> None:
    """Write a Parquet file to the stream's bytes; the facts of the run are JSON in the metadata key "ckptdiff"."""
    require_pyarrow("--format parquet", ", or --format csv")
    import pyarrow.parquet as pq

    # Made in memory, because a pipe cannot tell its position: a row is some 400 bytes.
    whole = io.BytesIO()
    pq.write_table(arrow_table(diff, view=view), whole)
    stream.flush()
    stream.buffer.write(whole.getbuffer())
