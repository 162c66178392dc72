"""The progress display tells the truth, keeps quiet when asked, and never touches the terminal with names."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pyte
import pytest

from ckptdiff.events import Note, StageBegun, StageProgress, Started
from ckptdiff.figures.result import Diff
from ckptdiff.report import progress
from ckptdiff.report.progress import ProgressDisplay


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


class AsciiTerminal(Terminal):
    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "ascii"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return clock


def screen_of(written: str) -> list[str]:
    """What a terminal shows, without empty lines."""
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(written.replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display if line.strip()]


Play = Callable[[ProgressDisplay], None]


@pytest.fixture
def play(clock: Clock, diff: Diff) -> Play:
    """Twelve seconds of a run of 12 GB, an event a second."""

    def run(display: ProgressDisplay) -> None:
        display(Started(3, 12_000_000_000, diff))
        display(StageBegun("comparing", 12_000_000_000, "bytes"))
        for second in range(1, 13):
            clock.now += 1.0
            done, compared = second * 1_000_000_000, second * 1000
            display(StageProgress("comparing", done, f"layer.{second}\x1b[2J", compared, compared * 774 // 1000))

    return run


def test_plain_lines_every_few_seconds_and_at_the_end(play: Play) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream) as display:
        play(display)
    assert stream.getvalue().splitlines() == [
        "ckptdiff: comparing: 5 GB of 12 GB, 7 s left, 1.00 GB/s, 77.4 % unchanged, layer.5\\x1b[2J",
        "ckptdiff: comparing: 10 GB of 12 GB, 2 s left, 1.00 GB/s, 77.4 % unchanged, layer.10\\x1b[2J",
        "ckptdiff: comparing: 12 GB in 12 s, 77.4 % unchanged",
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
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", text)


def test_no_color_and_no_character_that_the_terminal_lacks(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = AsciiTerminal()
    with ProgressDisplay(stream) as display:
        play(display)
    text = stream.getvalue()
    assert "###---" in text.replace("\x1b[2m", "") and text.isascii()
    assert not re.search(r"\x1b\[[0-9;]*[349][0-9]m", text)


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
    assert "\x1b[" not in stream.getvalue() and len(stream.getvalue().splitlines()) == 3


def test_a_short_run_draws_nothing(clock: Clock) -> None:
    stream = Terminal()
    with ProgressDisplay(stream) as display:
        for stage in ("comparing", "spectra", "writing"):
            display(StageBegun(stage, 100, "bytes"))
            clock.now += 0.3
            display(StageProgress(stage, 100, "x", 1, 1))
    assert stream.getvalue() == ""


def test_no_more_drawings_than_anyone_can_see(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    monkeypatch.setattr(ProgressDisplay, "_draw", lambda display, now: drawn.append(now))
    monkeypatch.setattr(ProgressDisplay, "_live", object(), raising=False)
    display = ProgressDisplay(Terminal())
    display._live = object()  # type: ignore[assignment]
    display(StageBegun("comparing", 1000, "bytes"))
    for done in range(1000):
        clock.now += 0.01
        display(StageProgress("comparing", done))
    assert 70 <= len(drawn) <= 81


def test_every_stage_has_a_line_of_its_own(clock: Clock) -> None:
    """From its first moment, to its end, which comes before the next stage; the time left is that of one stage."""

    screens: list[list[str]] = []

    def told(stream: io.StringIO) -> list[str]:
        with ProgressDisplay(stream) as display:
            display(StageBegun("comparing", 4_290_000_000, "bytes"))
            for second in range(1, 7):
                clock.now += 1.0
                display(StageProgress("comparing", second * 700_000_000, "lm_head.weight"))
            display(StageProgress("comparing", 4_290_000_000, "lm_head.weight"))
            display(StageBegun("spectra", 1, "share"))
            screens.append(screen_of(stream.getvalue()))
            for second in range(1, 100):
                clock.now += 1.0
                display(StageProgress("spectra", second / 100, "lm_head.weight"))
            clock.now += 1.0
            display(StageProgress("spectra", 1, "model.norm.weight"))
            display(StageBegun("writing", 1, "share"))
            screens.append(screen_of(stream.getvalue()))
            clock.now += 1.0
            display(StageProgress("writing", 1))
        return stream.getvalue().splitlines()

    lines = told(io.StringIO())
    assert lines[:4] == [
        "ckptdiff: comparing: 3.5 GB of 4.29 GB, 1 s left, 0.70 GB/s, lm_head.weight",
        "ckptdiff: comparing: 4.29 GB in 6 s",
        "ckptdiff: spectra: 5 %, 1 min 35 s left, lm_head.weight",
        "ckptdiff: spectra: 10 %, 1 min 30 s left, lm_head.weight",
    ]
    assert lines[-2:] == ["ckptdiff: spectra: 95 %, 5 s left, lm_head.weight", "ckptdiff: spectra: 100 % in 1 min 40 s"]
    assert len(lines) == 2 + 19 + 1
    screens.clear()
    told(Terminal())
    bar = "━" * 40, "─" * 40
    assert screens == [
        [f"comparing {bar[0]}  4.29 GB in 6 s", f"spectra   {bar[1]}  0 %"],
        [f"comparing {bar[0]}  4.29 GB in 6 s", f"spectra   {bar[0]}  100 % in 1 min 40 s", f"writing   {bar[1]}  0 %"],
    ]


def test_what_an_earlier_run_kept_is_shown_and_says_nothing_of_the_speed(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream) as display:
        display(StageBegun("spectra", 1, "share", kept=0.6))
        for done in (0.2, 0.6, 0.7, 0.8):
            clock.now += 5.0
            display(StageProgress("spectra", done, "lm_head.weight"))
        clock.now += 10.0
        display(StageProgress("spectra", 1, "lm_head.weight"))
    assert stream.getvalue().splitlines() == [
        "ckptdiff: spectra: 20 %, 60 % kept, lm_head.weight",
        "ckptdiff: spectra: 60 %, 60 % kept, lm_head.weight",
        "ckptdiff: spectra: 70 %, 15 s left, 60 % kept, lm_head.weight",
        "ckptdiff: spectra: 80 %, 10 s left, 60 % kept, lm_head.weight",
        "ckptdiff: spectra: 100 % in 30 s, 60 % kept",
    ]


def test_no_time_is_left_before_there_is_a_basis(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream) as display:
        display(StageBegun("spectra", 1, "share"))
        for done in (0.0, 0.0, 0.1, 0.1):
            clock.now += 5.0
            display(StageProgress("spectra", done, "lm_head.weight"))
        clock.now += 35.0
        display(StageProgress("spectra", 0.9999, "lm_head.weight"))
        clock.now += 5.0
        display(StageProgress("spectra", 0.9999, "lm_head.weight"))
    assert stream.getvalue().splitlines() == [
        "ckptdiff: spectra: 0 %, lm_head.weight",
        "ckptdiff: spectra: 0 %, lm_head.weight",
        "ckptdiff: spectra: 10 %, 1 min 30 s left, lm_head.weight",
        "ckptdiff: spectra: 10 %, 2 min 15 s left, lm_head.weight",
        "ckptdiff: spectra: 99 %, 1 s left, lm_head.weight",
        "ckptdiff: spectra: 99 %, 1 s left, lm_head.weight",
    ]


def test_compiling_is_told_at_once(clock: Clock) -> None:
    def told(stream: io.StringIO, **options: bool) -> str:
        with ProgressDisplay(stream, **options) as display:
            display(Note("compiling kernels, once"))
            display(StageBegun("compiling", 7, "kernels"))
            drawn = stream.getvalue()
            for done in range(1, 8):
                clock.now += 2.0
                display(StageProgress("compiling", done, "once"))
        return drawn if stream.isatty() else stream.getvalue()

    assert "compiling" in told(Terminal()) and "0 of 7" in told(Terminal())
    assert told(Terminal(), progress=False) == ""
    assert told(io.StringIO(), progress=False, infos=True) == "ckptdiff: compiling kernels, once\n"
    assert told(io.StringIO()).splitlines() == [
        "ckptdiff: compiling: 3 of 7 kernels, once",
        "ckptdiff: compiling: 6 of 7 kernels, once",
        "ckptdiff: compiling: 7 kernels in 14 s",
    ]


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


def test_held_warnings_come_out_when_it_lasts_or_fails(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream, repeated=True) as display:
        display(StageBegun("comparing", 100, "bytes"))
        display(Note("odd", warning=True))
        clock.now += 1.0
        display(StageProgress("comparing", 50, "x", 1, 1))
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


def test_an_empty_run(clock: Clock) -> None:
    for stream, expected in ((io.StringIO(), "ckptdiff: comparing: 0 B in 9 s"), (Terminal(), "━━━━━")):
        with ProgressDisplay(stream) as display:
            display(StageBegun("comparing", 0, "bytes"))
            clock.now += 9.0
            display(StageProgress("comparing", 0))
        assert expected in stream.getvalue()


def test_the_clock_of_the_speed_starts_with_the_first_data(clock: Clock) -> None:
    """Which may have waited for another kernel to be compiled."""
    stream = io.StringIO()
    with ProgressDisplay(stream) as display:
        display(StageBegun("comparing", 9_000_000_000, "bytes"))
        clock.now += 60.0
        display(StageProgress("comparing", 1_000, "first", 1, 1))
        clock.now += 5.0
        display(StageProgress("comparing", 5_000_001_000, "second", 1, 1))
    assert stream.getvalue().splitlines() == [
        "ckptdiff: comparing: 1 kB of 9 GB, 100 % unchanged, first",
        "ckptdiff: comparing: 5 GB of 9 GB, 4 s left, 1.00 GB/s, 100 % unchanged, second",
    ]


@pytest.mark.parametrize(("columns", "kept"), [("100", 4), ("60", 3), ("40", 1), ("12", 1)])
def test_what_a_narrow_terminal_has_no_room_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: str, kept: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    with ProgressDisplay(stream) as display:
        display(StageBegun("comparing", 4_290_000_000, "bytes"))
        for done in (0, 1_230_000_000):
            clock.now += 2.0
            display(StageProgress("comparing", done, "model.layers.11.self_attn.q_proj.weight", 1000, 774))
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).strip().splitlines()[-2:]
    assert all(len(line.split("\r")[-1]) <= int(columns) for line in last)
    facts = ["1.23 GB of 4.29 GB", "5 s left", "0.61 GB/s", "77.4 % unchanged"]
    shown = [fact in last[0] for fact in facts]
    assert shown == ([False] * 4 if columns == "12" else [True] * kept + [False] * (4 - kept))
