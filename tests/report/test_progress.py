"""The progress display tells the truth, keeps quiet when asked, and never touches the terminal with names."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from ckptdiff.events import Compiling, Note, Progress, StageProgress, Started
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


@pytest.mark.parametrize(
    ("terminal", "options", "told"),
    [
        (True, {}, True),
        (True, {"progress": False}, False),
        (True, {"progress": False, "infos": True}, True),
        (False, {}, False),
        (False, {"infos": True}, True),
    ],
)
def test_compiling_is_told_to_who_waits(clock: Clock, terminal: bool, options: dict[str, bool], told: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    with ProgressDisplay(stream, **options) as display:
        display(Compiling(kept=True))
        display(Compiling(kept=False))
    once = ", once for this version on this machine"
    assert stream.getvalue() == told * f"ckptdiff: compiling kernels{once}\nckptdiff: compiling kernels\n"


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
    assert stream.getvalue() == "ckptdiff: 0 B of 0 B, empty\n"


def test_the_clock_of_the_speed_starts_with_the_first_data(clock: Clock, diff: Diff) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream) as display:
        display(Started(2, 9_000_000_000, diff))
        clock.now += 8.0  # kernels are compiled
        display(Progress(1_000, "first", 10, 10))
        clock.now += 5.0
        display(Progress(5_000_001_000, "second", 10, 10))
    assert stream.getvalue().splitlines() == [
        "ckptdiff: 1 kB of 9 GB, 100 % unchanged, first",
        "ckptdiff: 5 GB of 9 GB, 1.00 GB/s, 4 s left, 100 % unchanged, second",
    ]


@pytest.mark.parametrize("stage", ["spectra", "factors", "steps"])
def test_the_tensors_of_a_stage_are_counted(clock: Clock, stage: str) -> None:
    def told(stream: io.StringIO, **options: bool) -> str:
        with ProgressDisplay(stream, **options) as display:
            for index in range(5):
                clock.now += 3.0
                display(StageProgress(stage, index, 5, f"layer.{index}\x1b[2J", f"rank {index}"))
        return stream.getvalue()

    assert told(io.StringIO()).splitlines() == [
        f"ckptdiff: {stage} of 2 of 5 tensors, 9 s left, layer.1\\x1b[2J",
        f"ckptdiff: {stage} of 4 of 5 tensors, 3 s left, layer.3\\x1b[2J",
    ]
    assert told(io.StringIO(), progress=False) == ""
    assert told(io.StringIO(), progress=False, infos=True).splitlines()[4] == "ckptdiff: layer.4\\x1b[2J: rank 4"
    bar = told(Terminal())
    assert f"{stage} of 5 of 5 tensors" in bar and "━" in bar and "\x1b[?25h" in bar


def test_a_short_stage_draws_nothing(clock: Clock) -> None:
    stream = Terminal()
    with ProgressDisplay(stream) as display:
        clock.now += 0.3
        display(StageProgress("steps", 0, 1, "x"))
    assert stream.getvalue() == ""
