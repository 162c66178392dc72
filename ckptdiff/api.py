"""Compare two checkpoints from Python: :func:`diff`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from ckptdiff.events import Listener
from ckptdiff.figures.result import Diff
from ckptdiff.files.unfinished import SAVING
from ckptdiff.options import (
    Compare,
    Io,
    MaskRule,
    Options,
    SpectraMode,
    SpectraOptions,
    Values,
    as_bytes,
    as_spectra,
    as_tuple,
    ray_options,
)
from ckptdiff.remote.uploading import written_to
from ckptdiff.run.engine import run

__all__ = ["diff"]


def diff(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    compare: Compare = "bf16",
    values: Values = "model",
    mask: str | MaskRule = "abs:1e-05",
    renames: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    groups: Sequence[str] = (),
    device: str = "auto",
    threads: int = 0,
    max_memory: str | int = 0,
    gpu_memory: str | int = 0,
    io: Io = "auto",
    spectra: SpectraMode | SpectraOptions | None = None,
    stream: bool = False,
    quick: bool = False,
    listener: Listener | None = None,
    title: str | None = None,
    resume: bool = False,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    parallel: int = 0,
    ray_env: Sequence[str] = (),
) -> Diff:
    """Compare two checkpoints, as ``ckptdiff diff`` does.

    Parameters
    ----------
    base, tuned : path-like
        A .safetensors file, a directory of shards, a ``*.safetensors.index.json``; a URL of one of these; or a model of
        the Hugging Face hub.
    out : path-like, optional
        Run file to write, or the URL of an object; without one there are figures and no masks.
    compare : {"bf16", "stored"}
        Cast floating tensors of 16 bits and more to bfloat16 first, or compare the stored bits.
    values : {"model", "codes"}
        Decode quantised weights to what the model multiplies with, or compare codes and scales as they are stored.
    mask : str or MaskRule
        Which coordinates belong to the mask: "bitwise", "abs:EPS", "eta:ETA", "rel:TAU", "top:PERCENT" or "none".
    renames : sequence of str
        ``OLD=NEW`` regex substitutions that turn names of the base into names of the tuned side.
    include, exclude : sequence of str
        Globs on tensor names.
    groups : sequence of str
        ``NAME=REGEX``: further groups of tensors to report.
    device : str
        "cpu", "cuda" or "cuda:N" (a GPU), "reference" (NumPy), or "auto": a GPU if one works, else the processor.
    threads : int
        Worker threads; 0 stands for one per available core.
    max_memory : str or int
        Bound on the peak resident size of the process, in bytes or such as "400M"; 0 for the default (see
        :class:`Options`).
    gpu_memory : str or int
        Bound on the GPU memory that is taken; 0 for half of what is free.
    io : {"auto", "mmap", "pread"}
        How files are read.
    spectra : {"randomized", "exact"} or SpectraOptions, optional
        Measure spectra too.
    stream : bool
        Read models of the hub where they are, and do not download them.
    quick : bool
        Leave unread, and undownloaded, tensors that are known to be the same on both sides: nothing of them changed,
        and figures that take the base's values are undefined.
    listener : callable, optional
        Called with each event of :mod:`ckptdiff.events`, in the calling thread.
    title : str, optional
        A title for the run file.
    resume : bool
        Keep what is done in a folder beside `out`, ``OUT.part``, until the run file is there, and go on from what an
        earlier call kept there.
    engine : {"local", "ray"}
        Compute in this process, or on the nodes of a Ray cluster.
    ray_address : str, optional
        ``HOST:PORT`` of that cluster; by default the one that the program has joined, that ``RAY_ADDRESS`` names, that
        runs on this machine, or that is started on it.
    parallel : int
        Tasks of Ray under way at a time, at most; 0 for as many as there is room for.
    ray_env : sequence of str
        Globs on names of environment variables that tasks of Ray get from this process: ``"AWS_*"``.

    Returns
    -------
    Diff

    Raises
    ------
    CkptdiffError
        If an option, an input or the output cannot be used; the message says which, and what to do.

    Examples
    --------
    >>> import ckptdiff
    >>> found = ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned", mask="bitwise", exclude=["*norm*"])
    >>> round(found.overall["unchanged_bitwise"], 4)
    0.781
    """
    options = Options(
        compare=compare,
        values=values,
        mask=MaskRule.parse(mask) if isinstance(mask, str) else mask,
        renames=as_tuple("renames", renames),
        include=as_tuple("include", include),
        exclude=as_tuple("exclude", exclude),
        groups=as_tuple("groups", groups),
        device=device,
        threads=threads,
        max_memory=as_bytes(max_memory),
        gpu_memory=as_bytes(gpu_memory),
        io=io,
        spectra=None if spectra is None else as_spectra(spectra),
        stream=stream,
        quick=quick,
    )
    on_ray = ray_options(engine, ray_address, parallel, as_tuple("ray_env", ray_env))
    with written_to(out, resume) as target:
        return run(
            os.fspath(base),
            os.fspath(tuned),
            out=target,
            options=options,
            listener=listener,
            title=title,
            saving=SAVING if resume else None,
            on_ray=on_ray,
        )
