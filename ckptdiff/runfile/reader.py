"""Read run files: figures, histograms, spectra and masks."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ckptdiff.errors import OptionError, RunFileError
from ckptdiff.figures.result import Diff
from ckptdiff.measure.histograms import HistogramRows
from ckptdiff.runfile.mask import MaskView
from ckptdiff.runfile.schema import FORMAT, FORMAT_VERSION, HDF5_SIGNATURE, HISTOGRAMS
from ckptdiff.runfile.spectra_table import SpectraView, read_spectra
from ckptdiff.runfile.tables import (
    numbers_of_tensors,
    read_columns,
    read_facts,
    read_layouts,
    read_provenance,
    read_unmatched,
    texts_of_tensors,
)
from ckptdiff.runfile.typed import WrongTypeError, text_of

_HINT = "ckptdiff diff BASE TUNED -o RUN.h5 makes one"


class RunFile:
    """A run file open for reading: a context manager; parts of it are read when they are asked for.

    Parameters
    ----------
    path : path-like
        The run file.

    Raises
    ------
    RunFileError
        No such file, not HDF5, another HDF5 format, written by a newer ckptdiff, incomplete, or damaged. Every
        method raises it too where it meets damage.

    Examples
    --------
    >>> import ckptdiff
    >>> with ckptdiff.RunFile("run.h5") as run:
    ...     print(run.load().mask_rule, len(run.masks))
    abs:1e-05 39
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._require_hdf5()
        try:
            # Without a lock: a run file takes its name when it is complete, and some file systems have no locks.
            self._file = h5py.File(self.path, "r", locking=False)
        except OSError as error:
            raise self._damaged(error) from error
        try:
            with self._guard():
                self._require_complete()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; masks of it cannot be read any more."""
        self._file.close()

    def _repr_html_(self) -> str:
        """What notebooks show."""
        from ckptdiff.page import diff_html

        return diff_html(self.load())

    @property
    def plot(self) -> Any:
        """Its pictures: a :class:`~ckptdiff.page.pictures.Pictures`, which has distributions too."""
        from ckptdiff.page.pictures import Pictures

        return Pictures.of_run_file(self)

    def load(self) -> Diff:
        """The result of the run, equal to what was written."""
        with self._guard():
            tensors = self._file["tensors"]
            laid_out, columns = read_layouts(self._file), read_columns(tensors)
            facts = tuple(
                replace(one, **laid_out[one.name]) if one.name in laid_out else one for one in read_facts(tensors)
            )
            provenance, unmatched = dict(self.provenance), read_unmatched(self._file)
            return Diff(
                tensors=facts,
                columns=columns,
                ckptdiff_version=text_of(self._file, "ckptdiff_version"),
                warnings=tuple(provenance.pop("warnings")),
                spectra=read_spectra(self._file),
                **provenance,
                **unmatched,
            )

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Root attributes: format, format_version, ckptdiff_version, title, complete."""
        with self._guard():
            found = self._file.attrs.items()
            return {name: value.item() if isinstance(value, np.generic) else value for name, value in found}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Where the run came from: base, tuned, compare, mask_rule, options, run, warnings."""
        with self._guard():
            return read_provenance(self._file)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the compared tensors in plan order."""
        with self._guard():
            return tuple(texts_of_tensors(self._file["tensors"], "name"))

    @cached_property
    def masks(self) -> MaskView:
        """The masks by tensor name."""
        with self._guard():
            counts = numbers_of_tensors(self._file["tensors"], "changed", np.uint64).tolist()
            return MaskView(self._file["masks"], dict(zip(self.names, counts, strict=True)), self._guard)

    def require_masks(self) -> None:
        """Make sure that there are masks.

        Raises
        ------
        RunFileError
            If the mask rule is ``none``.
        """
        if self.masks.rule.kind == "none":
            raise RunFileError(
                "the run file holds no masks", file=self.path, hint="run ckptdiff diff with a --mask rule"
            )

    @cached_property
    def histograms(self) -> HistogramView:
        """The histograms by tensor name."""
        with self._guard():
            return HistogramView(self._file["histograms"], self.names, self._guard)

    @property
    def has_histograms(self) -> bool:
        """Whether the file holds histograms; every run writes them."""
        with self._guard():
            return "histograms" in self._file

    @cached_property
    def spectra(self) -> SpectraView:
        """The singular values by tensor name; empty if the run measured no spectra."""
        with self._guard():
            return SpectraView(self._file.get("spectra"), self._guard)

    def _require_complete(self) -> None:
        found = self.attributes
        if found.get("format") != FORMAT:
            raise RunFileError(
                "not a ckptdiff run file",
                file=self.path,
                expected=f"an HDF5 file with the attribute format = {FORMAT}",
                found=f"format = {found['format']}" if "format" in found else "an HDF5 file without it",
                hint=f"ckptdiff track {self.path} prints it" if found.get("format") == "ckptdiff-track" else _HINT,
            )
        version = found.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise RunFileError("damaged run file", file=self.path, expected="a format_version", found=version)
        if version > FORMAT_VERSION:
            raise RunFileError(
                "the run file was written by a newer ckptdiff",
                file=self.path,
                expected=f"format version {FORMAT_VERSION} or older",
                found=f"format version {version}",
                hint=f"upgrade ckptdiff to {found.get('ckptdiff_version', 'a newer version')}",
            )
        if found.get("complete") != 1:
            raise RunFileError(
                "the run file is incomplete: its run did not finish",
                file=self.path,
                expected="complete = 1",
                found=f"complete = {found.get('complete')}",
                hint="run ckptdiff diff again",
            )

    def _require_hdf5(self) -> None:
        try:
            # Only a regular file is opened: a FIFO would block.
            regular = stat.S_ISREG(Path(self.path).stat().st_mode)
            start = b""
            if regular:
                with Path(self.path).open("rb") as file:
                    start = file.read(len(HDF5_SIGNATURE))
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or str(error)
            raise RunFileError(f"cannot read the run file: {text}", file=self.path, hint=_HINT) from error
        if start != HDF5_SIGNATURE:
            raise RunFileError(
                "not a ckptdiff run file",
                file=self.path,
                expected="an HDF5 file that ckptdiff diff -o wrote",
                found="a file without the HDF5 signature" if regular else "not a regular file",
                hint=_HINT,
            )

    def _damaged(self, error: Exception, tensor: str | None = None) -> RunFileError:
        return RunFileError(
            "the run file is damaged or truncated",
            file=self.path,
            tensor=tensor,
            expected=getattr(error, "expected", None),
            found=getattr(error, "found", str(error)),
            hint="run ckptdiff diff again",
        )

    @contextmanager
    def _guard(self, tensor: str | None = None) -> Iterator[None]:
        if not self._file:
            raise ValueError(f"{self.path} is closed")
        try:
            yield
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, OptionError) as error:
            raise self._damaged(error, tensor) from error


class HistogramView(Mapping[str, HistogramRows]):
    """The histograms of a run file by tensor name, in plan order: one row for each."""

    def __init__(self, group: Any, names: tuple[str, ...], guard: Any) -> None:
        self._group = group
        self._rows = {name: row for row, name in enumerate(names)}
        self._guard = guard

    def __getitem__(self, name: str) -> HistogramRows:
        row = self._rows[name]
        with self._guard(tensor=name):
            rows = {field: self._group[dataset][row : row + 1] for dataset, (field, _) in HISTOGRAMS.items()}
            return HistogramRows(**rows)

    def slabs(self, rows: int = 1024) -> Iterator[tuple[slice, HistogramRows]]:
        """Yield all of them, so many tensors at a time, each with the places of these."""
        for start in range(0, len(self), rows):
            places = slice(start, min(start + rows, len(self)))
            with self._guard():
                found = HistogramRows(**{f: self._group[key][places] for key, (f, _) in HISTOGRAMS.items()})
                if len(found) != places.stop - start:
                    raise WrongTypeError(f"{len(self)} rows in {self._group.name}", f"{start + len(found)}")
            yield places, found

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
