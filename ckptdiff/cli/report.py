"""``ckptdiff report``: pictures and tables of a run file as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptdiff.cli.display import progress
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import progress_option, threads_option
from ckptdiff.cli.target import ReportTarget
from ckptdiff.cli.view import verbosity
from ckptdiff.errors import MaskError, OptionError
from ckptdiff.report.text import safe, size

if TYPE_CHECKING:
    from ckptdiff.events import Listener


@click.command(short_help="Write a run file's pictures and tables as one HTML file.")
@click.argument("run", type=click.Path(), metavar="RUN.h5|TRACK.h5")
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    metavar="FILE",
    show_default="the name of RUN.h5 with .html; - is stdout",
    help="Where the page goes; a file that is there is replaced.",
)
@click.option(
    "--against",
    type=click.Path(),
    metavar="RUN2.h5",
    show_default="none",
    help="Another run file, shown beside the first, with the overlap of their masks.",
)
@threads_option
@progress_option
@verbosity
def report(run: str, out: str | None, against: str | None, quiet: bool, **given: Any) -> int:
    """Write what RUN.h5 holds as one HTML file: heatmaps, distributions, spectra, tables, and the JSON document.

    It loads nothing from anywhere and can be read without scripts. A TRACK.h5 of `ckptdiff track` becomes the page of a
    trajectory.

    \b
      ckptdiff report run.h5
      ckptdiff report run.h5 --against other.h5 -o both.html
      ckptdiff report run.h5 -o - > run.html
    """  # noqa: D301
    inputs = [Path(path) for path in (run, against) if path is not None]
    beside = os.path.splitext(run)[0] + ".html"  # noqa: PTH122
    target = ReportTarget.choose(beside if out is None else out, binary=False, kept=inputs)
    with progress(shown=given["progress"], quiet=quiet, verbose=given["verbose"]) as tell:
        parts = list(_page(run, against, given["threads"], tell))
    with target.open() as stream:
        stream.writelines(parts)
    if not (quiet or target.is_stdout):
        print(f"report: {safe(str(target.path))} ({size(sum(len(part.encode()) for part in parts))})")
    return OK


def _page(run: str, against: str | None, threads: int, tell: Listener) -> Iterator[str]:
    from ckptdiff.page import read_run, run_page
    from ckptdiff.runfile.check_target import TRACK_FORMAT, is_of

    if Path(run).is_file() and is_of(Path(run), TRACK_FORMAT):
        from ckptdiff.page.track_page import track_page
        from ckptdiff.track import load_track

        if against is not None:
            raise OptionError("--against is for run files", file=run, expected="two run files", found="a track file")
        return track_page(load_track(run), run)
    first = read_run(run)
    if against is None:
        return run_page([first])
    from ckptdiff.overlap import overlap

    runs = [first, read_run(against)]
    unmasked = [one.path for one in runs if one.diff.mask_rule == "none"]
    if unmasked:
        return run_page(runs, f"{unmasked[0]} holds no masks.")
    try:
        return run_page(runs, overlap([run, against], threads=threads, listener=tell))
    except MaskError as error:
        return run_page(runs, f"{error.problem}.")
