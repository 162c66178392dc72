"""The progress display tells the truth, keeps quiet when asked, and never touches the terminal with names."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from ckptdiff.events import Note, Progress, Started
from ckptdiff.report import progress
from ckptdiff.report.progress import ProgressDisplay
from ckptdiff.result import Diff


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return clock


Play = Callable[[ProgressDisplay], None]


@pytest.fixture
def play(clock: Clock, diff: Diff) -> Play:
    """Twelve seconds of a run of 12 GB, an event a second."""

    def run(display: ProgressDisplay) -> None:
        display(Started(3, 12_000_000_000, diff))
        for second in range(1, 13):
            clock.now += 1.0
            display(Progress(second * 1_000_000_000, f"layer.{second}\x1b[2J", second * 1000, second * 774))

    return run


def test_plain_lines_every_few_seconds(play: Play) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream) as display:
        play(display)
    assert stream.getvalue().splitlines() == [
        "ckptdiff: 5 GB of 12 GB, 1.00 GB/s, 7 s left, 77.4 % unchanged, layer.5\\x1b[2J",
        "ckptdiff: 10 GB of 12 GB, 1.00 GB/s, 2 s left, 77.4 % unchanged, layer.10\\x1b[2J",
    ]


def test_no_progress(play: Play) -> None:
    for stream in (io.StringIO(), Terminal()):
        with ProgressDisplay(stream, progress=False) as display:
            play(display)
        assert stream.getvalue() == ""


def test_a_bar_on_a_terminal(play: Play) -> None:
    stream = Terminal()
    with ProgressDisplay(stream) as display:
        play(display)
    text = stream.getvalue()
    assert "1.00 GB/s" in text and "77.4 % unchanged" in text and "━" in text
    assert "layer.3\\x1b[2J" in text and "layer.3\x1b[2J" not in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is back


def test_the_cursor_comes_back_after_a_failure(play: Play) -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), ProgressDisplay(stream) as display:
        play(display)
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_a_dumb_terminal_gets_lines(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with ProgressDisplay(stream) as display:
        play(display)
    assert "\x1b[" not in stream.getvalue() and len(stream.getvalue().splitlines()) == 2


def test_a_short_run_draws_nothing(clock: Clock, diff: Diff) -> None:
    stream = Terminal()
    with ProgressDisplay(stream) as display:
        display(Started(1, 100, diff))
        clock.now += 0.3
        display(Progress(100, "x", 1, 1))
    assert stream.getvalue() == ""


def test_notes(clock: Clock) -> None:
    def told(**options: bool) -> str:
        stream = io.StringIO()
        with ProgressDisplay(stream, **options) as display:
            display(Note("reading with mmap"))
            display(Note("odd\x1b\n", warning=True))
        return stream.getvalue()

    assert told() == "ckptdiff: warning: odd\\x1b\\x0a\n"
    assert told(infos=True) == "ckptdiff: reading with mmap\nckptdiff: warning: odd\\x1b\\x0a\n"
    assert told(warnings=False) == ""
    assert told(repeated=True) == ""


def test_held_warnings_come_out_when_it_lasts_or_fails(clock: Clock, diff: Diff) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream, repeated=True) as display:
        display(Started(1, 100, diff))
        display(Note("odd", warning=True))
        clock.now += 1.0
        display(Progress(50, "x", 1, 1))
        assert stream.getvalue() == "ckptdiff: warning: odd\n"
        display(Note("later", warning=True))
    assert stream.getvalue().splitlines()[-1] == "ckptdiff: warning: later"
    failing = io.StringIO()
    with pytest.raises(ValueError), ProgressDisplay(failing, repeated=True) as display:
        display(Note("odd", warning=True))
        raise ValueError
    assert failing.getvalue() == "ckptdiff: warning: odd\n"


def test_a_closed_stderr_does_not_end_the_run(play: Play) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with ProgressDisplay(Closed()) as display:
        play(display)
        display(Note("odd", warning=True))


def test_an_empty_run(clock: Clock, diff: Diff) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream) as display:
        display(Started(1, 0, diff))
        clock.now += 9.0
        display(Progress(0, "empty", 0, 0))
    assert stream.getvalue() == "ckptdiff: 0 B of 0 B, 0.00 GB/s, empty\n"
