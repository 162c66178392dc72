"""The csv report: one row per tensor, or per member of another grouping, under flat keys."""

from __future__ import annotations

import csv
import math
from typing import Any, TextIO

from ckptdiff.figures.result import Diff
from ckptdiff.report.rows import View, flat_columns, flatten, rows
from ckptdiff.report.text import safe


def write(diff: Diff, stream: TextIO, view: View) -> None:
    r"""Write a header and the rows; an undefined figure is an empty cell, a float has all its digits.

    Control characters in names are written as ``\x1b`` here too: csv is often looked at in a terminal. The json
    formats hold the exact names.
    """
    columns = flat_columns(view.rows_by, spectra=diff.spectra is not None)
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(columns)
    for row in rows(diff, view):
        cells = dict(flatten(row))
        table.writerow([_cell(key, cells.get(key)) for key in columns])


def _cell(key: str, value: Any) -> Any:
    if key == "shape":
        return "x".join(map(str, value))
    if key == "groups":
        return safe(" ".join(value or ()))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return safe(value) if isinstance(value, str) else value
