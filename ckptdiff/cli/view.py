"""Define the options of every command that prints a diff, and print it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptdiff.cli.checks import Check
from ckptdiff.cli.display import say
from ckptdiff.cli.failures import DIFFERS, OK, Session
from ckptdiff.cli.target import ReportTarget, output_option
from ckptdiff.figures.members import GROUPINGS
from ckptdiff.report.text import safe

if TYPE_CHECKING:
    from ckptdiff.figures.result import Diff
    from ckptdiff.report.exporters import Format
    from ckptdiff.report.rows import View

__all__ = ["REPORT_FORMATS", "Request", "verbosity", "verdict_verbosity", "view_options"]

REPORT_FORMATS = ("table", "json", "ndjson", "csv", "parquet")
"""Spelled out here, so that --help needs no import of NumPy; a test compares them with their definition."""

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--format", type=click.Choice(REPORT_FORMATS), default="table", help="Format of the report."),
    click.option(
        "--by",
        type=click.Choice(GROUPINGS),
        show_default="an overview; tensor for csv, parquet and ndjson",
        help="What the rows stand for.",
    ),
    click.option(
        "--sort",
        metavar="KEY",
        show_default="order in the checkpoint",
        help="Sort rows by a label, a count or a figure such as rel_norm or unchanged_abs.1e-05; "
        "KEY:asc or KEY:desc sets the direction.",
    ),
    click.option("--top", type=int, metavar="N", show_default="all rows", help="Print only the first N rows."),
    output_option,
    click.option(
        "--exit-code",
        is_flag=True,
        show_default="off",
        help="Exit with 1 unless both sides are identical: no value differs, every tensor has its counterpart, and no "
        "weights in their folders were left unread.",
    ),
    click.option(
        "--fail-if",
        multiple=True,
        metavar="CHECK",
        show_default="no check",
        help="Exit with 1 if KEY OP NUMBER holds, such as 'global.unchanged_abs.1e-05<0.5' or "
        "'modules.q_proj.rel_norm>0.1'; keys are those of --format json. Repeatable.",
    ),
)


def _show_traceback(context: click.Context, _: click.Parameter, verbose: bool) -> bool:
    session = context.find_object(Session)
    if session is not None:  # there is none while a shell asks how a command may go on
        session.traceback |= verbose
    return verbose


_VERBOSE = click.option(
    "-v", "--verbose", is_flag=True, show_default="off", callback=_show_traceback, help="Tell more on stderr."
)


def view_options(command: _Command) -> _Command:
    """Give a command the options of a view."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def verbosity(command: _Command) -> _Command:
    """Give a command ``-v`` and ``-q``."""
    return _VERBOSE(_quiet("Print nothing but errors.")(command))


def verdict_verbosity(command: _Command) -> _Command:
    """Give a command that has ``--exit-code`` ``-v`` and ``-q``."""
    return _VERBOSE(_quiet("Print nothing but errors; implies --exit-code.")(command))


def _quiet(text: str) -> Callable[[_Command], _Command]:
    return click.option("-q", "--quiet", is_flag=True, show_default="off", help=text)


@dataclass(frozen=True, slots=True)
class Request:
    """What to print of a diff, where, and which exit code it gives."""

    format: Format
    view: View
    target: ReportTarget
    checks: tuple[Check, ...]
    exit_code: bool
    quiet: bool

    @classmethod
    def of(cls, given: dict[str, Any], *, run_file: str | None, kept: Iterable[Path]) -> Request:
        """Read and check the view options, before any work is done.

        Raises
        ------
        OptionError
            If one of them cannot be used.
        """
        from ckptdiff.report.rows import View

        if given["format"] == "parquet":
            from ckptdiff.report.as_parquet import require_pyarrow

            require_pyarrow()
        quiet = given["quiet"]
        return cls(
            format=given["format"],
            view=View(given["by"], given["sort"], given["top"], run_file),
            target=ReportTarget.choose(given["output"], binary=given["format"] == "parquet" and not quiet, kept=kept),
            checks=tuple(map(Check.parse, given["fail_if"])),
            exit_code=given["exit_code"] or quiet,
            quiet=quiet,
        )

    @property
    def silent(self) -> bool:
        """Whether there is no report at all: quiet, and no file asked for."""
        return self.quiet and self.target.is_stdout

    def print(self, diff: Diff) -> None:
        """Write the report."""
        from ckptdiff.report.exporters import exporter

        if not self.silent:
            with self.target.open() as stream:
                exporter(self.format)(diff, stream, self.view)

    def verdict(self, diff: Diff) -> int:
        """The exit code; every check that failed is named on stderr.

        Raises
        ------
        OptionError
            If the figure of a check is undefined.
        """
        failed = [check for check in self.checks if check.failed(diff)]
        if not self.quiet:
            for check in failed:
                say(f"check failed: {safe(check.text)} (it is {check.value(diff)!r})")
        return DIFFERS if failed or (self.exit_code and not diff.identical) else OK
