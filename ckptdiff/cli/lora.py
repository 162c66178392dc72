"""``ckptdiff lora``: write an update as a low-rank adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

import click

from ckptdiff.cli.display import progress
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import device_options, progress_option, stream_option, tensor_options
from ckptdiff.cli.target import ReportTarget, files_of, output_option
from ckptdiff.cli.view import format_option, verbosity, write_rows
from ckptdiff.errors import OptionError, plural
from ckptdiff.report.text import number, percent, safe, shape_text

if TYPE_CHECKING:
    from ckptdiff.lora import Extraction

_KEYS = ("name", "shape", "delta_norm", "rank", "lost", "reason")
_MOST = 128
_MEANINGS = {
    "share": "share: part of the sum of d^2 of all tensors.",
    "lost": "lost: part of the tensor's sum of d^2 that the adapter does not hold.",
}


@click.command(short_help="Write the update as a PEFT (LoRA) adapter.")
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option("-o", "--out", type=click.Path(), metavar="DIR", required=True, help="Folder to make for the adapter.")
@click.option(
    "--rank",
    type=int,
    metavar="R",
    show_default="128 with --energy, else it must be given",
    help="Rank of every matrix; with --energy the largest one.",
)
@click.option(
    "--energy",
    type=float,
    metavar="SHARE",
    show_default="all that the rank holds",
    help="Take the smallest rank of each matrix that holds this share of its sum d^2; experts have one rank.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the randomized SVD.")
@tensor_options
@device_options
@stream_option
@format_option
@output_option
@progress_option
@verbosity
def lora(base: str, tuned: str, **given: Any) -> int:
    """Write the update from BASE to TUNED as an adapter that peft loads, and say what it loses.

    Linear layers and experts are factored by a randomized SVD. What an adapter cannot express (vectors, embeddings,
    convolutions), and what PEFT refuses or would drop, is listed with its part of the update.

    \b
      ckptdiff lora base/ tuned/ -o adapter --rank 32
      ckptdiff lora base/ tuned/ -o adapter --energy 0.9
    """  # noqa: D301
    rank, energy = given["rank"], given["energy"]
    if rank is None and energy is None:
        raise OptionError("no rank", expected="--rank R or --energy SHARE")
    target = ReportTarget.choose(given["output"], binary=False, kept=[*files_of(base), *files_of(tuned)])
    from ckptdiff.lora import extract_lora
    from ckptdiff.options import Options

    options = Options(
        renames=given["renames"],
        include=given["include"],
        exclude=given["exclude"],
        device=given["device"],
        gpu_memory=given["gpu_memory"],
        stream=given["stream"],
    )
    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        made = extract_lora(
            base,
            tuned,
            given["out"],
            rank=_MOST if rank is None else rank,
            energy=energy,
            seed=given["seed"],
            options=options,
            listener=tell,
        )
    if not (given["quiet"] and target.is_stdout):
        with target.open() as stream:
            _write(stream, made, given["format"])
    return OK


def _write(stream: TextIO, made: Extraction, form: str) -> None:
    rows = [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in made.tensors]
    if form != "table":
        totals = {"schema": "ckptdiff.lora/1", "adapter": str(made.folder), "lost": made.lost}
        write_rows(stream, form, rows, _KEYS, {**totals, "unchanged": made.unchanged})
        return
    from ckptdiff.report.screen import Column, legend_lines, screen_of, table_lines

    total = sum(tensor.delta_norm**2 for tensor in made.tensors)
    columns = [
        Column("tensor", [safe(tensor.name) or '""' for tensor in made.tensors], left=True),
        Column("shape", [shape_text(tensor.shape) for tensor in made.tensors], rank=2),
        Column("share", [percent(tensor.delta_norm**2 / total) for tensor in made.tensors], rank=1),
        Column("rank", [number(tensor.rank) if tensor.rank else "" for tensor in made.tensors]),
        Column("lost", [percent(tensor.lost) for tensor in made.tensors]),
        Column("", [tensor.reason or "" for tensor in made.tensors], left=True),
    ]
    kept = sum(1 for tensor in made.tensors if tensor.rank)
    left_out = len(made.tensors) - kept
    screen = screen_of(stream)
    lines = [
        f"{plural(kept, 'matrix', 'matrices')} in {safe(str(made.folder))}, {plural(left_out, 'tensor')} left out, "
        f"{made.unchanged:,} unchanged",
        f"lost: {percent(made.lost)} of the energy of the whole update",
        "",
        *table_lines(columns, screen),
        *legend_lines(_MEANINGS, [columns], screen),
    ]
    stream.write("\n".join(lines) + "\n")
