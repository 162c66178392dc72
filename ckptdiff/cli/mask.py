"""``ckptdiff mask``: list the masks of a run file, export them, or combine those of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from ckptdiff.cli.display import progress as show_progress
from ckptdiff.cli.display import say, warn
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import progress_option, stream_option
from ckptdiff.cli.target import ReportTarget, output_option
from ckptdiff.cli.view import format_option, verbosity, write_rows
from ckptdiff.errors import OptionError, first_few, plural
from ckptdiff.report.text import percent, quantity, safe, shape_text

if TYPE_CHECKING:
    from ckptdiff.exports import LeftOut

_KEYS = ("name", "shape", "numel", "changed", "density")


@click.group(short_help="List the masks of a run file, export them, or combine those of several.")
def mask() -> None:
    """List the masks of a run file, export them, or combine those of several."""


@mask.command("list", short_help="List the masks and their density.")
@click.argument("run", type=click.Path(), metavar="RUN.h5")
@format_option
@output_option
def list_masks(run: str, **given: Any) -> int:
    """List the masks of a run file: shape, coordinates in the mask, and density (their share)."""
    target = ReportTarget.choose(given["output"], binary=False, kept=[Path(run)])
    from ckptdiff.runfile.reader import RunFile

    with RunFile(run) as file:
        diff = file.load()
        masked = set(file.masks)
    changed, numels = diff.columns["changed"].tolist(), diff.columns["numel"].tolist()
    rows = [
        {
            "name": facts.name,
            "shape": list(facts.shape),
            "numel": numel,
            "changed": count,
            "density": count / numel if numel else None,
        }
        for facts, numel, count in zip(diff.tensors, numels, changed, strict=True)
        if facts.name in masked
    ]
    with target.open() as stream:
        if given["format"] == "table":
            _write_table(stream, rows, diff.mask_rule)
        else:
            whole = {"schema": "ckptdiff.masks/1", "mask_rule": diff.mask_rule, "compare": diff.compare}
            write_rows(stream, given["format"], rows, _KEYS, whole)
    return OK


@mask.command("export", short_help="Write masks for other programs.")
@click.argument("run", type=click.Path(), metavar="RUN.h5")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    metavar="FILE",
    required=True,
    help="What to write: F.safetensors or F.npz; for shira a new folder.",
)
@click.option(
    "--layout",
    type=click.Choice(["bool", "packed", "flat", "coo", "patch", "shira"]),
    default="bool",
    help="bool: one byte a coordinate, in the tensor's shape; packed: one bit, little-endian; flat: row-major "
    "indices of the coordinates in the mask; coo: one row of indices per axis; patch: flat indices and the tuned "
    "values there; shira: a PEFT adapter of the largest changes.",
)
@click.option(
    "--rank",
    type=int,
    metavar="R",
    show_default="none",
    help="For shira: it holds R (m + n) coordinates of an m x n matrix.",
)
@click.option(
    "--base", type=click.Path(), metavar="PATH", show_default="as the run found it", help="The base, for shira."
)
@click.option(
    "--tuned",
    type=click.Path(),
    metavar="PATH",
    show_default="as the run found it",
    help="The tuned checkpoint, for shira and patch.",
)
@stream_option
@progress_option
@verbosity
def export(run: str, names: tuple[str, ...], out: str, layout: str, **given: Any) -> int:
    """Write masks, and for some layouts the changes there, to a file that needs no ckptdiff to be read.

    NAME is a tensor or a glob. By default all masks are written; for shira, those of all matrices that PEFT adapts.
    """
    from ckptdiff.runfile.reader import RunFile

    _require_options(layout, given)
    how = {"shown": given["progress"], "quiet": given["quiet"], "verbose": given["verbose"]}
    missing: list[str] = []
    with RunFile(run) as file, show_progress(**how) as tell:
        if layout == "shira":
            from ckptdiff.exports import export_shira

            sides = {name: given[name] for name in ("rank", "base", "tuned", "stream")}
            adapter = export_shira(file, out, names=names, **sides, listener=tell)
            what = f"{quantity(adapter.coordinates)} coordinates of {plural(adapter.layers, 'layer')}"
            what += f", {percent(adapter.energy)} of their sum d^2 and {percent(adapter.whole)} of the whole update's,"
            missing = _left_out(adapter.left_out)
        elif layout == "patch":
            from ckptdiff.exports import export_patch, missing_from_patch

            changed = export_patch(file, out, names=names, tuned=given["tuned"], stream=given["stream"], listener=tell)
            what = plural(changed, "changed tensor")
            missing = _missing(*missing_from_patch(file, names))
        else:
            from ckptdiff.exports import Layout, export_masks

            count = export_masks(file, out, layout=cast(Layout, layout), names=names, listener=tell)
            what = plural(count, "mask")
    if not given["quiet"]:
        warn(missing)
        say(f"{what} written to {safe(out)}")
    return OK


@mask.command("combine", short_help="Write a run file with the union, intersection or difference of masks.")
@click.argument("runs", nargs=-1, type=click.Path(), metavar="RUN1.h5 RUN2.h5 [...]")
@click.option("--union", is_flag=True, show_default="off", help="Coordinates in any of the masks.")
@click.option("--intersect", is_flag=True, show_default="off", help="Coordinates in all of them.")
@click.option("--minus", is_flag=True, show_default="off", help="Coordinates in the first and in none of the others.")
@click.option("-o", "--out", type=click.Path(), metavar="RUN.h5", required=True, help="The run file to write.")
@click.option("--force", is_flag=True, show_default="off", help="Combine runs of different bases too.")
@progress_option
@verbosity
def combine(
    runs: tuple[str, ...], out: str, force: bool, progress: bool, quiet: bool, verbose: bool, **operations: bool
) -> int:
    """Write a run file with combined masks, to train with.

    In all but its masks it is the first run: its figures are of that run's update.
    """
    chosen = [name for name, given in operations.items() if given]
    if len(chosen) != 1:
        raise OptionError(
            "how are the masks to be combined?",
            expected="one of --union, --intersect and --minus",
            found=" and ".join(f"--{name}" for name in chosen) or None,
        )
    from ckptdiff.overlap import Operation, combine_masks

    with show_progress(shown=progress, quiet=quiet, verbose=verbose) as tell:
        diff = combine_masks(cast(Operation, chosen[0]), runs, out, force=force, listener=tell)
    if quiet:
        return OK
    warn(diff.warnings)
    changed, numel = (int(diff.columns[key].sum()) for key in ("changed", "numel"))
    share = f", {percent(changed / numel)} of {quantity(numel)} values," if numel else ""
    say(f"{plural(len(diff.tensors), 'mask')}{share} written to {safe(out)}")
    return OK


def _missing(changed: int, tensors: int, retyped: int) -> list[str]:
    """Warnings of what a patch lacks."""
    found = []
    if changed:
        all_of_them = "ckptdiff diff --compare stored --mask bitwise takes all"
        found.append(f"{quantity(changed)} values changed but are not in the patch; {all_of_them}")
    if tensors:
        what = "without a counterpart of its shape in the base: not in the patch"
        found.append(f"{plural(tensors, 'tensor')} of the tuned checkpoint {what}")
    if retyped:
        what = "in another dtype than the base's: ckptdiff patch apply refuses the patch"
        found.append(f"{plural(retyped, 'tensor')} {what}")
    return found


def _left_out(tensors: Sequence[LeftOut]) -> list[str]:
    """Warnings of what an adapter lacks, for each reason one, largest shares first."""
    by_reason: dict[str, list[LeftOut]] = {}
    for tensor in tensors:
        by_reason.setdefault(tensor.reason, []).append(tensor)
    shares = {reason: sum(tensor.share for tensor in found) for reason, found in by_reason.items()}
    return [
        f"left out, {percent(shares[reason])} of the update: {plural(len(by_reason[reason]), 'tensor')} "
        f"({reason}): {safe(first_few(tensor.name for tensor in by_reason[reason]))}"
        for reason in sorted(shares, key=lambda reason: -shares[reason])
    ]


def _require_options(layout: str, given: dict[str, Any]) -> None:
    meaningful = {"shira": {"rank", "base", "tuned"}, "patch": {"tuned"}}.get(layout, set())
    for name in ("rank", "base", "tuned"):
        if given[name] is not None and name not in meaningful:
            raise OptionError(f"--{name} means nothing for --layout {layout}")
    if layout == "shira" and given["rank"] is None:
        raise OptionError("--layout shira needs --rank", hint="--rank 32 takes as many values as a LoRA of rank 32")


def _write_table(stream: TextIO, rows: list[dict[str, Any]], rule: str) -> None:
    from ckptdiff.report.screen import Column, screen_of, table_lines

    columns = [
        Column("tensor", [safe(row["name"]) or '""' for row in rows], left=True),
        Column("shape", [shape_text(tuple(row["shape"])) for row in rows], rank=2),
        Column("values", [quantity(row["numel"]) for row in rows], rank=1),
        Column("in mask", [f"{row['changed']:,}" for row in rows]),
        Column("density", [percent(row["density"]) for row in rows]),
    ]
    lines = table_lines(columns, screen_of(stream)) if rows else []
    numel, changed = (sum(row[key] for row in rows) for key in ("numel", "changed"))
    share = f", {percent(changed / numel)} of {quantity(numel)} values" if numel else ""
    lines.append(f"{plural(len(rows), 'mask')} by the rule {safe(rule)}{share}")
    stream.write("\n".join(lines) + "\n")
