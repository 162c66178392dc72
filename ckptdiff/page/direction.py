"""The sections of a track's page that tell which way the update went, and how far its subspaces stay the same."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ckptdiff.page.heatmap import Row
from ckptdiff.page.markup import Html, left_out, section, tag
from ckptdiff.page.step_pictures import step_lines, step_matrix
from ckptdiff.report.text import number, percent
from ckptdiff.track.geometry import nullable, step_cosines
from ckptdiff.track.result import Track
from ckptdiff.track.subspaces import LOCKING_FIGURES

_STRAIGHT = {
    "rank 1": "rank1_share",
    "rank 1, random walk": "rank1_share_null",
    "line": "line_r2",
    "line, random walk": "line_r2_null",
}


def direction_section(track: Track, steps: Sequence[Row]) -> Html:
    """Which way the update went, of a track with the products of its steps and its overall figures."""
    title = "Which way the update went"
    if len(steps) < 2:
        return section("direction", title, left_out("a track of one step has no other to compare its direction with."))
    last = steps[-1]
    turns = [row["step_cosine"] for row in steps if row["step_cosine"] is not None]
    said = "No two steps in a row moved anything."
    if turns:
        said = f"The median step has a cosine of {number(statistics.median(turns))} with the one before. Steps of a "
        said += "random walk have 0, and where rounding moves the same weights to and fro it is less."
    path = f"The best single direction holds {percent(last['rank1_share'])} of the path, and "
    path += f"{percent(last['rank1_share_null'])} of a random walk with steps of these lengths; the nearest straight "
    path += f"line has an R² of {percent(last['line_r2'])}, and {percent(last['line_r2_null'])}."
    lengths, gone = {"step": "step_rel_norm"}, sum(row["step_rel_norm"] or 0.0 for row in steps)
    away = f"All steps together are {percent(gone)} of the norm of the base long, and end {percent(last['rel_norm'])} "
    away += "away from it."
    pictures = (
        step_matrix("Cosines between steps", nullable(step_cosines(track.gram())), said, signed=True),
        step_lines("How straight the path is", "of the path so far, %", _STRAIGHT, steps, path, None),
        step_lines("Length of each step", "norm of the step / norm of the base, %", lengths, steps, away, None),
    )
    return section("direction", title, tag("div", *pictures, class_="figures"))


def locking_section(track: Track, steps: Sequence[Row]) -> Html:
    """How far the leading singular subspaces of the update stay the same, of a track that has them."""
    assert track.locking is not None
    title = "Spectra"
    if all(row["left_overlap"] is None for row in steps):
        return section("spectra", title, left_out("no matrix has an update at each of two steps in a row."))
    left, left_null, right, right_null = (percent(steps[-1][key]) for key in LOCKING_FIGURES)
    said = "The leading left subspaces of the median matrix's update at the last step and the one before share "
    said += f"{left} (random ones {left_null}), the right ones {right} ({right_null}). An update holds its earlier "
    said += "steps, so that those of a random walk share more and more too."
    keys = {"left": "left_overlap", "left, chance": "left_overlap_null"}
    keys |= {"right": "right_overlap", "right, chance": "right_overlap_null"}
    everything = range(len(track.names))
    pictures = [step_lines("Overlap with the step before", "of the leading subspace, %", keys, steps, said, None)]
    for side in ("left", "right"):
        overlaps = track.locking.matrix(f"{side}_overlap", everything, len(steps))
        meant = f"Overlap of the leading {side} subspaces of the updates of each two steps, of the median matrix."
        pictures.append(step_matrix(f"{side.title()} subspaces", nullable(overlaps), meant, signed=False))
    return section("spectra", title, tag("div", *pictures, class_="figures"))
