"""Write the ndjson report while the run goes on."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from ckptdiff.cli.target import ReportTarget, abandon_stdout
from ckptdiff.events import Event
from ckptdiff.report.as_ndjson import NdjsonStream


class LiveReport:
    """A listener that writes each line as soon as it is known.

    When the reader goes away it falls silent, if the run is to go on for its run file, instead of raising
    BrokenPipeError.
    """

    def __init__(self, target: ReportTarget, *, keep_running: bool) -> None:
        self._target = target
        self._keep_running = keep_running
        self._open = ExitStack()
        self._lines: NdjsonStream | None = None

    def __enter__(self) -> LiveReport:
        self._lines = NdjsonStream(self._open.enter_context(self._target.open()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._open.__exit__(kind, error, traceback)
        except BrokenPipeError:
            if not self._keep_running:
                raise
            abandon_stdout()

    def __call__(self, event: Event) -> None:
        """Listen to the engine."""
        if self._lines is None:
            return
        try:
            self._lines(event)
        except BrokenPipeError:
            if not self._keep_running:
                raise
            abandon_stdout()
            self._lines = None
