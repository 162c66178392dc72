"""The progress display: a listener on engine events that draws on stderr."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from ckptdiff.events import Event, Note, StageBegun, StageProgress
from ckptdiff.report.text import duration, percent, safe, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

_FIRST_LINE = 5.0
"""Seconds until the first plain line, and between two of them."""
_SHORTEST, _LONGEST = 6, 40
"""Characters of the bar."""
_BASIS = 1.0
"""Seconds of a stage that say how long it will take."""


@dataclass(slots=True)
class _Row:
    """A stage as it is shown."""

    begun: StageBegun
    since: float
    latest: StageProgress
    basis: tuple[float, float] | None = None
    """When the first progress was told, and how much was done: what came before may have waited for something else."""
    ended: float | None = None
    printed: bool = False
    """Whether a plain line told of it."""

    def take(self, event: StageProgress, now: float) -> None:
        """Note how far the stage is."""
        self.latest = event
        if event.done >= self.begun.kept:
            self.basis = self.basis or (now, event.done)
        if event.done >= self.begun.total:
            self.ended = now

    @property
    def share(self) -> float:
        """Which part is done."""
        return 1.0 if self.ended is not None else self.latest.done / self.begun.total if self.begun.total else 0.0

    def facts(self, now: float) -> list[str]:
        """How much is done, the time left, the speed and the running sparsity, in words; the first ones matter most."""
        done, total, unit = self.latest.done, self.begun.total, self.begun.unit
        spell = size if unit == "bytes" else lambda count: f"{count:,.0f}"
        of = " kernels" if unit == "kernels" else ""
        # Not rounded up: 100 % is the end.
        facts = [f"{int(100 * self.share)} %" if unit == "share" else f"{spell(done)} of {spell(total)}{of}"]
        kept = self.begun.kept
        if self.ended is not None:
            whole = "100 %" if unit == "share" else spell(total) + of
            facts = [f"{whole} in {duration(self.ended - self.since)}"]
        elif unit == "kernels":  # which take from one second to thirty each: one says nothing of the next
            pass
        elif self.basis is not None and now - self.basis[0] >= _BASIS and done > self.basis[1]:
            speed = (done - self.basis[1]) / (now - self.basis[0])
            facts.append(f"{duration(max((total - done) / speed, 1.0))} left")
            if unit == "bytes":
                facts.append(f"{speed / 1e9:.2f} GB/s")
        if kept and total:
            facts.append(f"{int(100 * kept / total)} % kept")
        if self.latest.compared:
            facts.append(f"{percent(self.latest.unchanged / self.latest.compared)} unchanged")
        return facts


class ProgressDisplay:
    """A row for each stage on a terminal, a plain line every few seconds elsewhere; and the notes of the engine.

    Use it as a context manager around the run, so that the terminal is tidy whatever happens. Its stream is stderr, as
    a rule: nothing is ever written to stdout.

    With `repeated`, the report that follows the run prints its warnings too. Then a short run prints them only there;
    one that lasts, or fails, prints them as they come.

    A bar appears after `first_bar` seconds: a shorter run needs none, and rich takes a tenth of a second to import.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        progress: bool = True,
        warnings: bool = True,
        infos: bool = False,
        repeated: bool = False,
        first_bar: float = 0.4,
        per_second: float = 8,
    ) -> None:
        self._stream, self._progress, self._warnings, self._infos = stream, progress, warnings, infos
        self._first_bar, self._pause = first_bar, 1 / per_second
        self._terminal = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._held: list[str] | None = [] if repeated else None
        self._rows: list[_Row] = []
        self._shown = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        if kind is not None:
            self._print_held()

    def __call__(self, event: Event) -> None:
        """Listen to the engine."""
        if isinstance(event, Note):
            self._note(event)
        elif isinstance(event, StageBegun):
            now = time.monotonic()
            self._rows.append(_Row(event, now, StageProgress(event.stage, 0)))
            # Kernels take their time, and may be compiled in this thread.
            self._show(now, at_once=self._live is not None or event.unit == "kernels")
        elif isinstance(event, StageProgress):
            now, row = time.monotonic(), self._rows[-1]
            row.take(event, now)
            if now - row.since >= self._first_bar:
                self._print_held()
            self._show(now)

    def _note(self, note: Note) -> None:
        if not (self._warnings if note.warning else self._infos):
            return
        line = f"ckptdiff: {'warning: ' if note.warning else ''}{safe(note.text)}"
        if note.warning and self._held is not None:
            self._held.append(line)
        else:
            self._print(line)

    def _show(self, now: float, *, at_once: bool = False) -> None:
        if not self._progress:
            return
        row, passed = self._rows[-1], now - self._shown
        if not self._terminal:
            # A stage that was told of is told of to its end.
            if passed >= _FIRST_LINE or (row.printed and row.ended is not None):
                self._shown, row.printed = now, True
                what = [safe(row.latest.what)] if row.latest.what and row.ended is None else []
                self._print(f"ckptdiff: {row.begun.stage}: {', '.join([*row.facts(now), *what])}")
        elif at_once or (now - row.since >= self._first_bar if self._live is None else passed >= self._pause):
            self._shown = now
            self._draw(now)

    def _draw(self, now: float) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            # Drawn by hand at each event: a refresh thread would take the GIL from the workers. What else is written to
            # stdout is no concern of ours.
            console = Console(file=self._stream, highlight=False, markup=False)
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
        self._live.update(self._text(now, self._live.console), refresh=True)

    def _text(self, now: float, console: Console) -> Text:
        """All rows that the screen has room for, and what is at hand; no line is longer than the screen is wide."""
        from rich.text import Text

        rows = self._rows[-max(console.height - 2, 1) :]
        left = max(len(row.begun.stage) for row in rows) + 1
        room = console.width - left - _SHORTEST - 2
        words = [_fitted(row.facts(now), room) for row in rows]
        width = min(max(room + _SHORTEST - max(map(len, words)), _SHORTEST), _LONGEST)
        unicode = console.encoding.startswith("utf")
        full, empty = "━─" if unicode else "#-"
        text = Text(no_wrap=True, overflow="ellipsis" if unicode else "crop")
        for row, said in zip(rows, words, strict=True):
            done = int(width * row.share)
            text.append(f"{row.begun.stage:<{left}}")
            text.append(full * done, "cyan").append(empty * (width - done), "dim").append(f"  {said}\n")
        return text.append(safe(rows[-1].latest.what), "dim")

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


def _fitted(facts: list[str], room: int) -> str:
    """As many facts as there is room for, one at least."""
    while len(facts) > 1 and len("  ".join(facts)) > room:
        facts = facts[:-1]
    return "  ".join(facts)
