"""``ckptdiff patch``: apply a sparse patch to a checkpoint."""

from __future__ import annotations

from typing import Any

import click

from ckptdiff.cli.display import progress, say, warn
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import progress_option
from ckptdiff.cli.view import verbosity
from ckptdiff.errors import first_few, plural
from ckptdiff.report.text import quantity, safe

_SHOWN = 5


@click.group(short_help="Apply a sparse patch to a checkpoint.")
def patch() -> None:
    """Apply a sparse patch to a checkpoint."""


@patch.command("apply", short_help="Write a checkpoint: a base with a patch applied.")
@click.argument("base", type=click.Path())
@click.argument("patch", type=click.Path(), metavar="PATCH")
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    metavar="OUT",
    required=True,
    help="What to make: F.safetensors if BASE is a single file, else a folder.",
)
@click.option(
    "--force", is_flag=True, show_default="off", help="Take a BASE with other headers than the patch was made for."
)
@progress_option
@verbosity
def apply(base: str, patch: str, out: str, **given: Any) -> int:
    """Write BASE with the values of PATCH set: the same shards, index and headers, and all other bytes as they are.

    PATCH is what ckptdiff mask export --layout patch wrote. OUT must not exist; other files of BASE are not copied.
    """
    from ckptdiff.exports import apply_patch

    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        made = apply_patch(base, patch, out, force=given["force"], listener=tell)
    if given["quiet"]:
        return OK
    warn(made.warnings)
    what = f"{quantity(made.coordinates)} values of {plural(made.tensors, 'tensor')}"
    rule = f"rule {made.rule}, {'as stored' if made.compare == 'stored' else 'in ' + made.compare}"
    say(f"{what} set ({safe(rule)}), written to {safe(out)}")
    if made.left_out:
        others = plural(len(made.left_out), "other file")
        say(f"not copied from {safe(base)}: {others}: {safe(first_few(made.left_out, _SHOWN))}")
    return OK
