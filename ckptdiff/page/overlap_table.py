"""What masks of several runs have in common, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckptdiff.page.heatmap import CellFigure, Grid, Row, heatmaps
from ckptdiff.page.markup import Html, left_out, section, table, tag
from ckptdiff.report.text import NOT_AVAILABLE, number, percent, quantity

if TYPE_CHECKING:  # it brings compiled kernels, which most pages need not wait for
    from ckptdiff.overlap import Overlap, PairCounts

_JACCARD = CellFigure("Jaccard", "what both masks hold, of what either holds", lambda row: row["jaccard"])
_SHARES = {"o1": "{0} also in {1}", "o2": "{1} also in {0}", "jaccard": "Jaccard"}
_CHANCES = {"independent": "chance", "stratified": "by tensor", "conditional": "by size"}


def overlap_section(overlap: Overlap | str) -> Html:
    """What each two masks have in common, beside three kinds of chance; or why that is not known."""
    title = "Overlap of masks"
    if isinstance(overlap, str):
        return section("overlap", title, left_out(overlap))
    warnings = [tag("p", tag("b", "Warning: "), words, class_="warning") for words in overlap.warnings]
    return section("overlap", title, *warnings, *(part for pair in overlap.pairs for part in _pair(overlap, pair)))


def _pair(overlap: Overlap, pair: PairCounts) -> list[Html]:
    one, two = ("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[run % 26] for run in (pair.first, pair.second))
    whole = overlap.overall(pair)
    titles, keys = ["block", "values", f"in {one}", f"in {two}"], []
    for figure, shown in _SHARES.items():
        titles += [shown.format(one, two), *_CHANCES.values()]
        keys += [figure, *(f"{figure}_{kind}" for kind in _CHANCES)]
    cosines = {} if overlap.products is None else {"cosine": "cosine", "random signs": "cosine_null_sd"}
    lines = [
        (
            row["block"],
            quantity(row["numel"]),
            *(_part(row, key) for key in ("masked_1", "masked_2")),
            *(percent(row[key]) for key in keys),
            *(number(row[key]) for key in cosines.values()),
        )
        for row in [*overlap.grouped(pair, "block"), {**whole, "block": "all"}]
    ]
    said = f"{percent(whole['o1'])} of the mask of {one} ({overlap.rules[pair.first]}) is in that of {two} "
    said += f"({overlap.rules[pair.second]}) too; by chance {percent(whole['o1_independent'])}, by chance within each "
    said += f"tensor {percent(whole['o1_stratified'])}"
    if whole["o1_conditional"] is not None:
        said += f", among weights of the same size {percent(whole['o1_conditional'])}"
    if overlap.products is not None:
        said += f". The cosine between the updates is {number(whole['cosine'])}; with random signs it would be 0, give "
        said += f"or take {number(whole['cosine_null_sd'])}"
    places = [facts if facts.compare != "bitwise" else None for facts in overlap.tensors]
    grid = Grid.of([place for place in places if place is not None])

    def of_groups(members: list[list[int]]) -> list[Row]:
        return [{"tensors": len(rows), **overlap.of_group(pair, rows)} for rows in members]

    names = f"{one}: {overlap.runs[pair.first]}; {two}: {overlap.runs[pair.second]}"
    return [
        tag("p", names),
        table([*titles, *cosines], lines),
        tag("p", said, "."),
        heatmaps(grid, [("", grid.cells(places, of_groups))], (_JACCARD,), {}),
    ]


def _part(row: Mapping[str, Any], key: str) -> str:
    return percent(row[key] / row["numel"]) if row["numel"] else NOT_AVAILABLE
