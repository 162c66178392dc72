"""Put a page together: sections in their order, the document, the style sheet and the script."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from ckptdiff.figures.result import Diff
from ckptdiff.page.distributions import distributions_section
from ckptdiff.page.heatmap import UPDATE_FIGURES, Cell, Grid, Row, heatmaps
from ckptdiff.page.markup import Html, joined, left_out, section, tag, text
from ckptdiff.page.overlap_table import overlap_section
from ckptdiff.page.sections import (
    claims_section,
    coverage_section,
    headline_section,
    provenance_section,
)
from ckptdiff.page.shown_run import ShownRun
from ckptdiff.page.spectra_picture import spectra_section
from ckptdiff.page.tensor_tables import MEANINGS, movers_section, pair_table, tensor_table
from ckptdiff.report.as_json import document
from ckptdiff.report.rows import View, rows
from ckptdiff.report.text import dumps, percent

if TYPE_CHECKING:
    from ckptdiff.overlap import Overlap

MOST_ROWS = 1000
"""Tensors beyond that are gathered in the table, and left out of the document."""
_LONG = 1_000_000
"""Characters from which on the figures of the document are rounded, to half of their length, and then left out."""
_SHOWN = (
    *("method", "rank", "matrices", "reason", "topk_energy", "error_bound", "stable_rank"),
    *("principal_energy", "principal_coverage", "principal_coverage_null"),
)
"""What is left of the spectra of a tensor then: what the page shows of them."""
_HEADING = re.compile(r'<section id="(\w+)"><h2>([^<]*)</h2>')
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def run_page(runs: Sequence[ShownRun], overlap: Overlap | str | None = None) -> Iterator[str]:
    """Yield the page of a run, or of two beside each other.

    `overlap` is that of the masks of two, or why there is none.
    """
    runs = [replace(run, place=at) for at, run in enumerate(runs)] if len(runs) > 1 else runs
    grid, cells = grid_cells([run.diff for run in runs])
    sections = [
        coverage_section(runs),
        provenance_section(runs),
        headline_section(runs),
        *([] if overlap is None else [overlap_section(overlap)]),
        _heatmap_section(runs, grid, cells),
        distributions_section(runs),
        spectra_section(runs),
        claims_section(runs),
        movers_section(runs),
        _tensors_section(runs, grid, cells),
    ]
    return whole_page(" and ".join(run.name for run in runs), sections, _document(runs, overlap))


def diff_html(diff: Diff) -> Html:
    """What notebooks show of a diff: coverage, headline figures, and where values are unchanged."""
    runs = [ShownRun("", diff, None)]
    grid, (cells,) = grid_cells([diff])
    shown = [heatmaps(grid, [("", cells)], UPDATE_FIGURES[:1], {})] if cells else []
    return joined([tag("h3", runs[0].name), coverage_section(runs), headline_section(runs), *shown])


def grid_cells(diffs: Sequence[Diff]) -> tuple[Grid, list[dict[Cell, Row]]]:
    """The grid that diffs share, and the cells of each; tensors of which only bits are compared have none."""
    places = [
        [facts if valued else None for facts, valued in zip(diff.tensors, diff.columns["valued"] > 0, strict=True)]
        for diff in diffs
    ]
    grid = Grid.of([place for some in places for place in some if place is not None])
    return grid, [grid.cells(some, diff.of_groups) for diff, some in zip(diffs, places, strict=True)]


def whole_page(title: str, sections: Sequence[Html], said: Mapping[str, Any]) -> Iterator[str]:
    """Yield a page of sections, with a document in it.

    Its own policy lets nothing be loaded, and nothing run but its one script.
    """
    style, script = ((resources.files(__package__) / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    links = [tag("a", Html(found[2]), href=f"#{found[1]}") for one in sections if (found := _HEADING.match(one))]
    yield "<!DOCTYPE html>\n" + '<html lang="en"><head>'
    yield tag("meta", charset="utf-8") + tag("meta", http_equiv="Content-Security-Policy", content=Html(policy))
    yield tag("meta", name="viewport", content="width=device-width, initial-scale=1")
    yield tag("meta", name="color-scheme", content="light dark")
    yield tag("title", f"ckptdiff: {title}") + tag("link", rel="icon", href="data:,")
    yield f"<style>{style}</style></head>\n<body>"
    yield tag("h1", title) + tag("nav", *(part for link in links for part in (link, " "))) + "\n"
    yield from sections
    embedded, less = _fitted(said)
    if less:
        yield tag("p", f"Figures of the JSON document in this page are {less}; --format json has all.")
    yield f'<script type="application/json" id="document">{embedded.translate(_ESCAPES)}</script>\n'
    yield f"<script>{script}</script>\n</body></html>\n"


def _fitted(said: Mapping[str, Any]) -> tuple[str, str]:
    """A document as text, and in words what was done to make it short."""
    embedded = dumps(said, compact=True)
    if len(embedded) <= _LONG:
        return embedded, ""
    less, rounded = "rounded to nine digits", _rounded(said)
    embedded = dumps(rounded, compact=True)
    if len(embedded) > _LONG and _without_spectra(rounded):
        less += ", and tensors lack those of spectra that it does not show"
        embedded = dumps(rounded, compact=True)
    return embedded, less


def _without_spectra(said: dict[str, Any]) -> bool:
    """Leave out of each tensor what the page does not show of its spectra; tell whether there was any."""
    if "runs" in said:
        found = [_without_spectra(run) for run in said["runs"]]
        return any(found)
    measured = [row for row in said.get("tensors", ()) if row.get("spectral")]
    for row in measured:
        row["spectral"] = {key: row["spectral"][key] for key in _SHOWN}
    return bool(measured)


def _rounded(said: Any) -> Any:
    if isinstance(said, Mapping):
        return {key: _rounded(value) for key, value in said.items()}
    if isinstance(said, list):
        return [_rounded(value) for value in said]
    return float(f"{said:.9g}") if isinstance(said, float) else said


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _heatmap_section(runs: Sequence[ShownRun], grid: Grid, cells: Sequence[Mapping[Cell, Row]]) -> Html:
    title = "Module types and layers"
    if not any(cells):
        return section("heatmap", title, left_out("no floating values on both sides."))
    notes = [
        f"{run.prefix}Of all values {percent(run.diff.overall['unchanged_bitwise'])} are unchanged; noise of "
        f"the update's norm, rounded, would leave {percent(run.diff.overall['unchanged_null'])}."
        for run in runs
    ]
    named = [(f"{run.prefix}{run.name}", found) for run, found in zip(runs, cells, strict=True)]
    return section("heatmap", title, heatmaps(grid, named, UPDATE_FIGURES, {"unchanged": " ".join(notes)}))


def _tensors_section(runs: Sequence[ShownRun], grid: Grid, cells: Sequence[Mapping[Cell, Row]]) -> Html:
    most = max(len(run.diff.tensors) for run in runs)
    if most > MOST_ROWS:
        found = [[group_row(grid, cell, row) for cell, row in some.items()] for some in cells]
        note = tag(
            "p",
            f"Of more than {MOST_ROWS:,} tensors ({most:,}), those of a module type and layer share a row; "
            "ckptdiff show RUN.h5 --by tensor prints each.",
        )
    else:
        found, note = [rows(run.diff, View("tensor")) for run in runs], text("")
    shown = tensor_table(found[0], runs[0].diff, "rows") if len(runs) == 1 else pair_table(found, "rows")
    return section("tensors", "All tensors", note, shown, tag("p", MEANINGS))


def group_row(grid: Grid, cell: Cell, row: Row) -> dict[str, Any]:
    """Figures of a cell as a row of a table, which says what it is."""
    return {"label": cell[0], "layers": grid.layer_name(cell[1]), **row}


def _document(runs: Sequence[ShownRun], overlap: Overlap | str | None) -> dict[str, Any]:
    found = [document(run.diff, tensors=len(run.diff.tensors) <= MOST_ROWS) for run in runs]
    if len(found) == 1:
        return found[0]
    known = overlap.as_json() if overlap is not None and not isinstance(overlap, str) else None
    return {"schema": "ckptdiff.report/1", "runs": found, "overlap": known}
