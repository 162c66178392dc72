"""``ckptdiff overlap``: compare the masks of several runs with each other and with chance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from ckptdiff.cli.display import progress, warn
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import progress_option, stream_option, threads_option
from ckptdiff.cli.target import ReportTarget, output_option
from ckptdiff.cli.view import format_option, verbosity, write_rows
from ckptdiff.errors import plural
from ckptdiff.figures.members import GROUPINGS, LABEL_KEYS
from ckptdiff.report.text import dumps, number, percent, quantity, safe

if TYPE_CHECKING:
    from ckptdiff.figures.members import GroupBy
    from ckptdiff.overlap import Overlap, PairCounts

_MEANINGS = {
    "o1": "o1: share of the first mask that is in the second.",
    "o2": "o2: the reverse.",
    "outside": "outside: Jaccard of what the masks leave out.",
    "chance": "chance: of independent masks.",
    "by tensor": "by tensor: independent within each tensor.",
    "by size": "by size: independent among weights of the same magnitude.",
    "cosine": "cosine: between the two updates, as vectors of all values.",
    "signs": "signs: how far from 0 the cosine would be if the sign of each change were tossed (standard deviation).",
}
_CHANCES = (("independent", "chance"), ("stratified", "by tensor"), ("conditional", "by size"))
_COUNTS = ("numel", "masked_1", "masked_2", "masked_both")


@click.command(short_help="Compare the masks of several runs with each other and with chance.")
@click.argument("runs", nargs=-1, type=click.Path(), metavar="RUN1.h5 RUN2.h5 [...]")
@click.option(
    "--by",
    type=click.Choice(GROUPINGS),
    default="block",
    help="What the rows stand for; group: the groups of the first run (ckptdiff diff --group).",
)
@click.option(
    "--base",
    type=click.Path(),
    metavar="PATH",
    show_default="the histograms of the runs, if their masks are bitwise",
    help="Read this base checkpoint for the baseline that is conditional on the magnitude of weights.",
)
@click.option(
    "--values",
    is_flag=True,
    show_default="off",
    help="Also read the checkpoints, for the cosine between the updates of each two runs.",
)
@click.option(
    "--tuned",
    multiple=True,
    type=click.Path(),
    metavar="PATH",
    show_default="where the runs found them",
    help="Where a tuned checkpoint is now, for --values: one for each run, in their order.",
)
@click.option("--force", is_flag=True, show_default="off", help="Compare runs of different bases too.")
@stream_option
@threads_option
@format_option
@output_option
@progress_option
@verbosity
def overlap(runs: tuple[str, ...], **given: Any) -> int:
    """Compare the masks of runs that start from the same base, each two of them.

    o1 is the share of the first mask that is in the second, o2 the reverse, Jaccard their intersection over their
    union, outside the same of what the masks leave out. Beside each stand three kinds of chance: masks that are
    independent everywhere, independent within each tensor, and independent among weights of the same magnitude, since
    updates meet on small weights by rounding alone. With --values, the cosine tells whether both move the weights the
    same way.
    """
    target = ReportTarget.choose(given["output"], binary=False, kept=map(Path, runs))
    from ckptdiff.overlap import overlap as count_overlap
    from ckptdiff.overlap.figures import COSINE_FIGURES, OVERLAP_FIGURES

    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        found = count_overlap(
            runs,
            base=given["base"],
            values=given["values"],
            tuned=given["tuned"],
            force=given["force"],
            threads=given["threads"],
            stream=given["stream"],
            listener=tell,
        )
    if not given["quiet"]:
        warn(found.warnings)
    elif target.is_stdout:
        return OK
    with target.open() as stream:
        if given["format"] == "table":
            for pair in found.pairs:
                _write_table(stream, found, pair, given["by"])
        elif given["format"] == "json":
            stream.write(dumps(found.as_json()) + "\n")
        else:
            keys = ("first", "second", *LABEL_KEYS[given["by"]], *_COUNTS, *OVERLAP_FIGURES)
            keys += COSINE_FIGURES if given["values"] else ()
            rows = [
                {"first": found.runs[pair.first], "second": found.runs[pair.second], **row}
                for pair in found.pairs
                for row in found.grouped(pair, given["by"])
            ]
            write_rows(stream, given["format"], rows, keys, {})
    return OK


def _write_table(stream: TextIO, found: Overlap, pair: PairCounts, by: GroupBy) -> None:
    from ckptdiff.report.rows import labels
    from ckptdiff.report.screen import Column, legend_lines, screen_of, table_lines

    rows = found.grouped(pair, by)
    names = [*labels(rows, by), "all"]
    rows.append(found.overall(pair))
    columns = [
        Column(by, names, left=True),
        Column("values", [quantity(row["numel"]) for row in rows], rank=4),
        Column("in first", [percent(row["masked_1"] / row["numel"]) if row["numel"] else "" for row in rows], rank=2),
        Column("in second", [percent(row["masked_2"] / row["numel"]) if row["numel"] else "" for row in rows], rank=2),
    ]
    for figure, title, rank in (
        ("o1", "o1", 0),
        ("o2", "o2", 1),
        ("jaccard", "Jaccard", 3),
        ("zero_jaccard", "outside", 5),
    ):
        columns.append(Column(title, [percent(row[figure]) for row in rows], style="bold", rank=rank))
        for baseline, short in _CHANCES if figure != "zero_jaccard" else _CHANCES[:1]:
            known = any(row[f"{figure}_{baseline}"] is not None for row in rows)
            cells = [percent(row[f"{figure}_{baseline}"]) if known else "" for row in rows]
            columns.append(Column(short, cells, style="dim", rank=rank or int(baseline != "independent")))
    if found.products is not None:
        columns.append(Column("cosine", [number(row["cosine"]) for row in rows], style="bold"))
        columns.append(Column("signs", [number(row["cosine_null_sd"]) for row in rows], style="dim", rank=1))
    runs = [f"{safe(found.runs[run])} ({safe(found.rules[run])})" for run in (pair.first, pair.second)]
    screen = screen_of(stream)
    lines = [
        f"{runs[0]} and {runs[1]}, {plural(len(found.tensors), 'tensor')}",
        *table_lines(columns, screen),
        *legend_lines(_MEANINGS, [columns], screen),
    ]
    if by == "group" and len(rows) == 1:
        lines.append("The first run has no groups; --group NAME=REGEX of ckptdiff diff makes them.")
    if rows[-1]["o1"] is not None and rows[-1]["o1_conditional"] is None:
        lines.append("No chance by size: these masks are not bitwise, so that --base PATH has to name the base for it.")
    stream.write("\n".join(lines) + "\n")
