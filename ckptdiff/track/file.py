"""Read and write track files (HDF5).

::

    /                attributes format, format_version, ckptdiff_version, complete
    /provenance      JSON text: base, steps, compare, warnings
    /tensors/name    tensor names; % and NUL are percent-encoded
    /tensors/shape   shapes, as JSON
    /tensors/base_norm              [tensors]
    /tensors/delta_norm             [steps, tensors]
    /tensors/support, touched, ...  [steps, tensors]
    /tensors/products               [tensors, steps * (steps + 1) / 2], with --gram
    /tensors/left_overlap, ...      [tensors, steps * (steps - 1) / 2], with --spectra
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import ckptdiff
from ckptdiff.errors import RunFileError
from ckptdiff.files.staged import StagedFile
from ckptdiff.runfile.check_target import TRACK_FORMAT
from ckptdiff.runfile.schema import escape_text
from ckptdiff.runfile.tables import numbers_of_tensors, texts_of_tensors
from ckptdiff.runfile.typed import Spec, WrongTypeError, json_of, numbers_of, parse_json
from ckptdiff.track.kernels.trajectory import Flow
from ckptdiff.track.result import COUNTS, Track
from ckptdiff.track.subspaces import LOCKING_FIGURES, Locking

_VERSION = 1
_HINT = "ckptdiff track BASE STEP... -o TRACK.h5 makes one"
_PROVENANCE: Spec = {"base": str, "steps": [str], "compare": str, "warnings": [str]}
_TEXT = h5py.string_dtype()
_COUNTED = tuple(flow.name.lower() for flow in Flow)


def save_track(track: Track, target: str | os.PathLike[str]) -> None:
    """Write a track file; it takes its name when it is complete.

    Parameters
    ----------
    track : Track
    target : path-like
        What is there is replaced.

    Raises
    ------
    RunFileError
        The disk is full, or the file cannot be written.

    Examples
    --------
    >>> from ckptdiff.track import save_track, track
    >>> save_track(track("fixtures/llama/base", ["fixtures/llama/tuned"]), "track.h5")
    """
    with StagedFile(Path(target)) as staged:
        with h5py.File(staged, "w") as file:
            file.attrs.update(
                format=TRACK_FORMAT, format_version=_VERSION, ckptdiff_version=ckptdiff.__version__, complete=1
            )
            # JSON with every character beyond ASCII escaped holds what HDF5 strings cannot.
            file["provenance"] = json.dumps(
                {"base": track.base, "steps": track.steps, "compare": track.compare, "warnings": track.warnings}
            )
            tensors = file.create_group("tensors")
            tensors.create_dataset("name", data=[escape_text(name) for name in track.names], dtype=_TEXT)
            tensors.create_dataset("shape", data=[json.dumps(shape) for shape in track.shapes], dtype=_TEXT)
            tensors["base_norm"], tensors["delta_norm"] = track.base_norms, track.delta_norms
            for key in _COUNTED:
                tensors[key] = track.counts[key].astype(np.uint64)
                tensors[key].attrs["long_name"] = COUNTS[key]
            if track.locking is not None:
                for key in LOCKING_FIGURES:
                    tensors[key] = getattr(track.locking, key)
            if track.products is not None:
                tensors["products"] = track.products
                tensors["products"].attrs["long_name"] = "inner products of W - W0, the lower triangle row by row"
        staged.commit()


def load_track(path: str | os.PathLike[str]) -> Track:
    """Read a track file.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    Track
        Equal to what was written.

    Raises
    ------
    RunFileError
        No such file, not a track file, or damaged.

    Examples
    --------
    >>> from ckptdiff.track import load_track, save_track, track
    >>> save_track(track("fixtures/llama/base", ["fixtures/llama/tuned"]), "later.h5")
    >>> load_track("later.h5").steps
    ('fixtures/llama/tuned',)
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise RunFileError(
            "the track file cannot be read, is no HDF5 file, or is truncated",
            file=path,
            expected="a file that ckptdiff track -o wrote",
            found=str(error),
            hint=_HINT,
        ) from error
    with file:
        try:
            _require_ours(file, path)
            return _read(file)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise RunFileError(
                "the track file is damaged or truncated",
                file=path,
                expected=getattr(error, "expected", None),
                found=getattr(error, "found", str(error)),
                hint=_HINT,
            ) from error


def _require_ours(file: Any, path: str | os.PathLike[str]) -> None:
    found = {key: file.attrs.get(key) for key in ("format", "complete")}
    if found != {"format": TRACK_FORMAT, "complete": 1}:
        raise RunFileError(
            "not a ckptdiff track file",
            file=path,
            expected=f"an HDF5 file with the attributes format = {TRACK_FORMAT} and complete = 1",
            found=f"format = {found['format']}, complete = {found['complete']}",
            hint=f"ckptdiff show {path} prints it" if found["format"] == "ckptdiff-run" else _HINT,
        )
    if file.attrs["format_version"] > _VERSION:
        raise RunFileError(
            "the track file was written by a newer ckptdiff",
            file=path,
            expected=f"format version {_VERSION} or older",
            found=f"format version {file.attrs['format_version']}",
            hint="upgrade ckptdiff",
        )


def _read(file: Any) -> Track:
    known, tensors = json_of(file["provenance"], _PROVENANCE), file["tensors"]
    shapes = (parse_json(text, [int], "/tensors/shape") for text in texts_of_tensors(tensors, "shape"))
    names = texts_of_tensors(tensors, "name")
    figures = {key: numbers_of(tensors[key], np.uint64) for key in _COUNTED}
    figures["delta_norm"] = numbers_of(tensors["delta_norm"], np.float64)
    if not known["steps"]:
        raise WrongTypeError("at least one step in /provenance", "none")
    for key, values in figures.items():
        if values.shape != (len(known["steps"]), len(names)):
            expected = f"{len(known['steps'])} x {len(names)} values in /tensors/{key}: steps x tensors"
            raise WrongTypeError(expected, f"shape {values.shape}")
    pairs = len(known["steps"]) * (len(known["steps"]) - 1) // 2
    wanted = {"products": pairs + len(known["steps"]), **dict.fromkeys(LOCKING_FIGURES, pairs)}
    optional = {key: numbers_of(tensors[key], np.float64) for key in wanted if key in tensors}
    for key, values in optional.items():
        if values.shape != (len(names), wanted[key]):
            raise WrongTypeError(f"{len(names)} x {wanted[key]} values in /tensors/{key}", f"shape {values.shape}")
    locking = Locking(**{key: optional[key] for key in LOCKING_FIGURES}) if LOCKING_FIGURES[0] in optional else None
    track = Track(
        base=known["base"],
        steps=tuple(known["steps"]),
        compare=known["compare"],
        names=tuple(names),
        shapes=tuple(map(tuple, shapes)),
        # What int64 does not hold becomes negative, and is found below.
        counts={key: figures[key].astype(np.int64) for key in _COUNTED},
        base_norms=numbers_of_tensors(tensors, "base_norm", np.float64),
        delta_norms=figures["delta_norm"],
        warnings=tuple(known["warnings"]),
        products=optional.get("products"),
        locking=locking,
    )
    _require_possible(track)
    return track


def _require_possible(track: Track) -> None:
    """Refuse counts that no tensors of these shapes have."""
    if len(track.shapes) != len(track.names) or any(size < 0 for shape in track.shapes for size in shape):
        raise WrongTypeError("a shape of each tensor in /tensors/shape", f"{len(track.shapes)} of {len(track.names)}")
    for tensor in range(len(track.names)):
        for row in track.counts_of([tensor]):
            counts = [row[key] for key in COUNTS]
            if min(counts) < 0 or max(counts) > row["numel"]:
                raise WrongTypeError(f"counts from 0 to {row['numel']} in /tensors", ", ".join(map(str, counts)))
