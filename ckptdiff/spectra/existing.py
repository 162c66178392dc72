"""Add spectra to a run file that was made without them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import h5py

from ckptdiff.checkpoint import Checkpoint, TensorPair, pair
from ckptdiff.checkpoint.open_shards import OpenShards, open_shards
from ckptdiff.checkpoint.weights import Weight
from ckptdiff.errors import OptionError, RunFileError
from ckptdiff.events import Listener, Stage, ignore, stage
from ckptdiff.figures.result import Diff
from ckptdiff.files.staged import StagedFile
from ckptdiff.files.unfinished import SAVING
from ckptdiff.linalg.blas import require_scipy
from ckptdiff.options import Compare, Options, SpectraMode, SpectraOptions, as_bytes, as_spectra
from ckptdiff.runfile.belonging import belonging, resumable
from ckptdiff.runfile.identity import checked_blocks, known_norms, open_side
from ckptdiff.runfile.reader import RunFile
from ckptdiff.runfile.spectra_table import add_spectrum, write_spectra
from ckptdiff.spectra.spectra_gpu import open_spectra_gpu
from ckptdiff.spectra.stage import SpectraTable, measure_spectra

__all__ = ["add_spectra"]

_COPY = 1 << 22


def add_spectra(
    path: str | os.PathLike[str],
    spectra: SpectraMode | SpectraOptions = "randomized",
    *,
    base: str | os.PathLike[str] | None = None,
    tuned: str | os.PathLike[str] | None = None,
    threads: int = 0,
    max_memory: str | int = 0,
    device: str = "auto",
    gpu_memory: str | int = 0,
    listener: Listener | None = None,
    resume: bool = False,
    stream: bool = False,
) -> Diff:
    """Measure the spectra of a run's checkpoints and add them to its run file.

    A copy takes the run file's name when it is complete.

    Parameters
    ----------
    path : path-like
        The run file.
    spectra : {"randomized", "exact"} or SpectraOptions
    base, tuned : path-like, optional
        Where the checkpoints are now, if they have moved: such a side is read once more, to compare its norms.
    threads : int
        As in :class:`~ckptdiff.options.Options`.
    max_memory : str or int
        Likewise; also such as "2G".
    device : str
        Likewise.
    gpu_memory : str or int
        Likewise; also such as "2G".
    listener : callable, optional
        Called with the events of each stage: the run file is copied, a side that has moved is read, spectra.
    resume : bool
        Keep what is measured in a folder beside the run file, ``PATH.part``, until it is added, and go on from what an
        earlier call kept there.
    stream : bool
        Whether a model of the hub is read where it is; else it is downloaded first.

    Returns
    -------
    Diff
        The run, with its spectra.

    Raises
    ------
    RunFileError
        If the run file cannot be read or written, or has spectra already.
    CheckpointError
        If the checkpoints are not those of the run, by headers or by norms.
    OptionError
        If an option cannot be used, they do not pair as they did, or SciPy is missing.
    DeviceError, PlanError
        If a GPU is asked for and cannot be used.

    Examples
    --------
    >>> import ckptdiff
    >>> from ckptdiff.spectra import add_spectra
    >>> before = ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned", out="later.h5", include=["*up_proj*"])
    >>> after = add_spectra("later.h5", "exact")
    >>> round(after.median_2d["spectral"]["stable_rank"], 2)
    7.45
    """
    require_scipy()
    path, spectra = os.fspath(path), as_spectra(spectra)
    diff, pairs = _without_spectra(path, base, tuned, stream)
    options = Options(
        compare=cast(Compare, diff.compare),
        device=device,
        threads=threads,
        max_memory=as_bytes(max_memory),
        gpu_memory=as_bytes(gpu_memory),
        spectra=spectra,
    )
    tell = listener or ignore
    gpu = open_spectra_gpu(options, spectra.mode, tell)
    saving, name = SAVING if resume else None, "cpu" if gpu is None else gpu.name
    with (
        open_shards("pread") as shards,
        resumable(Path(path), lambda: belonging("spectra add", diff, name, spectra), shards, tell, saving) as work,
        StagedFile(Path(path)) as staged,
    ):
        _copy(Path(path), staged, tell)
        with h5py.File(staged, "r+") as file:
            if base:
                _require_values(shards, diff, "base", [pair.base for pair in pairs], tell)
            if tuned:
                _require_values(shards, diff, "tuned", [pair.tuned for pair in pairs], tell)
            table = SpectraTable(spectra.mode, len(diff.tensors))
            for found in measure_spectra(pairs, diff, shards, options, tell, gpu, work):
                table.take(found)
                if found.method:
                    add_spectrum(file, diff.tensors[found.index].name, found.method, found.lists)
                    staged.check()
            shards.check()
            measured = table.finish()
            told = Stage(tell, "writing")
            write_spectra(file, measured)
        staged.commit()
        if work is not None:
            work.remove()
        told.end()
    return replace(diff, spectra=measured)


def _copy(path: Path, staged: StagedFile, tell: Listener) -> None:
    with path.open("rb") as old, stage(tell, "copying", path.stat().st_size, "bytes") as told:
        while piece := old.read(_COPY):
            staged.write(piece)
            staged.check()
            told.more(len(piece), path.name)


def _require_values(
    shards: OpenShards, diff: Diff, side: Literal["base", "tuned"], tensors: Sequence[Weight], tell: Listener
) -> None:
    """Read a side that has moved, to see that it holds what the run measured: its headers do not tell."""
    with stage(tell, f"reading {side}", sum(tensor.nbytes for tensor in tensors), "bytes") as told:
        for tensor, known in zip(tensors, known_norms(diff, side).values(), strict=True):
            for block in checked_blocks(shards, tensor, known):
                told.more(block.nbytes, tensor.name)


def _without_spectra(
    path: str, base: str | os.PathLike[str] | None, tuned: str | os.PathLike[str] | None, stream: bool
) -> tuple[Diff, Sequence[TensorPair]]:
    """What a run file holds, and the tensor pairs of its checkpoints."""
    with RunFile(path) as run:
        diff = run.load()
        if diff.spectra is not None:
            again = "for others compare again: ckptdiff diff BASE TUNED --spectra exact -o RUN.h5"
            raise RunFileError("the run file has spectra already", file=path, found=diff.spectra.mode, hint=again)
        sides = (open_side(run, side, given, stream) for side, given in (("base", base), ("tuned", tuned)))
        return diff, _pairs(path, diff, *sides)


def _pairs(path: str, diff: Diff, base: Checkpoint, tuned: Checkpoint) -> Sequence[TensorPair]:
    """The tensor pairs of a run, from its checkpoints."""
    given = dict(diff.options)
    found = pair(
        base,
        tuned,
        renames=given["renames"],
        include=given["include"],
        exclude=given["exclude"],
        values=given.get("values", "codes"),
    )
    # A head that the run saw to be its embedding is an alias there, and here it may be a pair; 0.1.0 knew no pieces.
    asked = [(tensor.name, bool(tensor.pieces)) for tensor in diff.tensors]
    pairs = {(one.name, bool(one.pieces)): one for one in found.pairs}
    if not pairs.keys() >= set(asked):
        raise OptionError("the checkpoints do not pair as in the run", file=path, hint="run ckptdiff diff again")
    return [pairs[tensor] for tensor in asked]
