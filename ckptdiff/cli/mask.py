"""``ckptdiff mask``: list the masks of a run file, or export them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, TextIO

import click

from ckptdiff.cli.failures import OK
from ckptdiff.cli.listing import format_option, output_option, write_rows
from ckptdiff.cli.target import ReportTarget
from ckptdiff.report.text import percent, plural, quantity, safe, shape_text

__all__ = ["mask"]

_KEYS = ("name", "shape", "numel", "changed", "density")


@click.group(short_help="List the masks of a run file, or export them.")
def mask() -> None:
    """List the masks of a run file, or export them."""


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


@mask.command("export", short_help="Write masks to a safetensors or npz file.")
@click.argument("run", type=click.Path(), metavar="RUN.h5")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "-o", "--out", type=click.Path(), metavar="FILE", required=True, help="The file: F.safetensors or F.npz. Required."
)
@click.option(
    "--layout",
    type=click.Choice(["bool", "packed", "flat"]),
    default="bool",
    help="bool: one byte a coordinate, in the tensor's shape; packed: one bit, little-endian; "
    "flat: row-major indices of the coordinates in the mask.",
)
def export(run: str, names: tuple[str, ...], out: str, layout: Literal["bool", "packed", "flat"]) -> int:
    """Write masks to a file that needs no ckptdiff to be read.

    NAME is a tensor or a glob; all masks by default.
    """
    from ckptdiff.runfile.export import export_masks
    from ckptdiff.runfile.reader import RunFile

    with RunFile(run) as file:
        count = export_masks(file, Path(out), layout=layout, names=names)
    print(f"ckptdiff: {plural(count, 'mask')} written to {safe(out)}", file=sys.stderr)
    return OK


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
