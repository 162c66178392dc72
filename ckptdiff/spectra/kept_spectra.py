"""Keep the spectra of matrices, and find them again in a later run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ckptdiff.errors import RunFileError
from ckptdiff.files.packed_entry import Unpacked, pack, unpack
from ckptdiff.files.unfinished import Unfinished
from ckptdiff.spectra.budget import Budget
from ckptdiff.spectra.job import MatrixJob
from ckptdiff.spectra.measure import MatrixSpectra


class KeptSpectra:
    """The spectra of matrices in the folder of an unfinished run.

    What memory decides, the budget does: a matrix that was measured in another mode is not one of them.
    """

    def __init__(self, unfinished: Unfinished, budget: Budget) -> None:
        self._unfinished, self._budget = unfinished, budget

    def find(self, job: MatrixJob) -> MatrixSpectra | None:
        """What was measured of a matrix in an earlier run."""
        found = self._unfinished.find(self._key(job))
        return None if found is None else spectra_of(unpack(found))

    def keep(self, job: MatrixJob, spectra: MatrixSpectra) -> None:
        """Keep what was measured; why nothing could be is found out again, at once."""
        if spectra.method:
            self._unfinished.keep(self._key(job), packed_spectra(spectra))

    def filled_in(
        self, jobs: Sequence[MatrixJob], ready: Sequence[bool], measured: Iterator[tuple[int, MatrixSpectra]]
    ) -> Iterator[tuple[int, MatrixSpectra]]:
        """Yield each matrix with the row of its tensor: those that are `ready` as they were found, others in order."""
        for job, is_ready in zip(jobs, ready, strict=True):
            if not is_ready:
                yield next(measured)
                continue
            found = self.find(job)
            if found is None:
                raise RunFileError(
                    "what was kept changed while it was read",
                    file=self._unfinished.folder,
                    tensor=job.pair.name,
                    hint="the same command again, which measures what is damaged",
                )
            yield job.index, found

    def _key(self, job: MatrixJob) -> str:
        mode = "exact" if self._budget.exact(job.view) else "randomized"
        return f"spectra of tensor {job.index}, from element {job.view.offset}, {mode}"


def packed_spectra(spectra: MatrixSpectra) -> list[bytes]:
    """Spectra as the parts of an entry."""
    facts = {"method": spectra.method, "reasons": spectra.reasons, "figures": list(spectra.figures)}
    figures = np.array(list(spectra.figures.values()), np.float64)
    return pack(facts, {"figures": figures} | {f"values {name}": kept for name, kept in spectra.values.items()})


def spectra_of(entry: Unpacked) -> MatrixSpectra:
    """The spectra of an entry."""
    facts, arrays, _ = entry
    figures = dict(zip(facts["figures"], arrays.pop("figures").tolist(), strict=True))
    values = {name.removeprefix("values "): found for name, found in arrays.items()}
    return MatrixSpectra(facts["method"], figures, values, tuple(facts["reasons"]))
