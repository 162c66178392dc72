"""Judge each claim of the paper by one figure of a pair, against what chance or rounding would give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from ckptdiff.claims.published import Row, figures_of
from ckptdiff.figures.result import Diff
from ckptdiff.measure.thresholds import principal_rank
from ckptdiff.report.text import percent

Outcome = Literal["shown", "not shown", "no more than chance", "unknown"]

_RANK = 16
_POINTS = 20_000
_CLEAR = 0.05
"""A figure stands out from its null by this share of it at least."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One claim.

    Attributes
    ----------
    claim : str
    outcome : {"shown", "not shown", "no more than chance", "unknown"}
    figure : str
        Key of the figure it is judged by.
    value, null : float or None
        The figure, and what it is held against.
    sentence : str
        All of this in words.
    rounding : float or None
        What noise of the update's norm would give, after rounding where that matters, if `null` is the paper's own
        criterion.
    beyond : {"shown", "not shown", "no more than chance"} or None
        Whether the figure is beyond that: the same claim, judged against noise.
    """

    claim: str
    outcome: Outcome
    figure: str
    value: float | None
    null: float | None
    sentence: str
    rounding: float | None = None
    beyond: Outcome | None = None


def judge_claims(diff: Diff) -> list[Verdict]:
    """Judge every claim for a diff with spectra.

    Parameters
    ----------
    diff : Diff
        Such as ``ckptdiff.diff(base, tuned, spectra="exact")``; of randomized spectra the rank is unknown.

    Returns
    -------
    list of Verdict
        One of each claim, in the paper's order.

    Raises
    ------
    OptionError
        The diff has no spectra.

    Examples
    --------
    >>> import ckptdiff
    >>> from ckptdiff.claims import judge_claims
    >>> found = ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned", spectra="exact")
    >>> sparse, small, *others = judge_claims(found)
    >>> sparse.claim, sparse.outcome
    ('most coordinates do not change', 'shown')
    """
    row = figures_of(diff)
    alone = [_sparse(diff, row), _small(row), _spread(diff), _feed_forward(diff), _full_rank(diff, row)]
    return [*alone, _concentrated(diff, row), *_off_principal(diff, row), _low(diff, row)]


def _verdict(claim: str, figure: str, value: float | None, null: float | None, outcome: Outcome, words: str) -> Verdict:
    if value is None:
        return Verdict(claim, "unknown", figure, None, null, f"{claim}: unknown; {figure} is undefined for this pair.")
    return Verdict(claim, outcome, figure, value, null, f"{claim}: {outcome}; {words}.")


def _sparse(diff: Diff, row: Row) -> Verdict:
    value = row["unchanged_bitwise"]
    words = f"{percent(value)} of all coordinates kept their bits after the cast; dense training changes nearly all"
    outcome: Outcome = "shown" if value is not None and value > 0.5 else "not shown"
    null = diff.overall["unchanged_null"]
    found = _verdict("most coordinates do not change", "global.unchanged_bitwise", value, 0.5, outcome, words)
    if value is None or null is None:
        return found
    # By what changed: a share of what did not says little near 100 %.
    beyond = _below(1.0 - value, 1.0 - null)
    said = {"shown": "fewer change than that", "not shown": "more change than that"}.get(
        beyond, "no more than rounding"
    )
    sentence = f"{found.sentence[:-1]}; noise of this size, rounded, would leave {percent(null)}: {said}."
    return replace(found, sentence=sentence, rounding=null, beyond=beyond)


def _small(row: Row) -> Verdict:
    value = row["rel_norm"]
    theirs = "the paper's on-policy pairs have 0.04 to 0.14 %, the offline one 12 %"
    words = f"its norm is {percent(value)} of the base's; {theirs}"
    outcome: Outcome = "shown" if value is not None and value < 0.01 else "not shown"
    return _verdict("the update is small", "global.rel_norm", value, 0.01, outcome, words)


def _spread(diff: Diff) -> Verdict:
    """The second version of the paper: every layer moves, by about as much of its norm."""
    claim, figure = "it is distributed across layers", "layers.*.rel_norm"
    layers = [row for row in diff.grouped("layer") if row["rel_norm"] is not None]
    if len(layers) < 2 or not any(row["rel_norm"] for row in layers):
        words = "there are no two layers" if len(layers) < 2 else f"{figure} is zero or undefined for this pair"
        return Verdict(claim, "unknown", figure, None, 1.0, f"{claim}: unknown; {words}.")
    value = _variation([row["rel_norm"] for row in layers])
    null = _variation([_noise_norm(1.0, row) for row in layers])
    beyond = _below(value, null)
    said = {"shown": "more even than that", "not shown": "less even than that"}.get(beyond, "as even as that")
    alone = math.sqrt(len(layers) - 1)
    words = (
        f"relative norms of the {len(layers)} layers vary by {percent(value)} of their mean ({percent(alone)} if one "
        f"had it all); those of noise of one size on every weight by {percent(null)}: {said}"
    )
    found = _verdict(claim, figure, value, 1.0, "shown" if value < 1.0 else "not shown", words)
    return replace(found, rounding=null, beyond=beyond)


def _feed_forward(diff: Diff) -> Verdict:
    """The second version of the paper: usually the largest relative movement is there."""
    claim, figure = "it moves the feed-forward block most", "blocks.ffn.rel_norm"
    blocks = {row["block"]: row for row in diff.grouped("block") if row["rel_norm"] is not None}
    ours = blocks.pop("ffn", None)
    size = diff.overall["delta_norm"]
    if ours is None or not blocks or not size:
        words = f"{figure} is undefined for this pair, or there is no other block, or no update"
        return Verdict(claim, "unknown", figure, None, None, f"{claim}: unknown; {words}.")
    value, next_ = ours["rel_norm"], max(blocks.values(), key=lambda row: row["rel_norm"])
    values = sum(row["numel"] for row in (ours, *blocks.values()))
    null = _noise_norm(size / math.sqrt(values), ours)
    beyond = _above(value, null)
    said = {"shown": "more than that", "not shown": "less than that"}.get(beyond, "no more than that")
    words = (
        f"it moves by {percent(value)} of its norm, {next_['block']} by {percent(next_['rel_norm'])}; noise of one "
        f"size on every weight would move it by {percent(null)}: {said}"
    )
    outcome: Outcome = "shown" if value > next_["rel_norm"] else "not shown"
    return replace(_verdict(claim, figure, value, next_["rel_norm"], outcome, words), rounding=null, beyond=beyond)


def _noise_norm(size: float, row: Mapping[str, Any]) -> float:
    """Relative norm of noise of one standard deviation on every weight of a group."""
    return size * math.sqrt(row["numel"]) / float(row["base_norm"])


def _variation(values: Sequence[float]) -> float:
    """Standard deviation in units of the mean."""
    return float(np.std(values) / np.mean(values))


def _full_rank(diff: Diff, row: Row) -> Verdict:
    value = row["numerical_rank_frac"]
    claim, figure = "the update is numerically full-rank", "median_2d.spectral.numerical_rank_frac.1e-05"
    if value is None and diff.median_2d["spectral"]["method"] == "randomized":
        words = f"{claim}: unknown; only exact spectra have numerical ranks (--spectra exact)."
        return Verdict(claim, "unknown", figure, None, 0.9, words)
    words = f"{percent(value)} of the median matrix's singular values exceed 1e-5 of the largest; so do those of noise"
    outcome: Outcome = "shown" if value is not None and value > 0.9 else "not shown"
    return _verdict(claim, figure, value, 0.9, outcome, words)


def _concentrated(diff: Diff, row: Row) -> Verdict:
    value, null = row["topk_energy"], _median(diff, noise_energy)
    words = f"16 singular values hold {percent(value)} of the median update; of noise of these shapes, {percent(null)}"
    outcome = _above(value, null)
    return _verdict("it is spectrally concentrated", "median_2d.spectral.topk_energy.16", value, null, outcome, words)


def _off_principal(diff: Diff, row: Row) -> list[Verdict]:
    energy, chance = row["principal_energy"], _median(diff, chance_energy)
    covered = row["principal_coverage"]
    null = diff.median_2d["spectral"]["principal_coverage_null"]["0.1"]
    against = f"rounded noise, {percent(null)}; chance, 10 %" if null is not None else "chance, 10 %"
    return [
        _verdict(
            "its energy lies off the base's principal subspaces",
            "median_2d.spectral.principal_energy.0.1",
            energy,
            chance,
            _below(energy, chance),
            f"the top 10 % directions hold {percent(energy)} of it; of noise without a direction, {percent(chance)}",
        ),
        _verdict(
            "it avoids the base's principal weights",
            "median_2d.spectral.principal_coverage.0.1",
            covered,
            null if null is not None else 0.1,
            _below(covered, null if null is not None else 0.1),
            f"the 10 % principal weights hold {percent(covered)} of the changes; of {against}",
        ),
    ]


def _low(diff: Diff, row: Row) -> Verdict:
    value, null = row["low_coverage"], diff.median_2d["low_coverage_null"]["0.1"]
    against = f"rounded noise, {percent(null)}; chance, 10 %" if null is not None else "chance, 10 %"
    words = f"the 10 % smallest weights hold {percent(value)} of the changes; of {against}"
    limit = null if null is not None else 0.1
    claim, outcome = "it falls where weights are near zero", _above(value, limit)
    return _verdict(claim, "median_2d.low_coverage.0.1", value, limit, outcome, words)


def _above(value: float | None, null: float | None) -> Outcome:
    if value is None or null is None:
        return "unknown"
    if abs(value - null) <= _CLEAR * null:
        return "no more than chance"
    return "shown" if value > null else "not shown"


def _below(value: float | None, null: float | None) -> Outcome:
    opposite = _above(value, null)
    swapped: dict[Outcome, Outcome] = {"shown": "not shown", "not shown": "shown"}
    return swapped.get(opposite, opposite)


@cache
def noise_energy(rows: int, columns: int) -> float:
    """Energy of the 16 largest singular values of Gaussian noise, by the Marchenko-Pastur law of its spectrum."""
    long, short = max(rows, columns), min(rows, columns)
    if short <= _RANK:
        return 1.0
    ratio = short / long
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # Midpoints in an angle, so that the density's square roots at both ends do no harm.
    angles = (np.arange(_POINTS) + 0.5) * math.pi / _POINTS
    values = (low + high) / 2 + (high - low) / 2 * np.cos(angles)
    weights = np.sin(angles) ** 2 / values
    shares = np.cumsum(weights) / weights.sum()
    energies = np.cumsum(weights * values) / (weights * values).sum()
    return float(np.interp(_RANK / short, shares, energies))


@cache
def chance_energy(rows: int, columns: int) -> float:
    """Energy of noise in subspaces of the top 10 % directions on both sides."""
    rank = principal_rank(0.1, min(rows, columns))
    return rank / rows * rank / columns


def _median(diff: Diff, of: Callable[[int, int], float]) -> float | None:
    """Median of what noise gives over the matrices that were measured."""
    assert diff.spectra is not None
    found: list[float] = []
    for row, tensor in enumerate(diff.tensors):
        if diff.spectra.methods[row] and (len(tensor.shape) == 2 or row in diff.spectra.experts):
            found += [of(tensor.shape[-2], tensor.shape[-1])] * diff.spectra.measured(row)
    return float(np.median(found)) if found else None
