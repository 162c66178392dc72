"""``ckptdiff inspect``: list the tensors of a checkpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TextIO

import click

from ckptdiff.cli.display import progress, warn
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import progress_option
from ckptdiff.cli.target import ReportTarget, files_of, output_option
from ckptdiff.cli.view import format_option, write_rows
from ckptdiff.errors import OptionError, first_few, plural
from ckptdiff.report.text import quantity, safe, shape_text, size

if TYPE_CHECKING:
    from ckptdiff.checkpoint import Place, TensorInfo

_KEYS = ("name", "dtype", "shape", "numel", "bytes", "tower", "layer", "module_type", "block", "shard")


@click.command(short_help="List the tensors of a checkpoint.")
@click.argument("checkpoint", type=click.Path())
@format_option
@click.option(
    "--include", multiple=True, metavar="GLOB", show_default="all", help="List only names that match. Repeatable."
)
@click.option(
    "--exclude", multiple=True, metavar="GLOB", show_default="none", help="Leave out names that match. Repeatable."
)
@click.option(
    "--hash",
    "hashed",
    is_flag=True,
    show_default="off",
    help="Read the tensors too, and print XXH3-128 of each one and of all that are listed, which depends on names, "
    "dtypes, shapes and bytes, and not on the files they lie in. Needs xxhash.",
)
@output_option
@progress_option
def inspect(checkpoint: str, **given: Any) -> int:
    """List the tensors of a checkpoint: dtype, shape, bytes, module type, layer and shard.

    Only headers are read, and every one of them is validated.

    \b
      ckptdiff inspect model/
      ckptdiff inspect model/ --hash --format json | jq -r .hash
    """  # noqa: D301
    target = ReportTarget.choose(given["output"], binary=False, kept=files_of(checkpoint))
    from ckptdiff.checkpoint import locate_all, open_checkpoint
    from ckptdiff.checkpoint.content_hash import content_hashes, hash_of_all, require_xxhash
    from ckptdiff.checkpoint.globs import Globs

    if given["hashed"]:
        require_xxhash()
    opened = open_checkpoint(checkpoint, stream=True)  # for the headers nothing need be downloaded
    globs = Globs(given["include"], given["exclude"])
    warn((*opened.warnings, *globs.unmatched(opened.tensors)))
    chosen = [tensor for tensor in opened.tensors.values() if globs.select(tensor.name)]
    if opened.tensors and not chosen:
        raise OptionError("no tensor is left to list", file=opened.path, hint="check --include and --exclude")
    places = locate_all({name: tensor.shape for name, tensor in opened.tensors.items()})
    rows = [_row(tensor, places[tensor.name]) for tensor in chosen]
    totals = {
        "path": opened.path,
        "shards": len({name for tensor in chosen for name in _files(tensor)}),
        "tensors_listed": len(rows),
        "numel": sum(row["numel"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
    }
    keys: tuple[str, ...] = _KEYS
    if given["hashed"]:
        with progress(shown=given["progress"], quiet=False) as tell:
            hashes = content_hashes(chosen, listener=tell)
        rows = [{**row, "hash": hashes[row["name"]]} for row in rows]
        totals["hash"], keys = hash_of_all(hashes.values()), (*_KEYS, "hash")
    with target.open() as stream:
        if given["format"] == "table":
            _write_table(stream, rows, totals)
        else:
            write_rows(stream, given["format"], rows, keys, {"schema": "ckptdiff.inspect/1", **totals})
    return OK


def _row(tensor: TensorInfo, place: Place) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "numel": tensor.numel,
        "bytes": tensor.nbytes,
        "tower": place.tower,
        "layer": place.layer,
        "module_type": place.module_type,
        "block": place.block,
        "shard": first_few(_files(tensor)),
    }


def _files(tensor: TensorInfo) -> list[str]:
    """Names of the files that store it."""
    shards = [one.shard for one in tensor.slices] or [tensor.shard]
    return sorted({os.path.basename(shard.path) for shard in shards})  # noqa: PTH119


def _write_table(stream: TextIO, rows: list[dict[str, Any]], totals: dict[str, Any]) -> None:
    from ckptdiff.report.screen import Column, screen_of, table_lines

    columns = [
        Column("tensor", [safe(row["name"]) or '""' for row in rows], left=True),
        Column("dtype", [row["dtype"] for row in rows], left=True),
        Column("shape", [shape_text(tuple(row["shape"])) for row in rows]),
        Column("size", [size(row["bytes"]) for row in rows], rank=1),
        Column("module", [row["module_type"] for row in rows], left=True, rank=2),
        Column("layer", ["" if row["layer"] is None else str(row["layer"]) for row in rows], rank=2),
        Column("xxh3-128", [row.get("hash", "") for row in rows], left=True),
        Column(
            "shard", [safe(row["shard"]) for row in rows] if totals["shards"] > 1 else [""] * len(rows), True, rank=3
        ),
    ]
    dtypes: dict[str, int] = {}
    for row in rows:
        dtypes[row["dtype"]] = dtypes.get(row["dtype"], 0) + row["numel"]
    lines = table_lines(columns, screen_of(stream)) if rows else []
    parts = ", ".join(f"{dtype} {quantity(numel)}" for dtype, numel in dtypes.items())
    lines.append(
        f"{plural(len(rows), 'tensor')} in {plural(totals['shards'], 'shard')}, {quantity(totals['numel'])} values, "
        f"{size(totals['bytes'])}" + (f" ({parts})" if parts else "")
    )
    if "hash" in totals:
        lines.append(f"xxh3-128 of all that is listed: {totals['hash']}")
    stream.write("\n".join(lines) + "\n")
