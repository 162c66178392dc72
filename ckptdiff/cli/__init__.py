"""The command line: one module per command; :func:`main` owns exit codes and streams.

Reached by every start of the program, so nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from ckptdiff import own_process
from ckptdiff.cli.failures import OK, Session, failure
from ckptdiff.cli.group import ckptdiff
from ckptdiff.cli.signals import ended_soon, signals_noted
from ckptdiff.cli.target import abandon_stdout
from ckptdiff.interrupts import pending

__all__ = ["main", "program"]

_COMPLETE = "_CKPTDIFF_COMPLETE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        The exit code: 0 done, 1 a check failed or something differs, 2 trouble, 130 Ctrl-C, 141 closed pipe,
        143 SIGTERM.
    """
    if arguments is None:
        own_process.take_over()
    session = Session(traceback=os.environ.get("CKPTDIFF_DEBUG", "") not in ("", "0"))
    with signals_noted(), _ready_stdout():
        with ended_soon() if arguments is None else contextlib.nullcontext():
            code, message = _outcome(sys.argv[1:] if arguments is None else list(arguments), session)
            abandon_stdout()
        if message and sys.stderr is not None:
            with contextlib.suppress(OSError):
                print(message, file=sys.stderr, flush=True)
        if (late := pending()) is not None:  # the command may have ended by itself
            code, _ = failure(late, session)
    return code


def program() -> NoReturn:
    """Run the command line of this process and end it: what the command ``ckptdiff`` is."""
    own_process.leave(main())


def _outcome(arguments: list[str], session: Session) -> tuple[int, str]:
    """The exit code of a command line and the message for stderr."""
    try:
        code = _run(arguments, session)
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        return failure(pending() or error, session)
    return code, ""


def _run(arguments: list[str], session: Session) -> int:
    # click's own main() is not used: it turns a closed pipe into exit code 1 and an empty line on stderr.
    if instruction := os.environ.get(_COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(ckptdiff, {}, "ckptdiff", _COMPLETE, instruction)
    with ckptdiff.make_context("ckptdiff", arguments, obj=session) as context:
        return ckptdiff.invoke(context) or OK


@contextlib.contextmanager
def _ready_stdout() -> Iterator[None]:
    """Make stdout take everything, or say that it did not."""
    before = sys.stdout
    if isinstance(getattr(before, "buffer", None), io.RawIOBase):
        # PYTHONUNBUFFERED: a write that a closing pipe cuts short would be lost without a word.
        sys.stdout = open(before.fileno(), "w", encoding=before.encoding, closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the locale's encoding lacks is printed escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        sys.stdout = before
