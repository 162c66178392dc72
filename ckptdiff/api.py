"""The library's one verb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from ckptdiff.events import Listener
from ckptdiff.figures.result import Diff
from ckptdiff.options import MaskRule, Options, SpectraMode, SpectraOptions, parse_size
from ckptdiff.run.engine import run

__all__ = ["diff"]


def diff(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    mask: str | MaskRule = "abs:1e-05",
    max_memory: str | int = 0,
    gpu_memory: str | int = 0,
    listener: Listener | None = None,
    title: str | None = None,
    spectra: str | SpectraOptions | None = None,
    **options: Any,
) -> Diff:
    """Compare two checkpoints, as ``ckptdiff diff`` does.

    Parameters
    ----------
    base, tuned : path-like
        A .safetensors file, a directory of shards, or a ``*.safetensors.index.json``.
    out : path-like, optional
        Run file to write; without one there are figures and no masks.
    mask : str or MaskRule
        Which coordinates belong to the mask: "bitwise", "abs:EPS", "eta:ETA", "rel:TAU", "top:PERCENT" or "none".
    max_memory : str or int
        Bound on the peak resident size of the process, such as "400M"; 0 for the default (see :class:`Options`).
    gpu_memory : str or int
        Bound on the GPU memory that is taken; 0 for half of what is free.
    listener : callable, optional
        Called with each event of :mod:`ckptdiff.events`, in the calling thread.
    title : str, optional
        A title for the run file.
    spectra : {"randomized", "exact"} or SpectraOptions, optional
        Measure spectra too.
    **options
        The other fields of :class:`Options`: compare, renames, include, exclude, groups, device, threads, io.

    Returns
    -------
    Diff

    Raises
    ------
    CkptdiffError
        If an option, an input or the output cannot be used; the message says which, and what to do.
    """
    memory, on_gpu = (parse_size(size) if isinstance(size, str) else size for size in (max_memory, gpu_memory))
    listed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    chosen = Options(
        mask=MaskRule.parse(mask) if isinstance(mask, str) else mask,
        max_memory=memory,
        gpu_memory=on_gpu,
        spectra=SpectraOptions(cast(SpectraMode, spectra)) if isinstance(spectra, str) else spectra,
        **listed,
    )
    target = None if out is None else Path(out)
    return run(os.fspath(base), os.fspath(tuned), out=target, options=chosen, listener=listener, title=title)
