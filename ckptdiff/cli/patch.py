"""``ckptdiff patch``: exact deltas of checkpoints, and sparse patches of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ckptdiff.cli.display import progress, say, warn
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import progress_option, stream_option, threads_option
from ckptdiff.cli.patch_formats import format_options, options_of
from ckptdiff.cli.target import ReportTarget, output_option
from ckptdiff.cli.view import verbosity
from ckptdiff.errors import OptionError, first_few, plural
from ckptdiff.report.text import dumps, percent, quantity, safe, size

if TYPE_CHECKING:
    from ckptdiff.patch import AppliedDelta, PatchContents, ShippedContents

_SHOWN = 5


@click.group(short_help="Make, apply, verify and join exact weight deltas.")
def patch() -> None:
    """Make, apply, verify and join exact weight deltas.

    A patch holds what makes one checkpoint of another, to the last bit: which codes changed, and by how many steps.
    """


@patch.command("make", short_help="Write what makes TUNED of BASE.")
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option("-o", "--out", type=click.Path(), metavar="OUT", required=True, help="The patch to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["ckptdelta", "delta-dir", "flat"]),
    default="ckptdelta",
    show_default=True,
    help="Our own, which is the smallest and says everything; a directory that SGLang's /pull_weights applies; or a "
    "safetensors file of flat indices and values, as vLLM and verl take them.",
)
@format_options
@click.option("--version", type=int, metavar="N", show_default="the one in OUT's name, or 1", help="Of a delta-dir.")
@click.option(
    "--base-version", type=int, metavar="M", show_default="N - 1", help="Of a delta-dir. 0 is the checkpoint."
)
@threads_option
@progress_option
@verbosity
def make(base: str, tuned: str, out: str, kind: str, **given: Any) -> int:
    r"""Write what makes TUNED of BASE, in one pass over both: every tensor, of any dtype, to the last bit.

    \b
    Examples:
      ckptdiff patch make base/ step-100/ -o step-100.ckptdelta
      ckptdiff patch make step-1/ step-2/ -o updates/weight_v000002 --format delta-dir
    """
    from ckptdiff.patch import make as make_patch

    own = options_of(kind, given)
    if kind != "ckptdelta":
        return _ship(base, tuned, out, kind, own, **given)
    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        made = make_patch(base, tuned, out, threads=given["threads"], listener=tell)
    if given["quiet"]:
        return OK
    warn(made.warnings)
    dense = sum(one.size for one in made.delta.files)
    kept = [one for one in made.delta.tensors.values() if one.state != "lost"]
    changed, values = sum(one.changed for one in kept), sum(one.codes for one in kept)
    say(f"{quantity(changed)} of {quantity(values)} values changed ({percent(changed / values if values else 0.0)})")
    say(f"written to {safe(out)}: {size(made.size)}, {percent(made.size / dense)} of the checkpoint")
    if made.size >= dense:
        say("warning: the patch is not smaller than the checkpoint")
    return OK


def _ship(base: str, tuned: str, out: str, kind: str, own: dict[str, Any], **given: Any) -> int:
    """Write a patch in a format of serving engines."""
    from ckptdiff.patch import make_directory, make_flat

    write = make_flat if kind == "flat" else make_directory
    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        made = write(base, tuned, out, **own, threads=given["threads"], listener=tell)
    if given["quiet"]:
        return OK
    warn(made.warnings)
    values = percent(made.changed / made.values if made.values else 0.0)
    in_bytes = percent(made.changed_bytes / made.dense if made.dense else 0.0)
    say(f"{quantity(made.changed)} of {quantity(made.values)} values changed ({values}; of bytes {in_bytes})")
    say(
        f"written to {safe(out)}: {plural(made.changed_tensors, 'tensor')} in {plural(made.files, 'file')}, "
        f"{size(made.size)}, {percent(made.size / made.dense if made.dense else 0.0)} of the checkpoint"
    )
    if made.size >= made.dense:
        say("warning: the patch is not smaller than the checkpoint")
    return OK


@patch.command("apply", short_help="Write the checkpoint that patches make of a base.")
@click.argument("base", type=click.Path())
@click.argument("patches", nargs=-1, required=True, type=click.Path(), metavar="PATCH [PATCH ...]")
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    metavar="OUT",
    show_default="none, with --in-place",
    help="What to make: F.safetensors if the result is a single file, else a folder.",
)
@click.option(
    "--in-place",
    is_flag=True,
    show_default="off",
    help="Let the result take the place of BASE, file by file. The same command goes on where a killed one stopped.",
)
@click.option(
    "--with-files",
    is_flag=True,
    show_default="off",
    help="Also link, or copy, what else lies in BASE's folder: configuration, tokenizer.",
)
@click.option(
    "--force",
    is_flag=True,
    show_default="off",
    help="Take a BASE with other headers than a patch of a mask was made for.",
)
@stream_option
@threads_option
@progress_option
@verbosity
def apply(base: str, patches: Sequence[str], **given: Any) -> int:
    r"""Write what PATCHes, in the order in which they were made, make of BASE. OUT must not exist.

    Digests tell whether BASE is the one that the first was made for and whether each follows the one before; nothing
    takes its name before its own digests are right. A patch of a mask (ckptdiff mask export --layout patch) is applied
    alone, and knows its base by its headers.

    \b
    Examples:
      ckptdiff patch apply base/ step-100.ckptdelta step-200.ckptdelta -o step-200/
      ckptdiff patch apply serving/ step-200.ckptdelta --in-place
    """
    from ckptdiff.patch.opening import patch_kind

    if (given["out"] is None) != given["in_place"]:
        raise OptionError(
            "where the result goes is not clear", expected="-o OUT or --in-place, and not both", hint="-o OUT"
        )
    if len(patches) == 1 and patch_kind(patches[0]) == "mask":
        return _apply_mask(base, patches[0], **given)
    if given["force"]:
        raise OptionError("--force is for patches of masks", found="an exact patch, which fits one base alone")
    from ckptdiff.patch import apply as apply_patches
    from ckptdiff.patch import apply_in_place

    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        if given["in_place"]:
            made = apply_in_place(base, patches, threads=given["threads"], listener=tell)
        else:
            made = apply_patches(
                base,
                patches,
                given["out"],
                with_files=given["with_files"],
                threads=given["threads"],
                stream=given["stream"],
                listener=tell,
            )
    if not given["quiet"]:
        warn(made.warnings)
        say(f"{_counts(made)}, written to {safe(given['out'] or base)}")
        _say_left_out(base, made.left_out)
    return OK


@patch.command("verify", short_help="Check that patches fit a base, and lead to TUNED.")
@click.argument("base", type=click.Path())
@click.argument("patches", nargs=-1, required=True, type=click.Path(), metavar="PATCH [PATCH ...]")
@click.option(
    "--tuned", type=click.Path(), metavar="TUNED", show_default="none", help="Compare the result with this checkpoint."
)
@stream_option
@threads_option
@progress_option
@verbosity
def verify(base: str, patches: Sequence[str], **given: Any) -> int:
    """Do all that ckptdiff patch apply does, digests included, but write nothing."""
    from ckptdiff.patch import verify as verify_patches

    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        made = verify_patches(
            base, patches, given["tuned"], threads=given["threads"], stream=given["stream"], listener=tell
        )
    if not given["quiet"]:
        warn(made.warnings)
        with_tuned = "" if given["tuned"] is None else f", and is {safe(given['tuned'])}"
        say(f"{_counts(made)}; every digest is right{with_tuned}")
    return OK


@patch.command("squash", short_help="Make one patch of several.")
@click.argument("patches", nargs=-1, required=True, type=click.Path(), metavar="PATCH PATCH [...]")
@click.option("-o", "--out", type=click.Path(), metavar="OUT", required=True, help="The patch to write.")
@progress_option
@verbosity
def squash(patches: Sequence[str], out: str, **given: Any) -> int:
    """Make one patch of several that follow each other. No checkpoint is read."""
    from ckptdiff.patch import squash as squash_patches

    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        delta = squash_patches(patches, out, listener=tell)
    if not given["quiet"]:
        changed = sum(one.changed for one in delta.tensors.values())
        say(f"{plural(len(patches), 'patch', 'patches')} made one of {quantity(changed)} values, in {safe(out)}")
    return OK


@patch.command("info", short_help="Say what is in a patch.")
@click.argument("path", type=click.Path(), metavar="PATCH")
@click.option("--format", type=click.Choice(["text", "json"]), default="text", help="Format of the output.")
@output_option
@verbosity
def info(path: str, **given: Any) -> int:
    """Say what is in a patch: how much changes, where, and what it takes beside the checkpoint."""
    from pathlib import Path

    from ckptdiff.patch import ShippedContents, contents_of, contents_of_flat, contents_of_folder
    from ckptdiff.patch.opening import patch_kind

    target = ReportTarget.choose(given["output"], binary=False, kept=[Path(path)])
    kind = patch_kind(path)
    found: PatchContents | ShippedContents
    if kind in ("folder", "flat"):
        found = contents_of_folder(path) if kind == "folder" else contents_of_flat(path)
    else:
        found = contents_of(path)
    if not given["quiet"]:
        warn(found.warnings)
    with target.open() as stream:
        if given["format"] == "json":
            stream.write(dumps({**asdict(found), "warnings": list(found.warnings)}) + "\n")
        else:
            lines = _shipped_lines(found) if isinstance(found, ShippedContents) else _lines(found)
            stream.write("\n".join([*lines, f"identity    {found.identity}", "", *_module_lines(found)]) + "\n")
    return OK


def _shipped_lines(found: ShippedContents) -> list[str]:
    of = "bytes" if found.format == "delta-dir" else "values"
    lines = [f"{safe(found.path)}, {found.format}"]
    if found.version is not None:
        lines.append(f"version     {found.version} of {found.base_version}, {found.encoding}, {found.checksum}")
    lines.append(f"changed     {quantity(found.changed)} {of} of {plural(found.tensors, 'tensor')}")
    if found.whole:
        lines.append(f"whole       {plural(found.whole, 'tensor')}")
    beside = f", {percent(found.size / found.dense)} of these tensors' {size(found.dense)}" if found.dense else ""
    lines.append(f"size        {size(found.size)} in {plural(found.files, 'file')}{beside}")
    if found.mask_entropy:
        lines.append(f"mask        {size(found.mask_entropy)} at least, if changes lie at random")
    return lines


def _lines(found: PatchContents) -> list[str]:
    share = percent(found.changed / found.values if found.values else 0.0)
    states = ", ".join(f"{count} {state}" for state, count in found.tensors.items() if count)
    return [
        f"{safe(found.base)} -> {safe(found.tuned)}, by {safe(found.made_by)}",
        f"changed     {quantity(found.changed)} of {quantity(found.values)} values ({share})",
        f"tensors     {states}",
        f"size        {size(found.size)}, {percent(found.size / found.dense)} of the checkpoint's {size(found.dense)}",
        f"mask        {size(found.mask_entropy)} at least, if changes lie at random",
    ]


def _module_lines(found: PatchContents | ShippedContents) -> list[str]:
    lines = [f"{'layer':>5}  {'module':<24}{'tensors':>8}{'values':>10}{'changed':>10}{'share':>10}{'bytes':>10}"]
    for row in found.modules:
        layer = "" if row["layer"] is None else row["layer"]
        known = row["values"] or not row["changed"]  # an overwrite directory does not say it
        values = quantity(row["values"]) if known else "-"
        part = percent(row["changed"] / row["values"] if row["values"] else 0.0) if known else "-"
        lines.append(
            f"{layer:>5}  {safe(row['module_type']):<24}{row['tensors']:>8}{values:>10}"
            f"{quantity(row['changed']):>10}{part:>10}{size(row['bytes']):>10}"
        )
    return lines


def _counts(made: AppliedDelta) -> str:
    return f"{made.changed} of {plural(made.tensors, 'tensor')} changed, in {plural(made.files, 'file')}"


def _apply_mask(base: str, path: str, **given: Any) -> int:
    """Apply a patch of a mask, which has no digests."""
    from ckptdiff.exports import apply_patch

    for option in ("in_place", "with_files"):
        if given[option]:
            raise OptionError(
                f"--{option.replace('_', '-')} is for exact patches", file=path, hint="ckptdiff patch make makes one"
            )
    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        made = apply_patch(base, path, given["out"], force=given["force"], stream=given["stream"], listener=tell)
    if given["quiet"]:
        return OK
    warn(made.warnings)
    what = f"{quantity(made.coordinates)} values of {plural(made.tensors, 'tensor')}"
    rule = f"rule {made.rule}, {'as stored' if made.compare == 'stored' else 'in ' + made.compare}"
    say(f"{what} set ({safe(rule)}), written to {safe(given['out'])}")
    _say_left_out(base, made.left_out)
    return OK


def _say_left_out(base: str, left_out: Sequence[str]) -> None:
    if left_out:
        others = plural(len(left_out), "other file")
        say(f"not copied from {safe(base)}: {others}: {safe(first_few(left_out, _SHOWN))}")
