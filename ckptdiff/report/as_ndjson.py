"""The ndjson report: a header line, one line per row, a summary line; also written while the run goes on.

Both forms go through the same three functions, so a run's stream and what ``show`` prints are the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TextIO

import numpy as np

from ckptdiff.events import Event, Finished, Started, TensorsDone
from ckptdiff.figures.result import Diff
from ckptdiff.report.as_json import aggregates, facts
from ckptdiff.report.rows import View, rows
from ckptdiff.report.text import dumps


def write(diff: Diff, stream: TextIO, view: View) -> None:
    """Write every line of a finished diff."""
    for line in lines(diff, view):
        stream.write(line)


def lines(diff: Diff, view: View) -> Iterator[str]:
    """Yield the lines: ``"type"`` is "header", then "tensor" (or "module", "layer", ...), then "summary"."""
    yield _header(diff)
    for row in rows(diff, view):
        yield _row(row, view)
    yield _summary(diff)


def streams(view: View) -> bool:
    """Whether a view's lines can be written before the run ends: single tensors, all of them, in plan order."""
    return view.rows_by == "tensor" and view.sort is None and view.top is None


class NdjsonStream:
    """Writes the lines of a run as its events come.

    The stream is flushed after each batch of lines, so that the next program in the pipe sees them at once. Between two
    batches lie some seconds at least: the figures of many tensors cost little more than those of one.
    """

    def __init__(self, stream: TextIO, every: float = 0.05) -> None:
        self._stream, self._every = stream, every
        self._waiting: list[Diff] = []
        self._written = -math.inf

    def __call__(self, event: Event) -> None:
        """Listen to the engine."""
        if isinstance(event, Started):
            self._write([_header(event.diff)])
        elif isinstance(event, TensorsDone):
            self._waiting.append(event.diff)
        if isinstance(event, Finished):
            self._write_waiting()
            self._write([_summary(event.diff)])
        elif time.monotonic() - self._written >= self._every:
            self._write_waiting()

    def _write_waiting(self) -> None:
        if self._waiting:
            ready = replace(
                self._waiting[0],
                tensors=tuple(facts for diff in self._waiting for facts in diff.tensors),
                columns={
                    name: np.concatenate([diff.columns[name] for diff in self._waiting])
                    for name in self._waiting[0].columns
                },
            )
            self._waiting.clear()
            self._write([_row(row, View()) for row in rows(ready, View())])
            self._written = time.monotonic()

    def _write(self, text: list[str]) -> None:
        self._stream.writelines(text)
        self._stream.flush()


def _header(diff: Diff) -> str:
    return _line("header", facts(diff))


def _row(row: dict[str, Any], view: View) -> str:
    if view.rows_by == "tensor":
        # The share of a tensor is known only when the last one is done, and the line is written long before.
        row = {**row, "delta_energy_share": None}
    return _line(view.rows_by, row)


def _summary(diff: Diff) -> str:
    return _line("summary", aggregates(diff))


def _line(kind: str, content: dict[str, Any]) -> str:
    return dumps({"type": kind, **content}) + "\n"
