"""Turn an exception into what the user reads, and the exit code."""

from __future__ import annotations

import signal
import traceback
from dataclasses import dataclass

import click

from ckptdiff.errors import CkptdiffError
from ckptdiff.remote.address import without_secrets
from ckptdiff.report.text import safe

__all__ = ["CLOSED_PIPE", "DIFFERS", "OK", "TROUBLE", "Session", "failure"]

OK = 0
DIFFERS = 1
TROUBLE = 2
CLOSED_PIPE = 141


@dataclass(slots=True)
class Session:
    """What the commands and main() tell each other.

    Attributes
    ----------
    traceback : bool
        Show the traceback of an unexpected error (``-v`` or CKPTDIFF_DEBUG=1).
    """

    traceback: bool = False


def failure(error: BaseException, session: Session) -> tuple[int, str]:
    """The exit code of an exception and the message for stderr, "" for none."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code, ""
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE, ""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        signum = error.args[0] if error.args else signal.SIGINT
        return 128 + signum, f"ckptdiff: {'interrupted' if signum == signal.SIGINT else 'terminated'}"
    # Arguments that are URLs may carry signatures.
    return TROUBLE, without_secrets(_message(error, session))


def _message(error: BaseException, session: Session) -> str:
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, CkptdiffError):
        return _known(error)
    if isinstance(error, MemoryError):
        return "ckptdiff: error: out of memory\n  try:      a lower --max-memory, or fewer --threads"
    if isinstance(error, OSError) and error.strerror:
        where = f": {safe(str(error.filename))}" if error.filename is not None else ""
        return f"ckptdiff: error: {safe(error.strerror)}{where}"
    text = f"ckptdiff: error: unexpected {type(error).__name__}: {safe(str(error))}"
    if session.traceback:
        return "".join(traceback.format_exception(error)).rstrip() + "\n" + text
    return text + "\n  try:      again with -v or CKPTDIFF_DEBUG=1 for the traceback, and report it"


def _usage(error: click.ClickException) -> str:
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        return error.format_message()  # the help itself; since click 8.2
    text = f"ckptdiff: error: {safe(error.format_message())}"
    if isinstance(error, click.UsageError) and error.ctx is not None:
        text += f"\n  try:      {error.ctx.command_path} --help"
    return text


def _known(error: CkptdiffError) -> str:
    """The error as it prints itself, with what comes from files and arguments made safe line by line."""
    shown = CkptdiffError(
        safe(error.problem),
        file=None if error.file is None else safe(error.file),
        tensor=None if error.tensor is None else safe(error.tensor),
        expected=None if error.expected is None else safe(str(error.expected)),
        found=None if error.found is None else safe(str(error.found)),
        # Hints are ours and may be a few lines of code.
        hint=None if error.hint is None else "\n            ".join(map(safe, error.hint.split("\n"))),
    )
    return f"ckptdiff: error: {shown}"
