"""Choose where a report goes: stdout, or a file that takes its name only when it is whole."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import click

from ckptdiff.errors import OptionError
from ckptdiff.files.hidden import Hidden

output_option = click.option(
    "-O",
    "--output",
    type=click.Path(),
    metavar="FILE",
    show_default="-, that is stdout",
    help="Write the report to a file.",
)

_WEIGHTS = ".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".metadata"
"""How files of checkpoints end."""


@dataclass(frozen=True, slots=True)
class ReportTarget:
    """A place for a report."""

    path: Path | None = None
    """None is stdout."""

    @classmethod
    def choose(cls, output: str | None, *, binary: bool, kept: Iterable[Path]) -> ReportTarget:
        """Check ``--output``, of which None or "-" is stdout, before any work is done.

        Raises OptionError for what is not for a terminal, for a place where nothing could be written, and for one of
        the files that are to be kept: the inputs and the run file.
        """
        if output is None or output == "-":
            if sys.stdout is None:
                raise OptionError("standard output is closed", hint="--output FILE")
            if binary and sys.stdout.isatty():
                raise OptionError("this format is not for a terminal", hint="--output FILE, or redirect stdout")
            return cls()
        path = Path(output)
        folder = Path(os.path.realpath(path)).parent
        if path.is_dir():
            raise OptionError("the report's name is a directory", file=path, expected="a file name")
        if not folder.is_dir():
            raise OptionError("the report's folder does not exist", file=path, found=folder)
        if not os.access(folder, os.W_OK | os.X_OK) and not _is_special(path):
            raise OptionError("the report's folder is not writable", file=path, found=folder)
        if any(_same(path, other) for other in kept):
            raise OptionError("the report would replace an input or the run file", file=path)
        return cls(path)

    @property
    def is_stdout(self) -> bool:
        """Whether the report is printed."""
        return self.path is None

    @property
    def is_terminal(self) -> bool:
        """Whether it is printed to a terminal."""
        return self.path is None and sys.stdout is not None and sys.stdout.isatty()

    @contextmanager
    def open(self) -> Iterator[TextIO]:
        """Open it for writing; a file appears under its name at the end, or not at all."""
        if self.path is None:
            yield sys.stdout
            sys.stdout.flush()
            return
        if _is_special(self.path):
            with self.path.open("w", encoding="utf-8", newline="\n") as stream:
                yield stream
            return
        hidden = Hidden(Path(os.path.realpath(self.path)))
        try:
            hidden.make_file()
            text = os.dup(hidden.descriptor)  # the lock lasts until both are closed
            with os.fdopen(text, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
                yield stream
            hidden.take_name()
        finally:
            hidden.remove()


def abandon_stdout() -> None:
    """Point stdout elsewhere if it cannot be flushed: Python would complain once more when it ends, and exit 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def files_of(checkpoint: str) -> Iterator[Path]:
    """The files that make up a checkpoint, by the look of its path: itself, or what is in its folder."""
    path = Path(checkpoint)
    yield path
    yield Path(checkpoint.rpartition("#")[0] or checkpoint)
    folder = path if path.is_dir() else path.parent if path.name.endswith((".index.json", ".pt")) else None
    if folder is not None:
        with suppress(OSError):
            yield from (entry for entry in folder.iterdir() if entry.name.endswith(_WEIGHTS))


def _is_special(path: Path) -> bool:
    """Whether it exists and is no regular file: /dev/null, a FIFO. Such are written to, never replaced."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _same(path: Path, other: Path) -> bool:
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    try:
        return path.samefile(other)
    except OSError:
        return False
