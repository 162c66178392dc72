"""The progress display: a listener on engine events that draws on stderr."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from ckptdiff.events import Compiling, Event, Note, Progress, StageProgress, Started
from ckptdiff.report.text import duration, percent, safe, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

__all__ = ["ProgressDisplay"]

_FIRST_BAR = 0.4
"""Seconds until the bar appears: a shorter run needs none, and rich takes a tenth of a second to import."""
_FIRST_LINE = 5.0
"""Seconds until the first plain line, and between two of them."""
_PER_SECOND = 8
_SHORTEST, _LONGEST = 6, 40
"""Characters of the bar."""


class ProgressDisplay:
    """Bar on a terminal, a plain line every few seconds elsewhere; and the notes of the engine.

    Use it as a context manager around the run, so that the terminal is tidy whatever happens.

    Parameters
    ----------
    stream : TextIO
        Usually stderr. Nothing is ever written to stdout.
    progress : bool
        Whether to show progress at all.
    warnings, infos : bool
        Which notes to print.
    repeated : bool
        Whether the report that follows the run prints its warnings too. Then a short run prints them only there;
        one that lasts, or fails, prints them as they come.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        progress: bool = True,
        warnings: bool = True,
        infos: bool = False,
        repeated: bool = False,
    ) -> None:
        self._stream = stream
        self._progress = progress
        self._warnings, self._infos = warnings, infos
        self._terminal = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._held: list[str] | None = [] if repeated else None
        self._total = 0
        self._opened = self._begun = self._drawn = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._live: Live | None = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        if kind is not None:
            self._print_held()

    def __call__(self, event: Event) -> None:
        """Listen to the engine."""
        if isinstance(event, Started):
            self._total = event.total_bytes
            self._begun = self._drawn = time.monotonic()
            self._first = None
        elif isinstance(event, Note):
            self._note(event)
        elif isinstance(event, Compiling):
            if self._infos or (self._progress and self._terminal):
                once = ", once for this version on this machine" if event.kept else ""
                self._print(f"ckptdiff: compiling kernels{once}")
        elif isinstance(event, Progress):
            self._show(event)
        elif isinstance(event, StageProgress):
            if event.outcome:
                self._note(Note(f"{event.tensor}: {event.outcome}"))
            self._show_stage(event)

    def _note(self, note: Note) -> None:
        if not (self._warnings if note.warning else self._infos):
            return
        line = f"ckptdiff: {'warning: ' if note.warning else ''}{safe(note.text)}"
        if note.warning and self._held is not None:
            self._held.append(line)
        else:
            self._print(line)

    def _show(self, event: Progress) -> None:
        now = time.monotonic()
        if now - self._begun >= _FIRST_BAR:
            self._print_held()
        if not self._progress:
            return
        facts = self._facts(event, now)
        if not self._terminal:
            if now - self._drawn >= _FIRST_LINE:
                self._drawn = now
                self._print(f"ckptdiff: {', '.join(facts)}, {safe(event.tensor)}")
        elif now - self._begun >= _FIRST_BAR and (self._live is None or now - self._drawn >= 1 / _PER_SECOND):
            self._drawn = now
            self._draw(event.bytes_done / self._total if self._total else 1.0, event.tensor, facts)

    def _show_stage(self, event: StageProgress) -> None:
        now, done = time.monotonic(), event.index + 1
        if event.index == 0:
            self._begun = now
        if not self._progress or now - self._drawn < (1 / _PER_SECOND if self._terminal else _FIRST_LINE):
            return
        if self._terminal and self._live is None and now - self._opened < _FIRST_BAR:
            return
        self._drawn = now
        facts = [f"{event.stage} of {done:,} of {event.tensors:,} tensors"]
        if done > 1:
            facts.append(f"{duration((now - self._begun) / (done - 1) * (event.tensors - done))} left")
        if self._terminal:
            self._draw(done / event.tensors, event.tensor, facts)
        else:
            self._print(f"ckptdiff: {', '.join(facts)}, {safe(event.tensor)}")

    def _facts(self, event: Progress, now: float) -> list[str]:
        """Bytes, speed, time left and running sparsity, in words.

        The clock of the speed starts with the first data, which may have waited for kernels to be compiled.
        """
        begun, before = self._first = self._first or (now, event.bytes_done)
        facts = [f"{size(event.bytes_done)} of {size(self._total)}"]
        if event.bytes_done > before and now > begun:
            speed = (event.bytes_done - before) / (now - begun)
            facts += [f"{speed / 1e9:.2f} GB/s", f"{duration((self._total - event.bytes_done) / speed)} left"]
        if event.compared:
            facts.append(f"{percent(event.unchanged / event.compared)} unchanged")
        return facts

    def _draw(self, share: float, tensor: str, facts: list[str]) -> None:
        from rich.text import Text

        if self._live is None:
            from rich.live import Live

            # Drawn by hand at each event: a refresh thread would take the GIL from the workers.
            self._live = Live(console=_console(self._stream), auto_refresh=False, transient=True)
            self._live.start()
        words = "  ".join(facts)
        width = max(_SHORTEST, min(_LONGEST, self._live.console.width - len(words) - 3))
        done = round(width * share)
        bar = Text("━" * done, style="cyan") + Text("━" * (width - done), style="dim")
        text = Text.assemble(bar, "  ", words, "\n", (safe(tensor), "dim"))
        text.no_wrap, text.overflow = True, "ellipsis"
        self._live.update(text, refresh=True)

    def _print_held(self) -> None:
        held, self._held = self._held, None
        for line in held or ():
            self._print(line)

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        try:
            print(line, file=self._stream, flush=True)
        except OSError:
            # Nobody reads stderr any more; the run itself is worth finishing.
            self._progress = self._warnings = self._infos = False


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False)
