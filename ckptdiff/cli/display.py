"""Show on stderr what a command has to say: its progress, as a listener of the engine, and lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ckptdiff.report.text import safe

if TYPE_CHECKING:
    from ckptdiff.events import Event, Listener

__all__ = ["progress", "say", "warn"]


@contextmanager
def progress(
    *others: Listener, shown: bool, quiet: bool, verbose: bool = False, repeated: bool = False
) -> Iterator[Listener]:
    """Show progress and warnings on stderr, if there is one.

    The other listeners hear of each event first; `repeated` says that the report has the warnings too.
    """
    from ckptdiff.report.progress import ProgressDisplay

    with ExitStack() as stack:
        listeners = list(others)
        if sys.stderr is not None:
            display = ProgressDisplay(
                sys.stderr, progress=shown and not quiet, warnings=not quiet, infos=verbose, repeated=repeated
            )
            listeners.append(stack.enter_context(display))

        def tell(event: Event) -> None:
            for listener in listeners:
                listener(event)

        yield tell


def say(text: str) -> None:
    """Print a line on stderr; none if it is closed, where ``print`` would write to stdout and spoil a report."""
    if sys.stderr is not None:
        print(f"ckptdiff: {text}", file=sys.stderr)


def warn(warnings: Iterable[str]) -> None:
    """Print each warning as a line of its own, safe to look at."""
    for warning in warnings:
        say(f"warning: {safe(warning)}")
