"""The pictures of a report one by one, for notebooks and papers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptdiff.errors import OptionError
from ckptdiff.figures.result import Diff
from ckptdiff.page.assemble import grid_cells
from ckptdiff.page.distributions import DISTRIBUTIONS
from ckptdiff.page.heatmap import UPDATE_FIGURES, heatmap_picture
from ckptdiff.page.shown_run import ShownRun, shown_run
from ckptdiff.page.spectra_picture import KINDS, module_rows, spectra_picture
from ckptdiff.page.svg import Picture

if TYPE_CHECKING:
    from ckptdiff.runfile.reader import RunFile

_HEATMAPS = {figure.title: figure for figure in UPDATE_FIGURES}


class Pictures:
    """The pictures of a diff or of a run file.

    Each is the SVG of ``ckptdiff report``, as a str: to be written into a file as it is. It also has ``heading`` and
    ``said``, a sentence of what it shows, and notebooks show all three.
    """

    def __init__(self, diff: Diff) -> None:
        self._run = ShownRun("", diff, None)

    @classmethod
    def of_run_file(cls, file: RunFile) -> Pictures:
        """Those of an open run file, of which histograms are known too."""
        made = cls.__new__(cls)
        made._run = shown_run(file)
        return made

    @cached_property
    def _cells(self) -> tuple[Any, Any]:
        grid, (cells,) = grid_cells([self._run.diff])
        return grid, cells

    def heatmap(self, figure: str = "unchanged") -> Picture:
        """A figure of every module type in every layer.

        Parameters
        ----------
        figure : {"unchanged", "relative update", "share of the update", "low coverage minus null", "top-16 energy"}

        Returns
        -------
        Picture

        Raises
        ------
        OptionError
            No such figure, or it is undefined for this pair; top-16 energy takes spectra.

        Examples
        --------
        >>> import ckptdiff
        >>> diff = ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned")
        >>> diff.plot.heatmap("relative update")[:4]
        '<svg'
        """
        return _defined(figure, heatmap_picture(*self._cells, _of(_HEATMAPS, figure)))

    def spectra(self, figure: str = "topk_energy_16") -> Picture:
        """A figure of the matrices of each module type, with its spread, beside noise of their shapes.

        Parameters
        ----------
        figure : {"topk_energy_16", "stable_rank", "principal_energy_0.1", "principal_coverage_0.1"}

        Returns
        -------
        Picture

        Raises
        ------
        OptionError
            No such figure, or it is undefined for this pair; all take spectra.
        """
        kind, diff = _of(KINDS, figure), self._run.diff
        if diff.spectra is None:
            raise OptionError("there are no spectra", hint="ckptdiff.diff(..., spectra='exact') measures them")
        return _defined(figure, spectra_picture(kind, [self._run], [module_rows(diff)]))

    def distribution(self, of: str = "sizes") -> Picture:
        """How many coordinates changed by how much, or where.

        Parameters
        ----------
        of : {"sizes", "steps", "weights"}
            The size of the changes, their distance in units of the last place, or the weights that changed.

        Returns
        -------
        Picture

        Raises
        ------
        OptionError
            No such distribution, nothing changed, or there are no histograms, which a run file holds.
        """
        draw = _of(DISTRIBUTIONS, of)
        if self._run.distributions is None:
            hint = "ckptdiff.diff(..., out='run.h5'), then ckptdiff.RunFile('run.h5').plot"
            raise OptionError("there are no histograms: a run file holds them", hint=hint)
        return _defined(of, draw([self._run]))


def _of(known: Mapping[str, Any], name: str) -> Any:
    if name not in known:
        raise OptionError("no such picture", expected=", ".join(known), found=name)
    return known[name]


def _defined(name: str, found: Picture | None) -> Picture:
    if found is None:
        raise OptionError(f"{name} is undefined for this pair: there is nothing to draw")
    return found
