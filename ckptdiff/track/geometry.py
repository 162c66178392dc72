"""Make figures of the Gram matrix of a trajectory: how long its steps are, where they lead, and how straight it is.

G holds the inner products of the updates D_t = W_t - W_0 of all steps t. Beside each figure that a path without any
direction has too stands that of a random walk with steps of the same lengths, whose Gram matrix is known: in so many
dimensions its steps are orthogonal, so that <D_s, D_t> is the sum of the squared lengths of the steps that both have
taken.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GRAM_FIGURES = ("step_rel_norm", "step_cosine", "rank1_share", "rank1_share_null", "line_r2", "line_r2_null")
"""Keys that a Gram matrix adds to the row of a step."""
_ROUNDING = 64 * float(np.finfo(np.float64).eps)
"""A squared step length below this share of what it is the difference of is none."""


def gram_matrix(pairs: Floats) -> Floats:
    """The symmetric matrix, shape (steps, steps), of its lower triangle row by row, shape (pairs,)."""
    steps = (math.isqrt(8 * len(pairs) + 1) - 1) // 2
    gram = np.zeros((steps, steps))
    gram[np.tril_indices(steps)] = pairs
    return gram + np.tril(gram, -1).T


def steps_gram(gram: Floats) -> Floats:
    """Inner products of the single steps W_t - W_{t-1}, shape (steps, steps): second differences of G."""
    points = _with_base(gram)
    found = points[1:] - points[:-1]
    found = found[:, 1:] - found[:, :-1]
    ends = points.diagonal()
    lost = found.diagonal() <= _ROUNDING * (ends[1:] + ends[:-1])
    found[lost], found[:, lost] = 0.0, 0.0
    return found


def _with_base(gram: Floats) -> Floats:
    """The same with W_0, whose update is zero, before the steps."""
    points = np.zeros((len(gram) + 1, len(gram) + 1))
    points[1:, 1:] = gram
    return points


def step_cosines(gram: Floats) -> Floats:
    """Cosines between the single steps, shape (steps, steps); NaN for a step that moved nothing."""
    if not np.isfinite(gram).all():
        return np.full_like(gram, np.nan)
    steps = steps_gram(gram)
    lengths = np.sqrt(steps.diagonal())
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(steps / lengths / lengths[:, np.newaxis], -1.0, 1.0)


def random_walk(gram: Floats) -> Floats:
    """Gram matrix of a random walk whose steps have the same lengths."""
    gone = steps_gram(gram).diagonal().cumsum()
    walk: Floats = np.minimum(gone, gone[:, np.newaxis])
    return walk


def rank1_share(gram: Floats) -> float:
    """Share of sum ||D_t||^2 that the best single direction holds: lambda_1(G) / tr G (arXiv 2605.21468); NaN if none.

    It is 1 if every update is the same direction times a number.
    """
    return _largest_share(gram)


def line_r2(gram: Floats) -> float:
    """R^2 of the straight line that is nearest to the points W_0 to W_t: lambda_1 / tr of their centred Gram matrix.

    It tells a straight path from one that bends, as arXiv 2604.11446 finds it to (and 2605.21468 does not).
    """
    points = _with_base(gram)
    centred = points - points.mean(axis=0)
    return _largest_share(centred - centred.mean(axis=1, keepdims=True))


def _largest_share(gram: Floats) -> float:
    total = float(gram.trace())
    return min(float(np.linalg.eigvalsh(gram)[-1]) / total, 1.0) if total > 0 else math.nan


def gram_row(gram: Floats, base_norm: float) -> dict[str, Any]:
    """:data:`GRAM_FIGURES` of the last step, and of the path up to it; None where undefined.

    One step is a straight line of rank 1, whatever it is, so that it has no such figure.
    """
    found: dict[str, float] = dict.fromkeys(GRAM_FIGURES, math.nan)
    if np.isfinite(gram).all():
        if 0 < base_norm < math.inf:
            found["step_rel_norm"] = math.sqrt(steps_gram(gram)[-1, -1]) / base_norm
        if len(gram) > 1:
            found["step_cosine"] = float(step_cosines(gram)[-1, -2])
            walk = random_walk(gram)
            for key, figure in (("rank1_share", rank1_share), ("line_r2", line_r2)):
                found |= {key: figure(gram), f"{key}_null": figure(walk)}
    return {key: None if math.isnan(value) else value for key, value in found.items()}


def nullable(matrix: Floats) -> list[list[float | None]]:
    """Rows of a matrix as plain values, None where undefined."""
    return [[value if math.isfinite(value) else None for value in row] for row in matrix.tolist()]
