"""``ckptdiff track``: follow an update through the checkpoints of a training run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from ckptdiff.cli.display import progress, say, warn
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import progress_option, stream_option, threads_option
from ckptdiff.cli.patch_formats import format_options, options_of
from ckptdiff.cli.target import ReportTarget, files_of, output_option
from ckptdiff.cli.view import format_option, verbosity, write_rows
from ckptdiff.errors import OptionError, plural
from ckptdiff.figures.members import LABEL_KEYS
from ckptdiff.report.text import dumps, number, percent, quantity, safe, size
from ckptdiff.runfile.schema import HDF5_SIGNATURE

if TYPE_CHECKING:
    from ckptdiff.options import Compare
    from ckptdiff.report.screen import Column
    from ckptdiff.track import Track

_BY = ("all", "tensor", "module", "layer", "block")
_MEANINGS = {
    "support": "support: part that differs from the base.",
    "new": "new: never did before.",
    "returned": "returned: did, but not one step ago.",
    "reverted": "reverted: back at the base.",
    "churned": "churned: was in the support, and has another value.",
    "union": "union: part that ever differed.",
    "update": "update: norm of d / norm of the base.",
    "length": "length: norm of W less W one step ago / norm of the base.",
    "turn": "turn: cosine between this step and the one before.",
    "rank 1": "rank 1: part of the path so far that lies in its best single direction.",
    "line": "line: R² of the straight line nearest to the path so far.",
    "left": "left: overlap of the leading 16 left singular vectors of the update with those of one step ago.",
    "right": "right: of the right ones.",
    "chance": "chance: overlap of random subspaces.",
    "walk": "walk: the same of a random walk with steps of these lengths.",
}


@click.command(short_help="Follow an update through the checkpoints of a training run.")
@click.argument("base", type=click.Path(), metavar="BASE|TRACK.h5")
@click.argument("steps", nargs=-1, type=click.Path(), metavar="[STEP]...")
@click.option(
    "-o", "--out", type=click.Path(), metavar="TRACK.h5", show_default="none", help="Keep the figures of each tensor."
)
@click.option("--by", type=click.Choice(_BY), default="all", help="What the rows stand for, at each step.")
@click.option(
    "--compare",
    type=click.Choice(["bf16", "stored"]),
    default="bf16",
    help="Cast to bfloat16 first, or compare stored values.",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", show_default="all", help="Follow only names that match. Repeatable."
)
@click.option(
    "--exclude", multiple=True, metavar="GLOB", show_default="none", help="Leave out names that match. Repeatable."
)
@click.option(
    "--gram",
    is_flag=True,
    show_default="off",
    help="Also tell which way the update went: cosines between steps, and how straight its path is.",
)
@click.option(
    "--spectra",
    is_flag=True,
    show_default="off",
    help="Also tell how far the leading singular subspaces of each matrix's update stay the same.",
)
@click.option(
    "--patches",
    type=click.Path(),
    metavar="DIR",
    show_default="none",
    help="Also make, in this new folder, the exact patch from each checkpoint to the next, of the same reads.",
)
@click.option(
    "--patch-format",
    type=click.Choice(["ckptdelta", "delta-dir", "flat"]),
    default="ckptdelta",
    help="Their format, as ckptdiff patch make --format.",
)
@format_options
@click.option("--version", type=int, metavar="N", show_default="1", help="Of the first delta-dir.")
@stream_option
@threads_option
@format_option
@output_option
@progress_option
@verbosity
def track(base: str, steps: tuple[str, ...], **given: Any) -> int:
    """Follow an update from BASE through each STEP, in order, reading every checkpoint once.

    Support are the coordinates that differ from the base, union those that ever did. What moved since the step before
    is new (it never did before), returned (it did, but not one step ago), reverted (it is back at the base) or churned
    (it was in the support and has another value now). A TRACK.h5 alone is printed again, as it is.

    With --patches, ckptdiff patch apply BASE DIR/* makes the last STEP of BASE, byte for byte.
    """
    out = None if given["out"] is None else Path(given["out"])
    kept = [*(file for path in (base, *steps) for file in files_of(path)), *([] if out is None else [out])]
    target = ReportTarget.choose(given["output"], binary=False, kept=kept)
    found = _found(base, steps, out, given)
    if not given["quiet"]:
        warn(found.warnings)
    elif target.is_stdout:
        return OK
    with target.open() as stream:
        if given["format"] == "json":
            stream.write(dumps(found.as_json()) + "\n")
        elif given["format"] == "table":
            _write_tables(stream, found, given["by"])
            kept_in = given["out"] or (None if steps else base)
            if kept_in is not None:
                stream.write(f"pictures: ckptdiff report {safe(shlex.quote(kept_in))}\n")
        else:
            rows = [
                {"step": step, "path": found.steps[step], **label, **row}
                for label, rows in _grouped(found, given["by"])
                for step, row in enumerate(rows)
            ]
            write_rows(
                stream, given["format"], rows, ("step", "path", *LABEL_KEYS.get(given["by"], ()), *found.figures), {}
            )
    return OK


def _found(base: str, steps: tuple[str, ...], out: Path | None, given: dict[str, Any]) -> Track:
    if not steps and _is_hdf5(base):
        from ckptdiff.track import load_track

        _refuse_options(base)
        return load_track(base)
    from ckptdiff.checkpoint import open_checkpoint
    from ckptdiff.runfile.check_target import TRACK_FORMAT, check_target
    from ckptdiff.track import save_track
    from ckptdiff.track import track as follow

    if out is not None:
        if given["patches"] is not None and os.path.realpath(out) == os.path.realpath(given["patches"]):
            raise OptionError("the track file and the folder of patches have one name", file=out)
        shards = [shard for path in (base, *steps) for shard in open_checkpoint(path, given["stream"]).shards]
        check_target(out, [(shard.path, shard.device, shard.inode) for shard in shards], TRACK_FORMAT)
    patch_options = options_of(given["patch_format"], given, "--patch-format")
    if given["patches"] is None and (patch_options or given["patch_format"] != "ckptdelta"):
        raise OptionError("which patches are to be made is not said", expected="--patches DIR")
    compare: Compare = given["compare"]
    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        found = follow(
            base,
            steps,
            compare=compare,
            include=given["include"],
            exclude=given["exclude"],
            gram=given["gram"],
            spectra=given["spectra"],
            threads=given["threads"],
            patches=given["patches"],
            patch_format=given["patch_format"],
            patch_options=patch_options,
            listener=tell,
            stream=given["stream"],
        )
    if out is not None:
        save_track(found, out)
    if given["patches"] is not None and not given["quiet"]:
        made = sum(file.stat().st_size for file in Path(given["patches"]).rglob("*") if file.is_file())
        say(f"{plural(len(steps), 'patch', 'patches')} written to {safe(given['patches'])}: {size(made)}")
    return found


_OF_PATCHES = "patch_format", "encoding", "checksum", "level", "dense_rest", "version"


def _refuse_options(path: str) -> None:
    """A track file says what it says: nothing is read or chosen again."""
    context = click.get_current_context()
    for name in ("out", "compare", "include", "exclude", "gram", "spectra", "patches", *_OF_PATCHES):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise OptionError(
                f"--{name.replace('_', '-')} means nothing for a track file, which is only printed again",
                file=path,
                expected="a base checkpoint and later ones to follow",
            )


def _is_hdf5(path: str) -> bool:
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE


def _grouped(found: Track, by: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    return [({}, found.overall())] if by == "all" else found.grouped(by)


def _write_tables(stream: TextIO, found: Track, by: str) -> None:
    from ckptdiff.report.plot import plot_lines
    from ckptdiff.report.screen import legend_lines, screen_of, table_lines

    screen = screen_of(stream)
    overall = found.overall()
    numel = overall[0]["numel"]
    lines = [f"{safe(found.base)}: {quantity(numel)} values, compared as {found.compare}", ""]
    for label, rows in _grouped(found, by):
        lines += [
            *([f"{safe(' '.join(map(str, label.values())))}"] if label else []),
            *table_lines(_columns(found, rows), screen),
            "",
            *(table_lines(columns, screen) if (columns := _direction_columns(found, rows)) else []),
            *([""] if columns else []),
        ]
    shares = {
        "differs from the base": [row["support_fraction"] or 0.0 for row in overall],
        "ever did": [row["union_fraction"] or 0.0 for row in overall],
    }
    if lines[-1] == "":
        lines.pop()
    tables = [_columns(found, overall), _direction_columns(found, overall)]
    lines += [*legend_lines(_MEANINGS, [columns for columns in tables if columns], screen), ""]
    if len(overall) > 1:  # one step is a line from zero, which shows nothing
        lines += plot_lines({name: [0.0, *values] for name, values in shares.items()}, screen)
    stream.write("\n".join(lines).rstrip() + "\n")


def _columns(found: Track, rows: list[dict[str, Any]]) -> list[Column]:
    from ckptdiff.report.screen import Column

    return [
        Column("step", [safe(name) for name in _labels(found.steps)], left=True),
        Column("support", [percent(row["support_fraction"]) for row in rows], style="bold"),
        *(
            Column(title, [quantity(row[key]) for row in rows], rank=rank)
            for title, key, rank in (
                ("new", "touched", 0),
                ("returned", "returned", 2),
                ("reverted", "reverted", 1),
                ("churned", "churned", 1),
            )
        ),
        Column("union", [percent(row["union_fraction"]) for row in rows]),
        Column("update", [percent(row["rel_norm"]) for row in rows]),
    ]


def _direction_columns(found: Track, rows: list[dict[str, Any]]) -> list[Column]:
    """Columns of a second table, of which way the update went; none if that was not measured."""
    from ckptdiff.report.screen import Column

    columns: list[Column] = []
    if found.products is not None:
        columns += [
            Column("length", [percent(row["step_rel_norm"]) for row in rows], style="bold"),
            Column("turn", [number(row["step_cosine"]) for row in rows], style="bold"),
        ]
    titles = {"rank1_share": "rank 1", "line_r2": "line"} if columns else {}
    titles |= {} if found.locking is None else {"left_overlap": "left", "right_overlap": "right"}
    for key, title in titles.items():
        null = "chance" if key.endswith("overlap") else "walk"
        columns.append(Column(title, [percent(row[key]) for row in rows], style="bold"))
        columns.append(Column(null, [percent(row[f"{key}_null"]) for row in rows], style="dim", rank=1))
    labels = [safe(name) for name in _labels(found.steps)]
    return [Column("step", labels, left=True), *columns] if columns else []


def _labels(paths: Sequence[str]) -> list[str]:
    """The part of each path that tells it from the others: what all end with is left out, then all but the end."""
    parts = [Path(os.path.normpath(path)).parts for path in paths]
    while len({*parts}) > 1 and len({path[-1:] for path in parts}) == 1:
        parts = [path[:-1] for path in parts]
    kept = 1
    while kept < max(map(len, parts)) and len({path[-kept:] for path in parts}) < len({*parts}):
        kept += 1
    return [os.path.join(*path[-kept:]) if path else "." for path in parts]  # noqa: PTH118
