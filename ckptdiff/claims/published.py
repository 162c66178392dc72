"""List the figures that the paper publishes, and make the same of a diff, in the paper's conventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptdiff.errors import OptionError
from ckptdiff.figures.result import Diff

Row = Mapping[str, float | None]

COLUMNS = {
    "rel_norm": "update",
    "unchanged_bitwise": "unchanged",
    "unchanged_abs": "<=1e-5",
    "topk_energy": "top 16",
    "stable_rank": "s. rank",
    "principal_coverage": "princ. 10 %",
    "low_coverage": "low 10 %",
    "principal_energy": "pr. energy",
    "numerical_rank_frac": "rank 1e-5",
}
"""What a row holds, with its title: three figures of the whole, then medians over the matrices that moved."""

_WHOLE = ("rel_norm", "unchanged_bitwise", "unchanged_abs")
_PARAMETERS = {
    "unchanged_abs": "1e-05",
    "topk_energy": "16",
    "principal_coverage": "0.1",
    "low_coverage": "0.1",
    "principal_energy": "0.1",
    "numerical_rank_frac": "1e-05",
}


def _published(*cells: float) -> Row:
    """A row of the paper: percent but for the stable rank, and no rank for each pair alone."""
    shares = [cell if key == "stable_rank" else cell / 100 for key, cell in zip(COLUMNS, cells, strict=False)]
    return dict(zip(COLUMNS, (*shares, None), strict=True))


PUBLISHED: Mapping[str, Row] = {
    "Qwen2.5-Math-1.5B -> DS-Qwen (offline distillation)": _published(
        11.936, 3.06, 3.06, 8.57, 82.74, 9.95, 10.10, 2.22
    ),
    "DS-Qwen -> DeepScaleR (RLVR)": _published(0.073, 77.36, 77.89, 19.62, 16.07, 5.29, 31.26, 0.37),
    "DS-Qwen -> OPD": _published(0.047, 82.02, 82.58, 26.92, 9.97, 4.81, 38.04, 0.37),
    "Qwen2.5-VL-3B -> GRPO": _published(0.045, 83.40, 86.56, 21.75, 16.57, 4.58, 44.46, 0.66),
    "Qwen2.5-VL-3B -> OPD": _published(0.142, 64.13, 66.72, 30.52, 12.58, 5.23, 24.99, 0.81),
    "Qwen3-4B -> OPSD": _published(0.036, 86.50, 89.50, 26.19, 7.77, 4.39, 48.57, 0.47),
}
"""Tables 2, 8 and 9 of arXiv 2606.13657."""


def figures_of(diff: Diff) -> Row:
    """The same figures of a diff with spectra: the whole, or unweighted medians over native matrices that moved.

    Parameters
    ----------
    diff : Diff

    Returns
    -------
    mapping of str to float or None
        By the keys of :data:`COLUMNS`, as shares; None where undefined.

    Raises
    ------
    OptionError
        The diff has no spectra.

    Examples
    --------
    >>> import ckptdiff
    >>> from ckptdiff.claims import figures_of
    >>> row = figures_of(ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned", spectra="randomized"))
    >>> round(row["unchanged_bitwise"], 4)
    0.7817
    """
    if diff.spectra is None:
        raise OptionError("the diff holds no spectra", file=diff.base["path"], hint="measure them: spectra='exact'")
    whole, median = diff.overall, diff.median_2d
    spectral = median["spectral"]

    def cell(key: str) -> Any:
        source: Sequence[Mapping[str, Any]] = (whole,) if key in _WHOLE else (spectral, median)
        value = next(row[key] for row in source if key in row)
        return value if key not in _PARAMETERS else value[_PARAMETERS[key]]

    return {key: cell(key) for key in COLUMNS}
