"""Define the options of reports, and print them: diffs, and lists of what is no diff."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from ckptdiff.cli.checks import Check
from ckptdiff.cli.display import say
from ckptdiff.cli.failures import DIFFERS, OK, Session
from ckptdiff.cli.target import ReportTarget, output_option
from ckptdiff.errors import OptionError
from ckptdiff.figures.members import GROUPINGS
from ckptdiff.report.text import dumps, safe

if TYPE_CHECKING:
    from ckptdiff.figures.result import Diff
    from ckptdiff.report.rows import View

REPORT_FORMATS = ("table", "json", "ndjson", "csv", "parquet")
"""Each has a module ``report/as_NAME.py``, imported when it is asked for: rich, pyarrow and NumPy take their time."""

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
format_option = click.option(
    "--format", type=click.Choice(["table", "json", "ndjson", "csv"]), default="table", help="Format of the list."
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
    """The view of a diff to print, where to, and which exit code it gives."""

    format: str
    view: View
    target: ReportTarget
    checks: tuple[Check, ...]
    exit_code: bool
    quiet: bool

    @classmethod
    def of(cls, given: dict[str, Any], *, run_file: str | None, kept: Iterable[Path]) -> Request:
        """Read and check the view options, before any work is done."""
        from ckptdiff.report.rows import View

        if given["format"] == "parquet":
            from ckptdiff.report.frames import require_pyarrow

            require_pyarrow("--format parquet", ", or --format csv")
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

    def require_rows(self, diff: Diff) -> None:
        """Make sure that there is something to print: an OptionError where nothing has a layer, or a group."""
        from ckptdiff.report.rows import rows

        by = self.view.by
        # JSON has all groupings, and a view only sorts one of them.
        if by not in (None, "tensor") and self.format != "json" and not rows(diff, self.view):
            made = "ckptdiff diff --group NAME=REGEX makes groups; " if by == "group" else ""
            raise OptionError(
                f"no tensor has a {'layer' if by == 'layer,module' else by}",
                file=self.view.run_file,
                expected=f"something to group --by {by}",
                hint=f"{made}--by tensor shows each",
            )

    def load_report(self) -> Any:
        """The module that writes the report, which imports what draws tables: worth doing while others work."""
        return importlib.import_module(f"ckptdiff.report.as_{self.format}")

    def print(self, diff: Diff) -> None:
        """Write the report."""
        if not self.silent:
            with self.target.open() as stream:
                self.load_report().write(diff, stream, self.view)

    def verdict(self, diff: Diff) -> int:
        """The exit code; every check that failed is named on stderr."""
        failed = [check for check in self.checks if check.failed(diff)]
        if not self.quiet:
            for check in failed:
                say(f"check failed: {safe(check.text)} (it is {check.value(diff)!r})")
        return DIFFERS if failed or (self.exit_code and not diff.identical) else OK


def write_rows(
    stream: TextIO, form: str, rows: Sequence[Mapping[str, Any]], keys: Iterable[str], whole: Mapping[str, Any]
) -> None:
    """Write rows as csv under some keys, as a JSON line each (ndjson), or as the last key of a JSON object, `whole`."""
    if form == "json":
        stream.write(dumps({**whole, "tensors": list(rows)}) + "\n")
    elif form == "ndjson":
        stream.writelines(dumps(row) + "\n" for row in rows)
    else:
        import csv

        table = csv.writer(stream, lineterminator="\n")
        table.writerow(columns := list(keys))
        table.writerows([[_cell(row[key]) for key in columns] for row in rows])


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return safe(value) if isinstance(value, str) else value
