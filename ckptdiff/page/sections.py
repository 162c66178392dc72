"""Sections of text and small tables: what was compared, headline figures beside their nulls, claims."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptdiff.claims import Verdict, judge_claims
from ckptdiff.claims.judge import chance_energy, noise_energy
from ckptdiff.errors import plural
from ckptdiff.figures.catalogue import parameter_key
from ckptdiff.figures.result import SIDES, Diff
from ckptdiff.page.markup import Html, exact, left_out, section, table, tag, text
from ckptdiff.page.shown_run import ShownRun
from ckptdiff.page.spectra_picture import module_rows, noise_stable_rank, null_values
from ckptdiff.report.coverage_lines import coverage_lines
from ckptdiff.report.summary import verdict_lines
from ckptdiff.report.text import NOT_AVAILABLE, number, percent, size

_EPS, _RHO = parameter_key(1e-5), parameter_key(0.1)
_DIGITS = 16
"""Of a hash, where the whole of it is in the document."""

Figures = Mapping[str, Any]


def coverage_section(runs: Sequence[ShownRun]) -> Html:
    """Warnings, whether both sides are the same, and how much of them was compared."""
    parts = []
    for run in runs:
        found = [tag("p", tag("b", "Warning: "), words, class_="warning") for words in run.diff.warnings]
        found += [tag("p", _capital(words), ".") for words in verdict_lines(run.diff)]
        parts += [*heading(run), *found, tag("ul", *(tag("li", words) for words in coverage_lines(run.diff)))]
    return section("coverage", "Coverage and warnings", *parts)


def heading(run: ShownRun) -> list[Html]:
    """A heading for each of two runs."""
    return [tag("h3", run.prefix, run.name)] if run.prefix else []


def provenance_section(runs: Sequence[ShownRun]) -> Html:
    """Both sides of each run, how they were compared, and the command that does it again."""
    return section("provenance", "What was compared", *(part for run in runs for part in _provenance(run)))


def _provenance(run: ShownRun) -> Iterator[Html]:
    diff = run.diff
    yield from heading(run)
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
    yield tag("pre", exact(command(run)))
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


def command(run: ShownRun) -> str:
    """The command that makes such a run file again, with the options that matter to its figures."""
    diff, options = run.diff, run.diff.options
    words = ["ckptdiff", "diff", str(diff.base.get("path")), str(diff.tuned.get("path"))]
    for key, usual in (("compare", "bf16"), ("values", "model"), ("mask", "abs:1e-05")):
        if (value := options.get(key, usual)) != usual:
            words += [f"--{key}", value]
    for key, flag in (("renames", "--map"), ("include", "--include"), ("exclude", "--exclude"), ("groups", "--group")):
        for value in options.get(key, ()):
            words += [flag, value]
    words += ["--quick"] if options.get("quick") else []
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


def headline_section(runs: Sequence[ShownRun]) -> Html:
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
        titles += [f"{run.prefix}{run.name}" if run.prefix else "this pair", "its null"]
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
    if whole["patch_bytes"] is not None:
        dense = size(whole["dense_bytes"])
        yield Headline(
            "the update as a patch of indices and values", size(whole["patch_bytes"]), dense, "all tuned values"
        )
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


def claims_section(runs: Sequence[ShownRun]) -> Html:
    """What the paper claims of such updates, judged for each pair."""
    parts = []
    for run in runs:
        parts += heading(run)
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
