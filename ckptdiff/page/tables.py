"""The tables of a page: what was compared, headline figures beside their nulls, claims, movers, all tensors."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptdiff.claims import Verdict, judge_claims
from ckptdiff.claims.judge import chance_energy, noise_energy
from ckptdiff.errors import plural
from ckptdiff.figures.catalogue import parameter_key
from ckptdiff.figures.result import SIDES, Diff
from ckptdiff.overlap import Overlap
from ckptdiff.page.markup import Html, left_out, section, table, tag, text
from ckptdiff.page.source import Run
from ckptdiff.page.spectra_picture import module_rows, noise_stable_rank, null_values
from ckptdiff.report.coverage_lines import coverage_lines
from ckptdiff.report.rows import View, rows
from ckptdiff.report.summary import verdict_lines
from ckptdiff.report.text import NOT_AVAILABLE, number, percent, quantity, shape_text, size

_EPS, _RHO = parameter_key(1e-5), parameter_key(0.1)
_MOVERS = 10
_DIGITS = 16
"""Of a hash, where the whole of it is in the document."""

Figures = Mapping[str, Any]


def coverage_section(runs: Sequence[Run]) -> Html:
    """Warnings, whether both sides are the same, and how much of them was compared."""
    parts = []
    for run in runs:
        found = [tag("p", tag("b", "Warning: "), words, class_="warning") for words in run.diff.warnings]
        found += [tag("p", _capital(words), ".") for words in verdict_lines(run.diff)]
        parts += [*_heading(run, runs), *found, tag("ul", *(tag("li", words) for words in coverage_lines(run.diff)))]
    return section("coverage", "Coverage and warnings", *parts)


def _heading(run: Run, runs: Sequence[Run]) -> list[Html]:
    return [tag("h3", letter(run, runs), run.name)] if len(runs) > 1 else []


def letter(run: Run, runs: Sequence[Run]) -> str:
    """Which of two runs it is."""
    return f"{'AB'[runs.index(run)]}: " if len(runs) > 1 else ""


def provenance_section(runs: Sequence[Run]) -> Html:
    """Both sides of each run, how they were compared, and the command that does it again."""
    return section("provenance", "What was compared", *(part for run in runs for part in _provenance(run, runs)))


def _provenance(run: Run, runs: Sequence[Run]) -> Iterator[Html]:
    diff = run.diff
    yield from _heading(run, runs)
    yield table(
        ("side", "path", "revision", "stored as", "tensors", "values", "bytes"),
        [_side(side, facts) for side, facts in zip(SIDES, (diff.base, diff.tuned), strict=True)],
        left=4,
    )
    compared = sorted({facts.compare for facts in diff.tensors})
    device = diff.run.get("device")
    facts = {
        "Run file": run.path,
        "Compared as": f"{', '.join(compared)} (--compare {diff.compare})",
        "Mask": diff.mask_rule,
        "Spectra": diff.spectra.mode if diff.spectra is not None else "none",
        "Measured": f"{diff.run.get('started', 'at an unknown time')}, ckptdiff {diff.ckptdiff_version}"
        + (f", on {device}" if device else ""),
    }
    yield tag("ul", *(tag("li", tag("b", f"{key}: "), value) for key, value in facts.items()))
    yield tag("p", "To make it again:")
    yield tag("pre", command(run))
    shards = [
        (
            side,
            shard["file"],
            f"{shard['size']:,}",
            tag("code", shard["header_sha256"][:_DIGITS], title=shard["header_sha256"]),
        )
        for side, facts in zip(SIDES, (diff.base, diff.tuned), strict=True)
        for shard in facts.get("shards", ())
    ]
    if shards:
        shown = table(("side", "file", "bytes", "SHA-256 of its header"), shards, left=2)
        yield tag("details", tag("summary", f"{plural(len(shards), 'file')} and their hashes"), shown)


def _side(side: str, facts: Figures) -> tuple[object, ...]:
    path = str(facts.get("path", ""))
    before, snapshots, after = path.partition("/snapshots/")
    revision = after.split("/")[0] if snapshots and before else "none in the path"
    values = _counted(facts.get("values", facts.get("numel")))
    stored = ", ".join(facts.get("dtypes", ()))
    return side, path, revision, stored, number(facts.get("tensors")), values, _counted(facts.get("bytes"), size)


def _counted(value: int | None, spell: Any = None) -> str:
    return NOT_AVAILABLE if value is None else spell(value) if spell else f"{value:,}"


def command(run: Run) -> str:
    """The command that makes such a run file again, with the options that matter to its figures."""
    diff, options = run.diff, run.diff.options
    words = ["ckptdiff", "diff", str(diff.base.get("path")), str(diff.tuned.get("path"))]
    for key, usual in (("compare", "bf16"), ("values", "model"), ("mask", "abs:1e-05")):
        if (value := options.get(key, usual)) != usual:
            words += [f"--{key}", value]
    for key, flag in (("renames", "--map"), ("include", "--include"), ("exclude", "--exclude"), ("groups", "--group")):
        for value in options.get(key, ()):
            words += [flag, value]
    if diff.spectra is not None:
        words += ["--spectra", diff.spectra.mode]
        seed = (options.get("spectra") or {}).get("seed", 0)
        words += ["--seed", str(seed)] if seed else []
    return shlex.join([*words, "-o", run.path])


@dataclass(frozen=True, slots=True)
class Headline:
    """A figure of a pair, what it is held against, and what that is."""

    name: str
    value: str
    null: str = "none"
    against: str = ""


def headline_section(runs: Sequence[Run]) -> Html:
    """The headline figures, each beside its null."""
    found = [list(headlines(run.diff)) for run in runs]
    if not any(found):
        return section(
            "headline", "Headline figures", left_out("no floating values on both sides: nothing to measure.")
        )
    by_name = [{one.name: one for one in some} for some in found]
    names = list(dict.fromkeys(one.name for some in found for one in some))
    titles: list[str] = ["figure"]
    for run in runs:
        titles += [f"{letter(run, runs)}{'this pair' if len(runs) == 1 else run.name}", "its null"]
    lines = []
    for name in names:
        known = [some.get(name) for some in by_name]
        cells = [cell for one in known for cell in ((one.value, one.null) if one else (NOT_AVAILABLE, ""))]
        lines.append((name, *cells, next((one.against for one in known if one and one.against), "")))
    return section("headline", "Headline figures", table((*titles, "what the null is"), lines))


def headlines(diff: Diff) -> Iterator[Headline]:
    """Those of all values, then those of the median matrix; figures that are undefined are left out."""
    whole, median = diff.overall, diff.median_2d
    if whole["unchanged_bitwise"] is None:
        return
    noise = "noise of the update's norm, rounded"
    size_alike = "noise that changes as many, rounded; by chance 10 %"
    yield _headline("unchanged, after the cast", whole["unchanged_bitwise"], whole["unchanged_null"], noise)
    if whole["unchanged_stored"] is not None:
        yield _headline("unchanged, as stored", whole["unchanged_stored"])
        yield _headline("part of the sum of d² that vanishes in the cast", whole["absorbed_energy"])
    yield _headline("|d| ≤ 1e-5", whole["unchanged_abs"][_EPS])
    yield _headline("relative update: norm of d / norm of W0", whole["rel_norm"])
    yield Headline("largest |d|", number(whole["max_abs"]))
    yield _headline("sum of d² in the 1 % largest |d|", whole["coord_energy"]["1"], 0.01, "all |d| equal")
    low, null = whole["low_coverage"][_RHO], whole["low_coverage_null"][_RHO]
    yield _headline("changes on the 10 % smallest weights", low, null, size_alike)
    if whole["changed"] is not None and (values := int(diff.columns["numel"][diff.columns["valued"] > 0].sum())):
        yield _headline("in the mask", whole["changed"] / values)
    if median["rel_norm"] is not None:
        yield _headline("median matrix: unchanged", median["unchanged_bitwise"], median["unchanged_null"], noise)
        yield _headline("median matrix: relative update", median["rel_norm"])
    yield from _spectral(diff, size_alike)


def _spectral(diff: Diff, size_alike: str) -> Iterator[Headline]:
    spectral = diff.median_2d.get("spectral")
    if not spectral or spectral["method"] is None:
        return
    chosen = [row for some in module_rows(diff).values() for row in some]

    def null(of: Any) -> float | None:
        found = null_values(diff, of, chosen)
        return float(np.median(found)) if found.size else None

    shapes = "noise of these shapes"
    yield _headline(
        "median matrix: energy in 16 singular values", spectral["topk_energy"]["16"], null(noise_energy), shapes
    )
    rank = null(noise_stable_rank)
    yield Headline("median matrix: stable rank", number(spectral["stable_rank"]), number(rank), shapes)
    energy = spectral["principal_energy"][_RHO]
    yield _headline(
        "median matrix: energy in the top 10 % directions of W0",
        energy,
        null(chance_energy),
        "noise without a direction",
    )
    covered, rounding = spectral["principal_coverage"][_RHO], spectral["principal_coverage_null"][_RHO]
    yield _headline("median matrix: changes on the 10 % principal weights", covered, rounding, size_alike)


def _headline(name: str, value: float | None, null: float | None = None, against: str = "") -> Headline:
    return Headline(name, percent(value), percent(null) if against else "none", against)


def claims_section(runs: Sequence[Run]) -> Html:
    """What the paper claims of such updates, judged for each pair."""
    parts = []
    for run in runs:
        parts += _heading(run, runs)
        if run.diff.spectra is None:
            parts.append(left_out("claims are judged by spectra, and the run file holds none."))
            continue
        lines = [
            (tag("b", verdict.outcome), Html(f"{text(_capital(verdict.claim))}: {text(_because(verdict))}"))
            for verdict in judge_claims(run.diff)
        ]
        parts.append(table(("verdict", "claim, and why"), lines, left=2))
    source = tag(
        "p",
        "Of arXiv 2606.13657, for any pair; each against what chance, or noise of its size after rounding, would give.",
    )
    return section("claims", "The paper's claims", source, *parts)


def _because(verdict: Verdict) -> str:
    """What a sentence says behind the claim and its outcome."""
    return verdict.sentence.removeprefix(f"{verdict.claim}: {verdict.outcome}; ")


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def movers_section(runs: Sequence[Run]) -> Html:
    """The tensors with most of the update."""
    parts = []
    for run in runs:
        moved = int(np.count_nonzero(run.diff.columns["delta_norm"] > 0))
        parts += _heading(run, runs)
        if not moved:
            parts.append(left_out("no tensor has an update."))
            continue
        found = rows(run.diff, View("tensor", "delta_energy_share", min(_MOVERS, moved)))
        held = percent(sum(row["delta_energy_share"] or 0.0 for row in found))
        parts += [
            tag("p", f"{plural(len(found), 'tensor')} of {moved:,} that moved hold {held} of the sum of d²."),
            tensor_table(found, run.diff),
        ]
    return section("movers", "Movers", *parts)


def tensor_table(found: Sequence[Figures], diff: Diff, name: str | None = None) -> Html:
    """A table of tensors, or of groups of them."""
    single = not found or "name" in found[0]
    spectra = diff.spectra is not None
    titles = ["tensor", "shape", "stored"] if single else ["module type", "layer", "tensors"]
    titles += ["values", "unchanged", "noise", "|d| ≤ 1e-5", "update", "share", "low 10 %", "rounding", "max |d|"]
    titles += ["top 16", "stable rank"] if spectra else []
    return table(
        titles, (_cells(row, single=single, spectra=spectra) for row in found), left=3 if single else 1, name=name
    )


def _cells(row: Figures, *, single: bool, spectra: bool) -> list[object]:
    if single:
        base, tuned = row["dtype_base"], row["dtype_tuned"]
        head = [row["name"], shape_text(tuple(row["shape"])), base if base == tuned else f"{base} → {tuned}"]
    else:
        head = [row["label"], row["layers"], f"{row['tensors']:,}"]
    cells = [
        *head,
        quantity(row["numel"]),
        percent(row["unchanged_bitwise"]),
        percent(row["unchanged_null"]),
        percent(row["unchanged_abs"][_EPS]),
        percent(row["rel_norm"]),
        percent(row["delta_energy_share"]),
        percent(row["low_coverage"][_RHO]),
        percent(row["low_coverage_null"][_RHO]),
        number(row["max_abs"]),
    ]
    if spectra:
        found = row["spectral"]
        cells += [percent(found["topk_energy"]["16"]), number(found["stable_rank"])] if found else ["", ""]
    return cells


def pair_table(found: Sequence[Sequence[Figures]], name: str) -> Html:
    """A table of the same tensors, or groups of them, of two runs beside each other."""
    by_name = [{row.get("name") or (row["label"], row["layers"]): row for row in some} for some in found]
    single = any("name" in row for some in found for row in some)
    titles = ["tensor"] if single else ["module type", "layer"]
    kinds: tuple[tuple[str, Callable[[Figures], float | None]], ...] = (
        ("unchanged", lambda row: row["unchanged_bitwise"]),
        ("noise", lambda row: row["unchanged_null"]),
        ("|d| ≤ 1e-5", lambda row: row["unchanged_abs"][_EPS]),
        ("update", lambda row: row["rel_norm"]),
        ("share", lambda row: row["delta_energy_share"]),
        ("low 10 %", lambda row: row["low_coverage"][_RHO]),
        ("rounding", lambda row: row["low_coverage_null"][_RHO]),
    )
    titles += [f"{title}, {side}" for title, _ in kinds for side in "AB"]
    lines = []
    for key in dict.fromkeys(key for some in by_name for key in some):
        both = [some.get(key) for some in by_name]
        cells = [percent(of(row)) if row is not None else "" for _, of in kinds for row in both]
        lines.append([*([key] if single else key), *cells])
    return table(titles, lines, left=1, name=name)


def overlap_section(overlap: Overlap | str) -> Html:
    """What the masks of two runs have in common, beside three kinds of chance."""
    title = "Overlap of A and B"
    if isinstance(overlap, str):
        return section("overlap", title, left_out(overlap))
    (pair,) = overlap.pairs
    whole = overlap.overall(pair)
    titles = ["block", "values", "in A", "in B"]
    keys = []
    for figure, shown in (("o1", "A also in B"), ("o2", "B also in A"), ("jaccard", "Jaccard")):
        titles += [shown, "chance", "by tensor", "by size"]
        keys += [figure, *(f"{figure}_{kind}" for kind in ("independent", "stratified", "conditional"))]
    lines = [
        (
            row["block"],
            quantity(row["numel"]),
            *(_part(row, key) for key in ("masked_1", "masked_2")),
            *(percent(row[key]) for key in keys),
        )
        for row in [*overlap.grouped(pair, "block"), {**whole, "block": "all"}]
    ]
    said = (
        f"{percent(whole['o1'])} of what is in the mask of A ({overlap.rules[0]}) is in that of B ({overlap.rules[1]}) "
        f"too; by chance {percent(whole['o1_independent'])}, by chance within each tensor "
        f"{percent(whole['o1_stratified'])}, among weights of the same size {percent(whole['o1_conditional'])}."
    )
    warnings = [tag("p", tag("b", "Warning: "), words, class_="warning") for words in overlap.warnings]
    return section("overlap", title, *warnings, tag("p", said), table(titles, lines))


def _part(row: Figures, key: str) -> str:
    return percent(row[key] / row["numel"]) if row["numel"] else NOT_AVAILABLE


MEANINGS = (
    "noise: unchanged, if the update were noise of its norm, rounded. update: norm of d / norm of W0. share: part of "
    "the sum of d² of all tensors. low 10 %: part of the changes that is on the 10 % smallest weights; rounding: the "
    "same if the update were noise of this size, rounded."
)
"""Of the titles of a table of tensors."""
