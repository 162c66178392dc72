"""``ckptdiff spectra``: add spectra to a run file, or plot them."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import click

from ckptdiff.cli.display import progress
from ckptdiff.cli.failures import OK
from ckptdiff.cli.inputs import device_options, progress_option, resource_options, resume_option, stream_option
from ckptdiff.cli.view import verbosity
from ckptdiff.errors import OptionError
from ckptdiff.report.text import safe


@click.group(short_help="Add spectra to a run file, or plot them.")
def spectra() -> None:
    """Add spectra to a run file, or plot them."""


@spectra.command("add", short_help="Measure spectra and add them to a run file.")
@click.argument("run", type=click.Path(), metavar="RUN.h5")
@click.option(
    "--spectra", "mode", type=click.Choice(["randomized", "exact"]), default="randomized", help="As for ckptdiff diff."
)
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of the randomized spectra.")
@click.option("--base", type=click.Path(), show_default="where it was", help="The base checkpoint, if it has moved.")
@click.option("--tuned", type=click.Path(), show_default="where it was", help="The tuned one, if it has moved.")
@device_options
@resource_options
@resume_option
@stream_option
@progress_option
@verbosity
def add(run: str, **given: Any) -> int:
    """Measure the spectra of the checkpoints that RUN.h5 compared, and add them to it."""
    from ckptdiff.options import SpectraOptions
    from ckptdiff.spectra import add_spectra

    with progress(shown=given["progress"], quiet=given["quiet"], verbose=given["verbose"]) as tell:
        add_spectra(
            run,
            SpectraOptions(given["mode"], seed=given["seed"]),
            base=given["base"],
            tuned=given["tuned"],
            threads=given["threads"],
            max_memory=given["max_memory"],
            device=given["device"],
            gpu_memory=given["gpu_memory"],
            listener=tell,
            resume=given["resume"],
            stream=given["stream"],
        )
    if not given["quiet"]:
        print(f"spectra added      next: ckptdiff show {safe(run)} --by module")
    return OK


@spectra.command("plot", short_help="Plot the singular values of tensors.")
@click.argument("run", type=click.Path(), metavar="RUN.h5")
@click.argument("patterns", nargs=-1, metavar="[GLOB]...")
def plot(run: str, patterns: tuple[str, ...]) -> int:
    """Plot how the singular values of tensors fall, in RUN.h5.

    Without a GLOB the tensor with the largest update is plotted.
    """
    from ckptdiff.checkpoint.globs import names_of
    from ckptdiff.report.plot import decay_lines
    from ckptdiff.report.screen import screen_of
    from ckptdiff.runfile.reader import RunFile

    screen = screen_of(sys.stdout)
    with RunFile(run) as file:
        if not file.spectra:
            raise OptionError("the run file holds no spectra", file=run, hint=f"ckptdiff spectra add {Path(run)}")
        norms = dict(zip(file.names, file.load().columns["delta_norm"].tolist(), strict=True))
        names = [name for name in file.names if name in file.spectra]
        if patterns:
            wanted = set(chain.from_iterable(names_of(patterns, names).values()))
            names = [name for name in names if name in wanted]
        if not names:
            raise OptionError("no tensor with spectra matches", file=run, found=" ".join(patterns))
        for name in names if patterns else [max(names, key=lambda name: norms[name])]:
            lists = file.spectra[name]
            slices = range(len(lists["delta"])) if lists["delta"].ndim == 2 else [None]
            for index in slices:
                print(safe(name) + ("" if index is None else f" [{index}]"))
                kept = {key: values if index is None else values[index] for key, values in lists.items()}
                known = {key: values[values == values] for key, values in kept.items()}
                print("\n".join(decay_lines(known, screen)))
    return OK
