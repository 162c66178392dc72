"""``ckptdiff claims``: the paper's table and claims for one pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from ckptdiff.cli.display import progress
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import device_options, progress_option, resource_options, stream_option, tensor_options
from ckptdiff.cli.target import ReportTarget, files_of, output_option
from ckptdiff.cli.view import verbosity
from ckptdiff.errors import OptionError

if TYPE_CHECKING:
    from ckptdiff.figures.result import Diff

_RANKS = {"numerical_rank_frac": 1, "stable_rank": 2, "unchanged_abs": 3, "principal_energy": 4}
"""Which columns a narrow terminal leaves out, the highest first."""
_WIDTH = 120
"""Columns where the output is no terminal, which has its own."""
_NOTE = (
    "Rows below the first: arXiv 2606.13657, Tables 2, 8, 9.   update, unchanged, <=1e-5 (|d|): of all values; the "
    "others: medians over the matrices that changed.   s. rank: stable rank.   pr. energy: in the top 10 % principal "
    "directions."
)


@click.command(short_help="Judge the sparse-update paper's claims for a pair.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="BASE TUNED | RUN.h5")
@click.option(
    "--spectra",
    type=click.Choice(["randomized", "exact"]),
    default="exact",
    help="How to measure spectra; only exact has numerical ranks. A run file has its own.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the randomized spectra.")
@tensor_options
@device_options
@resource_options
@stream_option
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", help="Format of the report.")
@output_option
@progress_option
@verbosity
def claims(paths: tuple[str, ...], **given: Any) -> int:
    """Print the table of arXiv 2606.13657 for BASE and TUNED, and whether the pair shows what that paper claims.

    Shown means: over half of all coordinates unchanged; an update below 1 % of the base's norm; relative norms of
    layers that vary by less than their mean; one that is largest in the feed-forward block; over 90 % of its singular
    values above 1e-5 of the largest; and for all else, 5 % away from what chance, or noise of the same size after
    rounding, would give. RUN.h5 is a run file of `ckptdiff diff --spectra`.

    \b
      ckptdiff claims base/ tuned/
      ckptdiff claims run.h5 --format json
    """  # noqa: D301
    if len(paths) > 2:
        raise OptionError("too many paths", expected="BASE TUNED, or a run file", found=len(paths))
    if len(paths) == 1 and (given["renames"] or given["include"] or given["exclude"]):
        raise OptionError("--map, --include and --exclude are for BASE TUNED", file=paths[0], hint="leave them out")
    kept = [file for path in paths for file in (files_of(path) if len(paths) == 2 else [Path(path)])]
    target = ReportTarget.choose(given["output"], binary=False, kept=kept)
    diff = _measured(*paths, given) if len(paths) == 2 else _loaded(paths[0])
    if not (given["quiet"] and target.is_stdout):
        with target.open() as stream:
            _write(stream, diff, given["form"])
    return OK


def _measured(base: str, tuned: str, given: dict[str, Any]) -> Diff:
    from ckptdiff.options import MaskRule, Options, SpectraOptions
    from ckptdiff.run.engine import run

    options = Options(
        mask=MaskRule("none"),
        renames=given["renames"],
        include=given["include"],
        exclude=given["exclude"],
        threads=given["threads"],
        max_memory=given["max_memory"],
        device=given["device"],
        gpu_memory=given["gpu_memory"],
        spectra=SpectraOptions(given["spectra"], seed=given["seed"]),
        stream=given["stream"],
    )
    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        return run(base, tuned, options=options, listener=tell)


def _loaded(path: str) -> Diff:
    from ckptdiff.runfile.reader import RunFile

    if Path(path).is_dir() or path.endswith(".safetensors"):
        raise OptionError("one checkpoint alone", file=path, expected="BASE and TUNED, or a run file")
    with RunFile(path) as file:
        diff = file.load()
    if diff.spectra is None:
        raise OptionError(
            "the run file holds no spectra", file=path, hint=f"ckptdiff spectra add {path} --spectra exact"
        )
    return diff


def _write(stream: TextIO, diff: Diff, form: str) -> None:
    from dataclasses import asdict, replace

    from ckptdiff.claims import PUBLISHED, figures_of, judge_claims
    from ckptdiff.claims.published import COLUMNS
    from ckptdiff.report.screen import Column, folded, legend_lines, screen_of, table_lines
    from ckptdiff.report.summary import side_name
    from ckptdiff.report.text import dumps, number, percent, safe

    pair, verdicts = figures_of(diff), judge_claims(diff)
    if form == "json":
        document = {
            "schema": "ckptdiff.claims/1",
            "base": diff.base["path"],
            "tuned": diff.tuned["path"],
            "compare": diff.compare,
            "pair": dict(pair),
            "published": [{"pair": name, **row} for name, row in PUBLISHED.items()],
            "claims": [asdict(verdict) for verdict in verdicts],
        }
        stream.write(dumps(document) + "\n")
        return
    names = [safe(side_name(str(side["path"]))) for side in (diff.base, diff.tuned)]
    rows = {f"{names[0]} -> {names[1]}": pair, **PUBLISHED}
    columns = [Column("pair", list(rows), left=True)]
    for key, title in COLUMNS.items():
        spell = number if key == "stable_rank" else percent
        cells = [spell(row[key]) if row[key] is not None else "" for row in rows.values()]
        columns.append(Column(title, cells, rank=_RANKS.get(key, 0)))
    screen = screen_of(stream)
    if screen.width is None:  # a pipe gets all columns, and names over two lines
        screen = replace(screen, width=_WIDTH)
        columns = [replace(column, rank=0) for column in columns]
    lines = [*table_lines(columns, screen), *legend_lines({"pair": _NOTE}, [columns], screen), ""]
    for verdict in verdicts:
        style = {"shown": "green", "not shown": "yellow"}.get(verdict.outcome, "")
        sentence = verdict.sentence[0].upper() + verdict.sentence[1:]
        wrapped = folded(sentence, min(screen.width or _WIDTH, _WIDTH), indent="  ")
        lines += [screen.paint(line, style) for line in wrapped]
    stream.write("\n".join(lines) + "\n")
