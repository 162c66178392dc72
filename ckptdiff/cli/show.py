"""``ckptdiff show``: print any view of a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ckptdiff.cli.view import Request, verdict_verbosity, view_options


@click.command(short_help="Print any view of a run file.")
@click.argument("run", type=click.Path(), metavar="RUN.h5")
@view_options
@verdict_verbosity
def show(run: str, **given: Any) -> int:
    """Print any view of a run file, as `ckptdiff diff` printed it.

    \b
      ckptdiff show run.h5 --by module
      ckptdiff show run.h5 --by tensor --sort rel_norm --top 20
      ckptdiff show run.h5 --format csv -O tensors.csv
    """  # noqa: D301
    request = Request.of(given, run_file=run, kept=[Path(run)])
    from ckptdiff.runfile.reader import RunFile

    with RunFile(run) as file:
        diff = file.load()
    for check in request.checks:
        check.require_member(diff.tensors)
    request.require_rows(diff)
    request.print(diff)
    return request.verdict(diff)
