"""Keep spectra in a run file: figures beside the other columns, and the singular values of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from ckptdiff.figures.spectral import SPECTRAL_FIGURES, SPECTRAL_KEYS, Spectra, spectral_keys
from ckptdiff.runfile.schema import escape_name, escape_text, unescape
from ckptdiff.runfile.tables import describe, numbers_of_tensors, texts_of_tensors
from ckptdiff.runfile.typed import WrongTypeError, numbers_of, text_of

SPECTRUM_LISTS: Final = {
    "delta": "singular values of d, largest first",
    "base": "singular values of W0, largest first",
    "tuned": "singular values of W1, largest first",
    "angles_left": "principal angles between left singular subspaces of W0 and W1, smallest first",
    "angles_right": "principal angles between right singular subspaces of W0 and W1, smallest first",
}
"""What a group under ``/spectra`` may hold, shape (n,), or (matrices, n) for a tensor of several matrices."""

_PREFIX, _FIGURES = "spectral_", "figures"
_NEW_FIGURES = (
    "topp_energy",
    "dg_rank",
    "dg_energy",
    "spectral_drift",
    "principal_not_low_abs",
    "low_coverage_abs",
    "top_subspace_rotation_left",
    "top_subspace_rotation_right",
)
"""Spectral figures that run files of 0.1.0 lack."""
_TEXT = h5py.string_dtype()
_TEXTS = {"method": "how the spectrum was found: randomized, exact, or empty", "reason": "why figures are missing"}
_COUNTS = {"matrices": "matrices the tensor is made of", "rank": "singular values of d that are known"}


def add_spectrum(file: Any, name: str, method: str, lists: Mapping[str, NDArray[np.float64]]) -> None:
    """Add the singular values of one tensor as ``/spectra/<name>/*``, by keys of :data:`SPECTRUM_LISTS`."""
    group = file.require_group("spectra").create_group(escape_name(name))
    group.attrs["method"] = method
    for key, values in lists.items():
        angles = key.startswith("angles")
        group.create_dataset(key, data=values).attrs.update(
            units="rad" if angles else "1", long_name=SPECTRUM_LISTS[key]
        )


def write_spectra(file: Any, spectra: Spectra) -> None:
    """Add the figures of all tensors as ``/tensors/spectral_*``."""
    tensors, names = file["tensors"], file["tensors/name"]
    file.require_group("spectra").attrs["mode"] = spectra.mode

    def add(key: str, values: Any, long_name: str, units: str | None = "1", **how: Any) -> None:
        describe(tensors.create_dataset(_PREFIX + key, data=values, **how), names, units, long_name)

    for (key, long_name), texts in zip(_TEXTS.items(), (spectra.methods, spectra.reasons), strict=True):
        add(key, [escape_text(text) for text in texts], long_name, None, dtype=_TEXT)
    for (key, long_name), counts in zip(_COUNTS.items(), (spectra.matrices, spectra.ranks), strict=True):
        add(key, counts.astype(np.uint64), long_name)
    for figure in SPECTRAL_FIGURES:
        units = "rad" if figure.key.startswith("angle") else "1"
        for parameter, key in spectral_keys(figure):
            long_name = figure.long_name if parameter is None else f"{figure.long_name}, at {parameter:g}"
            add(key, spectra.columns[key], long_name, units)

    names = [unescape(name) for name in texts_of_tensors(tensors, "name")] if spectra.experts else []
    for row, figures in spectra.experts.items():
        if spectra.methods[row]:
            found = file["spectra"][escape_name(names[row])].create_dataset(_FIGURES, data=figures)
            found.attrs.update(long_name="figures of each matrix", keys=" ".join(SPECTRAL_KEYS))


def read_spectra(file: Any) -> Spectra | None:
    """The figures of all tensors, None if the run measured no spectra."""
    if "spectra" not in file:
        return None
    tensors = file["tensors"]
    methods, reasons = (tuple(texts_of_tensors(tensors, _PREFIX + key)) for key in _TEXTS)
    matrices, ranks = (numbers_of_tensors(tensors, _PREFIX + key, np.uint64).astype(np.int64) for key in _COUNTS)
    columns = {
        key: numbers_of_tensors(tensors, _PREFIX + key, np.float64)
        if _PREFIX + key in tensors or figure.key not in _NEW_FIGURES
        else np.full(len(methods), np.nan)
        for figure in SPECTRAL_FIGURES
        for _, key in spectral_keys(figure)
    }
    several = [row for row in np.flatnonzero(matrices > 1).tolist() if methods[row]]
    names = [unescape(name) for name in texts_of_tensors(tensors, "name")] if several else []
    groups = {row: file["spectra"][escape_name(names[row])] for row in several}
    experts = {row: _figures(group, int(matrices[row])) for row, group in groups.items() if _FIGURES in group}
    return Spectra(text_of(file["spectra"], "mode"), columns, methods, reasons, matrices, ranks, experts)


def _figures(group: Any, matrices: int) -> NDArray[np.float64]:
    """The figures of each matrix of a tensor of several."""
    stored: NDArray[np.float64] = numbers_of(group[_FIGURES], np.float64)
    keys = text_of(group[_FIGURES], "keys").split()
    if stored.shape != (matrices, len(keys)):
        raise WrongTypeError(f"shape {(matrices, len(keys))} in {group.name}/{_FIGURES}", str(stored.shape))
    found = np.full((matrices, len(SPECTRAL_KEYS)), np.nan)
    for at, key in enumerate(SPECTRAL_KEYS):
        if key in keys:
            found[:, at] = stored[:, keys.index(key)]
    return found


class SpectraView(Mapping[str, dict[str, NDArray[np.float64]]]):
    """The singular values in a run file by tensor name; tensors that were not measured are missing."""

    def __init__(self, group: Any, guard: Any) -> None:
        self._group = group
        self._guard = guard
        with guard():
            self._names = {} if group is None else {unescape(name): name for name in group}

    def __getitem__(self, name: str) -> dict[str, NDArray[np.float64]]:
        link = self._names[name]
        with self._guard(tensor=name):
            found = self._group[link]
            keys = [key for key in SPECTRUM_LISTS if key in found or key == "delta"]  # without that one it is damaged
            return {key: numbers_of(found[key], np.float64) for key in keys}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
