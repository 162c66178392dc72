"""The json report: the whole output contract as one object on one line."""

from __future__ import annotations

from typing import TextIO

from ckptdiff.figures.result import Diff
from ckptdiff.report.document import document
from ckptdiff.report.json_text import dumps
from ckptdiff.report.rows import View


def write(diff: Diff, stream: TextIO, view: View) -> None:
    """Write one JSON object and a newline."""
    stream.write(dumps(document(diff, view)) + "\n")
