"""The page of a track file: how an update grew, step by step."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckptdiff.checkpoint import locate_all
from ckptdiff.errors import plural
from ckptdiff.page.assemble import MOST_ROWS, group_row, whole_page
from ckptdiff.page.direction import direction_section, locking_section
from ckptdiff.page.heatmap import Cell, CellFigure, Grid, Row, heatmaps
from ckptdiff.page.markup import Html, exact, joined, left_out, section, table, tag
from ckptdiff.page.step_pictures import BOTTOM, LEFT, RIGHT, TOP, WIDTH, step_axis, step_lines
from ckptdiff.page.svg import Axis, legend, picture, shares_axis
from ckptdiff.report.summary import side_name
from ckptdiff.report.text import percent, quantity, shape_text
from ckptdiff.track.result import Track

_MOVED = {"touched": "new", "churned": "churned", "reverted": "reverted", "returned": "returned"}
"""What moved in a step, by the key of its count, with its title."""
_MOVED_COLORS = ("#1b4f8f", "#7aa9d6", "#b96c1c", "#f0c48b")
_MEANINGS = (
    "support: part that differs from the base; new: never did before; returned: did, but not one step ago; reverted: "
    "back at the base; churned: was in the support, and has another value; union: part that ever differed; update: "
    "norm of d / norm of the base."
)
_FIGURES = (
    CellFigure(
        "support", "part of the values that differs from the base at the last step", lambda row: row["support_fraction"]
    ),
    CellFigure("union", "part of the values that has ever differed", lambda row: row["union_fraction"]),
    CellFigure("relative update", "norm of d / norm of the base at the last step", lambda row: row["rel_norm"]),
    CellFigure("rank 1", "part of the path that lies in its best single direction", lambda row: row.get("rank1_share")),
    CellFigure("line", "R² of the straight line nearest to the path", lambda row: row.get("line_r2")),
    CellFigure(
        "left overlap",
        "overlap of the leading left subspaces of the last update and of the one before; the median matrix of the cell",
        lambda row: row.get("left_overlap"),
    ),
)


def track_page(track: Track, path: str) -> Iterator[str]:
    """Yield the page of a track file."""
    grid, cells = _cells(track)
    steps = track.overall()
    none = left_out("track files hold none; ckptdiff diff measures them for a pair.")
    unmeasured = section("spectra", "Spectra", left_out("not measured; ckptdiff track --spectra measures them."))
    sections = [
        _coverage(track, steps),
        _provenance(track, path),
        section("headline", "Step by step", _step_table(track, steps), tag("p", _MEANINGS)),
        section("growth", "Growth of the update", *_growth(steps)),
        *([] if track.products is None else [direction_section(track, steps)]),
        section("heatmap", "Module types and layers, at the last step", heatmaps(grid, [("", cells)], _FIGURES, {})),
        section("distributions", "Distributions", none),
        unmeasured if track.locking is None else locking_section(track, steps),
        _tensors(track, grid, cells),
    ]
    said = track.as_json(tensors=len(track.names) <= MOST_ROWS)
    return whole_page(f"{side_name(track.base)}, {plural(len(steps), 'step')}", sections, said)


def track_html(track: Track) -> Html:
    """What notebooks show of a track: the figures of each step, and where the last one differs from the base."""
    grid, cells = _cells(track)
    shown = heatmaps(grid, [("", cells)], _FIGURES[:1], {})
    return joined([tag("h3", track.base), _coverage(track, steps := track.overall()), _step_table(track, steps), shown])


def _cells(track: Track) -> tuple[Grid, dict[Cell, Row]]:
    """Figures of the last step, by module type and layer."""
    places = list(locate_all(dict(zip(track.names, track.shapes, strict=True))).values())
    grid = Grid.of(places)

    def of_groups(members: list[list[int]]) -> list[Row]:
        return [{**track.last_of_group(rows), "tensors": len(rows)} for rows in members]

    return grid, grid.cells(places, of_groups)


def _coverage(track: Track, steps: Sequence[Row]) -> Html:
    warnings = [tag("p", tag("b", "Warning: "), words, class_="warning") for words in track.warnings]
    held = f"{plural(len(track.names), 'tensor')}, {steps[0]['numel']:,} values"
    followed = tag("p", f"{held}, followed through {plural(len(steps), 'step')}.")
    return section("coverage", "Coverage and warnings", *warnings, followed)


def _provenance(track: Track, path: str) -> Html:
    lines = [("base", track.base), *((at, step) for at, step in enumerate(track.steps, 1))]
    words = ["ckptdiff", "track", track.base, *track.steps]
    words += [] if track.compare == "bf16" else ["--compare", track.compare]
    words += [] if track.products is None else ["--gram"]
    words += [] if track.locking is None else ["--spectra"]
    parts = [
        table(("step", "path"), lines, left=2),
        tag(
            "p",
            f"Track file: {path}; compared as {track.compare}. To make it again, if all tensors were followed:",
        ),
        tag("pre", exact(shlex.join([*words, "-o", path]))),
    ]
    return section("provenance", "What was compared", *parts)


def _step_table(track: Track, steps: Sequence[Row]) -> Html:
    titles = ("step", "support", *_MOVED.values(), "union", "update")
    lines = [
        (
            f"{at}: {side_name(path)}",
            percent(row["support_fraction"]),
            *(quantity(row[key]) for key in _MOVED),
            percent(row["union_fraction"]),
            percent(row["rel_norm"]),
        )
        for at, (path, row) in enumerate(zip(track.steps, steps, strict=True), 1)
    ]
    return table(titles, lines)


def _growth(steps: Sequence[Row]) -> list[Html]:
    if len(steps) < 2:
        return [left_out("a track of one step does not grow.")]
    last = steps[-1]
    support, union = percent(last["support_fraction"]), percent(last["union_fraction"])
    grown = f"After {len(steps)} steps {support} of the values differ from the base, and {union} ever did."
    moved = {title: sum(row[key] for row in steps) for key, title in _MOVED.items()}
    total = sum(moved.values()) or 1
    shares = ", ".join(f"{percent(count / total)} {title}" for title, count in moved.items())
    first, final = (percent(row["rel_norm"]) for row in (steps[0], last))
    norms = f"The relative update goes from {first} at the first step to {final} at the last."
    return [
        tag(
            "div",
            step_lines(
                "Support and union",
                "of all values, %",
                {"union": "union_fraction", "support": "support_fraction"},
                steps,
                grown,
            ),
            _bars("What moved in each step", steps, f"Of all that moved: {shares}."),
            step_lines("Relative update", "norm of d / norm of the base, %", {"update": "rel_norm"}, steps, norms),
            class_="figures",
        )
    ]


def _bars(title: str, steps: Sequence[Row], said: str) -> Html:
    numel = steps[0]["numel"] or 1
    x = Axis(0, len(steps), LEFT, RIGHT)
    top = max(sum(row[key] for key in _MOVED) for row in steps) / numel
    y = Axis(0.0, top * 1.05 or 1.0, BOTTOM, TOP)
    marks = [*shares_axis(y, LEFT, RIGHT, "of all values, %"), *step_axis(x)]
    width = min(0.8 * (RIGHT - LEFT) / len(steps), 40.0)
    for at, row in enumerate(steps, 1):
        below = 0.0
        for color, (key, name) in zip(_MOVED_COLORS, _MOVED.items(), strict=True):
            share = row[key] / numel
            hint = tag("title", f"{name}, step {at}: {percent(share)}")
            up = y.at(below + share)
            if share:
                marks.append(
                    tag(
                        "rect",
                        hint,
                        x=x.at(at - 0.5) - width / 2,
                        y=up,
                        width=width,
                        height=y.at(below) - up,
                        fill=color,
                    )
                )
            below += share
    entries = [("bar", color, name) for color, name in zip(_MOVED_COLORS, _MOVED.values(), strict=True)]
    marks += legend(LEFT, BOTTOM + 50, entries)
    return tag("figure", tag("h3", title), picture(WIDTH, BOTTOM + 40 + 16 * 4, title, *marks), tag("figcaption", said))


def _tensors(track: Track, grid: Grid, cells: Mapping[Cell, Row]) -> Html:
    columns: dict[str, Callable[[Any], str]] = {
        "values": lambda row: quantity(row["numel"]),
        "support": lambda row: percent(row["support_fraction"]),
        "union": lambda row: percent(row["union_fraction"]),
        "update": lambda row: percent(row["rel_norm"]),
    }
    if len(track.names) > MOST_ROWS:
        rows = [group_row(grid, cell, row) for cell, row in cells.items()]
        head: tuple[str, ...] = ("module type", "layer", "tensors")
        lines = [
            (row["label"], row["layers"], row["tensors"], *(spell(row) for spell in columns.values())) for row in rows
        ]
        note = [tag("p", f"Of {len(track.names):,} tensors, those of a module type and layer share a row.")]
    else:
        head, note = ("tensor", "shape"), []
        lines = [
            (name, shape_text(shape), *(spell(track.counts_of([at])[-1]) for spell in columns.values()))
            for at, (name, shape) in enumerate(zip(track.names, track.shapes, strict=True))
        ]
    return section("tensors", "All tensors, at the last step", *note, table((*head, *columns), lines, name="rows"))
