"""Pictures of spectra: each module type's median and spread over its matrices, beside noise of the same shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ckptdiff.claims.judge import chance_energy, noise_energy
from ckptdiff.errors import plural
from ckptdiff.figures.result import Diff
from ckptdiff.figures.spectral import SPECTRAL_KEYS
from ckptdiff.page.markup import Html, left_out, section, tag
from ckptdiff.page.shown_run import Floats, ShownRun
from ckptdiff.page.svg import NULL, Axis, Picture, diamond, legend, line, picture, share_text, shortened, width_of, word
from ckptdiff.report.spectra_section import left_out_matrices
from ckptdiff.report.text import number, percent

_WIDTH, _ROW, _TOP, _RIGHT = 370.0, 22.0, 42.0, 350.0
_LETTERS = 16


def noise_stable_rank(rows: int, columns: int) -> float:
    """Stable rank of large Gaussian noise: its largest singular value is about sqrt(m) + sqrt(n)."""
    return rows * columns / (math.sqrt(rows) + math.sqrt(columns)) ** 2


@dataclass(frozen=True, slots=True)
class _Kind:
    title: str
    unit: str
    """What the axis counts."""
    key: str
    null: Callable[[int, int], float] | str
    """Of a shape, or the key of the figure that is the null."""
    against: str
    """What the null is."""
    said: str
    share: bool = True


_ALL = (
    _Kind(
        "Energy in the top 16 singular values",
        "of the sum of d², %",
        "topk_energy_16",
        noise_energy,
        "noise of these shapes",
        "16 singular values hold {} of the median update's energy",
    ),
    _Kind(
        "Stable rank of the update",
        "norm(d)² / s₁²",
        "stable_rank",
        noise_stable_rank,
        "noise of these shapes",
        "the median update has a stable rank of {}",
        share=False,
    ),
    _Kind(
        "Energy in the base's principal directions",
        "of the sum of d², %",
        "principal_energy_0.1",
        chance_energy,
        "noise without a direction",
        "the top 10 % singular directions of W0, left and right at once, hold {} of the median update's energy",
    ),
    _Kind(
        "Changes on the base's principal weights",
        "of the changed, %",
        "principal_coverage_0.1",
        "principal_coverage_null_0.1",
        "rounded noise",
        "the 10 % principal weights hold {} of the median matrix's changes",
    ),
)
KINDS = {kind.key: kind for kind in _ALL}
"""What is drawn of spectra, by the flat key of its figure."""


def spectra_section(runs: Sequence[ShownRun]) -> Html:
    """The section of spectra, of one run or of two in the same pictures."""
    missing = [_without(run) for run in runs if run.diff.spectra is None]
    known = [run for run in runs if run.diff.spectra is not None]
    modules = [module_rows(run.diff) for run in known]
    if not any(modules):
        nothing = [left_out("no matrix with an update.")] if known else []
        return section("spectra", "Spectra", *missing, *nothing)
    drawn = [figure for kind in KINDS.values() if (figure := spectra_picture(kind, known, modules)) is not None]
    reasons = [tag("p", words) for run in known for words in left_out_matrices(run.diff)]
    return section(
        "spectra",
        "Spectra",
        *missing,
        tag("div", *(Html(one._repr_html_()) for one in drawn), class_="figures"),
        *reasons,
    )


def _without(run: ShownRun) -> Html:
    whose = f"{run.prefix}{run.name}" if run.prefix else "the run file"
    return left_out(f"{whose} holds no spectra; ckptdiff spectra add RUN.h5 --spectra exact measures them.")


def module_rows(diff: Diff) -> dict[str, list[int]]:
    """Tensors whose matrices were measured and moved, by module type."""
    assert diff.spectra is not None
    moved, towers = diff.columns["delta_norm"] > 0, {facts.tower for facts in diff.tensors}
    found: dict[str, list[int]] = {}
    for row, facts in enumerate(diff.tensors):
        native = len(facts.shape) == 2 or row in diff.spectra.experts
        if native and moved[row] and diff.spectra.measured(row):
            name = facts.module_type if len(towers) == 1 else f"{facts.tower} {facts.module_type}"
            found.setdefault(name, []).append(row)
    return found


def matrix_values(diff: Diff, key: str, rows: Sequence[int]) -> Floats:
    """A figure of every matrix of some tensors, undefined ones left out; experts count one by one."""
    assert diff.spectra is not None
    at, experts = SPECTRAL_KEYS.index(key), diff.spectra.experts
    alone = np.array([row for row in rows if row not in experts], np.intp)
    stacks = (experts[row][:, at] for row in rows if row in experts)
    values: Floats = np.concatenate([diff.spectra.columns[key][alone], *stacks])
    return values[~np.isnan(values)]


def null_values(diff: Diff, kind: Callable[[int, int], float] | str, rows: Sequence[int]) -> Floats:
    """What noise would give for every matrix of some tensors."""
    assert diff.spectra is not None
    if isinstance(kind, str):
        return matrix_values(diff, kind, rows)
    shapes: dict[tuple[int, int], int] = {}
    for row in rows:
        *_, high, wide = diff.tensors[row].shape
        shapes[high, wide] = shapes.get((high, wide), 0) + diff.spectra.measured(row)
    return np.repeat([kind(*shape) for shape in shapes], list(shapes.values()))


def spectra_picture(kind: _Kind, known: Sequence[ShownRun], modules: Sequence[dict[str, list[int]]]) -> Picture | None:
    """A figure of the matrices of each module type, of one run or of two; None where it is undefined everywhere."""
    names = list(dict.fromkeys(name for found in modules for name in found))
    values = [
        {name: matrix_values(run.diff, kind.key, rows) for name, rows in found.items()}
        for run, found in zip(known, modules, strict=True)
    ]
    nulls = [
        {name: null_values(run.diff, kind.null, rows) for name, rows in found.items()}
        for run, found in zip(known, modules, strict=True)
    ]
    names = [name for name in names if any(found.get(name, np.empty(0)).size for found in values)]
    if not names:
        return None
    drawn = [value for found in (*values, *nulls) for name in names for value in found.get(name, ())]
    left = max(width_of(shortened(name, _LETTERS)) for name in names) + 10
    x = Axis(0.0, max(drawn) * 1.03, left, _RIGHT)
    bottom = _TOP + _ROW * len(names)
    marks: list[Html] = [word(2, 12, kind.unit)]
    for value in x.ticks(6):
        place = x.at(value)
        label = share_text(value) if kind.share else f"{value:g}"
        marks += [line(place, _TOP - 6, place, bottom), word(place, _TOP - 12, label, "middle")]
    for down, name in enumerate(names):
        middle = _TOP + _ROW * (down + 0.5)
        marks.append(word(left - 6, middle + 4, shortened(name, _LETTERS), "end"))
        for at, (found, null) in enumerate(zip(values, nulls, strict=True)):
            y = middle + (8 * at - 4 if len(known) > 1 else 0)
            marks += _spread(name, found.get(name), null.get(name), x, y, known[at].color, kind)
    entries = [
        ("dot", run.color, f"{run.prefix}{run.name}" if run.prefix else "median; thick: quartiles, thin: all")
        for run in known
    ]
    entries.append(("diamond", NULL, f"median of {kind.against}"))
    marks += legend(left, bottom + 18, entries)
    said = " ".join(_sentence(kind, run, values[at], nulls[at]) for at, run in enumerate(known))
    height = bottom + 24 + 16 * (len(entries) - 1)
    return Picture(picture(_WIDTH, height, kind.title, *marks), kind.title, said)


def _spread(
    name: str, values: Floats | None, null: Floats | None, x: Axis, y: float, color: str, kind: _Kind
) -> list[Html]:
    if values is None or not values.size:
        return []
    low, first, median, third, high = (float(np.quantile(values, q)) for q in (0.0, 0.25, 0.5, 0.75, 1.0))
    spell = percent if kind.share else number
    hint = (
        f"{name}: median {spell(median)} of {plural(values.size, 'matrix', 'matrices')}, {spell(low)} to {spell(high)}"
    )
    marks = [
        line(x.at(low), y, x.at(high), y, stroke=color, stroke_opacity=1, stroke_width=1),
        line(x.at(first), y, x.at(third), y, stroke=color, stroke_opacity=1, stroke_width=5),
    ]
    if null is not None and null.size:
        hint += f"; {kind.against} {spell(float(np.median(null)))}"
        marks.append(diamond(x.at(float(np.median(null))), y, NULL))
    return [*marks, tag("circle", tag("title", hint), cx=x.at(median), cy=y, r=4, fill=color)]


def _sentence(kind: _Kind, run: ShownRun, values: dict[str, Floats], nulls: dict[str, Floats]) -> str:
    spell = percent if kind.share else number
    whole = np.concatenate([*values.values(), np.empty(0)])
    if not whole.size:
        return ""
    said = kind.said.format(spell(float(np.median(whole))))
    null = np.concatenate([*nulls.values(), np.empty(0)])
    if null.size:
        said += f"; of {kind.against}, {spell(float(np.median(null)))}"
    medians = {name: float(np.median(found)) for name, found in values.items() if found.size}
    if len(medians) > 1:
        most = max(medians, key=lambda name: medians[name])
        said += f". {most} has the largest median ({spell(medians[most])})"
    return f"{run.prefix}{said[0].upper()}{said[1:]}."
