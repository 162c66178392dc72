"""The lines a newcomer sees first: how much was compared, what changed, and what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from operator import attrgetter
from pathlib import PurePath

import numpy as np

from ckptdiff.errors import plural
from ckptdiff.figures.catalogue import parameter_key
from ckptdiff.figures.coverage import PARTLY
from ckptdiff.figures.result import SIDES, Diff
from ckptdiff.report.coverage_lines import coverage_lines
from ckptdiff.report.text import number, percent, safe

_HEADLINE_EPS = parameter_key(1e-5)
_HEADLINE_RHO = parameter_key(0.1)
_LISTED = 3
"""Names listed before the rest is only counted; json and ``--by tensor`` hold all of them."""
_GENERIC = {"model", "models", "model_files", "checkpoint", "weights", "base", "tuned", ""}


def summary(diff: Diff, run_file: str | None = None, *, overview: bool = True) -> list[str]:
    """The first block of the table, a few lines of at most 80 characters where names allow, safe to print.

    Where the tables of the overview follow, the next command shows what they do not.
    """
    return [
        *coverage_lines(diff),
        *_what(diff),
        *_tied(diff),
        *verdict_lines(diff),
        *_changes(diff),
        *(f"warning: {safe(text)}" for text in diff.warnings),
        *_next(diff, run_file, overview),
    ]


def side_name(path: str) -> str:
    """A short name of a checkpoint: its last path component that says something.

    ``models--ORG--NAME/snapshots/HASH`` of a Hugging Face cache is ``ORG/NAME``.
    """
    parts = PurePath(path).parts
    for part in parts:
        if part.startswith("models--"):
            return "/".join(part.split("--")[1:])
    if len(parts) > 1 and parts[-1].startswith("model.safetensors"):
        parts = parts[:-1]
    if len(parts) > 1 and PurePath(parts[-1]).stem.lower() in _GENERIC and parts[-2] not in ("/", "..", "."):
        return "/".join(parts[-2:])
    return parts[-1] if parts else path


def _what(diff: Diff) -> Iterator[str]:
    names = [safe(side_name(str(side.get("path", "")))) for side in (diff.base, diff.tuned)]
    valued = diff.columns["valued"] > 0
    kind_of = attrgetter("dtype_base", "dtype_tuned", "compare")
    kinds = dict.fromkeys(map(kind_of, compress(diff.tensors, valued.tolist())))
    *sides, compared = (tuple(dict.fromkeys(column)) for column in zip(*kinds, strict=True)) if kinds else ((), (), ())
    base, tuned = ("+".join(side) if len(side) <= _LISTED else "mixed dtypes" for side in sides)
    dtypes = base if base == tuned else f"{base} against {tuned}"
    facts_line = f"stored {dtypes}, compared as {'+'.join(sorted(compared)).upper()}" if compared else ""
    title = f"{names[0]} -> {names[1]}"
    joined = f"{title}    {facts_line}"
    yield from [joined.rstrip()] if len(joined) < 81 else [title, facts_line]
    opaque = len(diff.tensors) - int(valued.sum())
    if opaque:
        yield f"{plural(opaque, 'tensor')} of integers or opaque codes: only equal bits are counted"
        other = tuple(diff.tensors[row].name for row in np.flatnonzero(diff.differing & ~valued))
        yield from _named(other, "with other bits")


def _values(diff: Diff) -> int:
    return int(diff.columns["numel"][diff.columns["valued"] > 0].sum())


def verdict_lines(diff: Diff) -> Iterator[str]:
    """Whether both sides are the same; where that is not for a value that differs, why not."""
    if diff.identical:
        if diff.options.get("include") or diff.options.get("exclude"):
            yield "identical in what --include and --exclude leave: every tensor has its equal"
        else:
            yield "identical: no value differs, and every tensor has its counterpart"
    elif not diff.differing.any():
        reasons = [
            *_counted(len(diff.only_in_base), "only in base"),
            *_counted(len(diff.only_in_tuned), "only in tuned"),
            *_counted(len(diff.mismatched), "of another shape or dtype"),
            *_counted(_compared_in_part(diff), "compared in part"),
        ]
        # Which ones is among the warnings.
        passed_over = [side for side in SIDES if diff.uncompared(side)]
        if passed_over:
            reasons.append(f"weights of {' and '.join(passed_over)} were not compared")
        yield f"not identical: no compared value differs, but {', '.join(reasons)}"


def _compared_in_part(diff: Diff) -> int:
    sides = {PARTLY.format(side=side): facts for side, facts in zip(SIDES, (diff.base, diff.tuned), strict=True)}
    return sum(
        group["tensors"] for why, facts in sides.items() for group in facts.get("left_out", ()) if group["why"] == why
    )


def _counted(count: int, where: str) -> Iterator[str]:
    if count:
        yield f"{plural(count, 'tensor is', 'tensors are')} {where}"


def _changes(diff: Diff) -> Iterator[str]:
    figures = diff.overall
    if figures["unchanged_bitwise"] is None:
        yield "nothing to measure: no floating values on both sides"
        return
    cast = "/".join(sorted({*map(attrgetter("compare"), diff.tensors)} - {"bitwise"})).upper()
    null = figures["unchanged_null"]
    noise = f" (noise of this size: {percent(null)})" if null is not None else ""
    yield f"unchanged   {percent(figures['unchanged_bitwise'])} in {cast}{noise}"
    yield from _as_stored(diff)
    within = f"|d| <= 1e-5 {percent(figures['unchanged_abs'][_HEADLINE_EPS])}"
    relative = figures["rel_norm"]
    yield f"{within:<28} relative update {percent(relative)}" if relative is not None else within
    median = diff.median_2d
    if median["rel_norm"] is not None:
        equal, within = percent(median["unchanged_bitwise"]), percent(median["unchanged_abs"][_HEADLINE_EPS])
        noise = f" (noise: {percent(median['unchanged_null'])})" if median["unchanged_null"] is not None else ""
        yield f"median of changed matrices: unchanged {equal}{noise},"
        yield f"                            |d| <= 1e-5 {within}, update {percent(median['rel_norm'])}"
    yield from _held("smallest", figures["low_coverage"], figures["low_coverage_null"])
    yield from _spectra(diff)
    for key, side in (("nonfinite_base", "base"), ("nonfinite_tuned", "tuned")):
        if figures[key]:
            yield f"{plural(figures[key], 'value')} NaN or Inf in {side}: left out of sums"


def _spectra(diff: Diff) -> Iterator[str]:
    found = diff.median_2d.get("spectral")
    if not found or found["method"] is None:
        return
    matrices, top = plural(found["matrices"], "matrix", "matrices"), percent(found["topk_energy"]["16"])
    rank = number(found["stable_rank"])
    yield f"spectra of {matrices} ({found['method']}): top 16 hold {top}, stable rank {rank}"
    yield from _held("principal", found["principal_coverage"], found["principal_coverage_null"])


def _held(which: str, covered: Mapping[str, float | None], null: Mapping[str, float | None]) -> Iterator[str]:
    """Say which part of the changes is on some weights, if any is defined."""
    if covered[_HEADLINE_RHO] is not None:
        rounding = f"rounding {percent(null[_HEADLINE_RHO])}, " if null[_HEADLINE_RHO] is not None else ""
        yield f"{which} 10 % of weights hold {percent(covered[_HEADLINE_RHO])} of changes ({rounding}chance 10 %)"


def _as_stored(diff: Diff) -> Iterator[str]:
    figures = diff.overall
    equal, stored, absorbed = (figures[key] for key in ("unchanged_bitwise", "unchanged_stored", "absorbed_energy"))
    if stored is None or equal is None:
        return
    if stored >= equal:
        yield "as stored   the same"
    elif percent(stored) == percent(equal):
        yield "as stored   about the same"
    else:
        lost = (equal - stored) / (1.0 - stored)
        share = "all" if lost == 1.0 else "most" if lost > 0.5 else "some"
        energy = f" ({percent(absorbed)} of sum d^2)" if absorbed is not None else ""
        yield f"as stored   {percent(stored)}: {share} changes vanish in the cast{energy}"


def _tied(diff: Diff) -> Iterator[str]:
    # What one side alone stores is among the warnings.
    tied = [
        (name, of) for name, of in diff.aliased if not any(text.startswith(f"{name} is ") for text in diff.warnings)
    ]
    for name, of in tied[:_LISTED]:
        yield f"{safe(name)} is tied to {safe(of)}: counted once"
    if len(tied) > _LISTED:
        yield f"{len(tied) - _LISTED:,} more tied"


def _named(names: tuple[str, ...], where: str) -> Iterator[str]:
    if names:
        yield f"{plural(len(names), 'tensor')} {where}: {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """The first few names, safe to print, and how many more there are."""
    rest = f", ... {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(map(safe, names[:_LISTED])) + rest


def _next(diff: Diff, run_file: str | None, overview: bool) -> Iterator[str]:
    if run_file is None:
        yield "nothing kept      next: add -o run.h5 to keep the masks and the figures"
        return
    path = safe(shlex.quote(run_file))
    changed, numel = diff.overall["changed"], _values(diff)
    made = f"run file: {path}, no masks" if diff.mask_rule == "none" else f"masks: {path}"
    if changed is not None and numel:
        made += f" ({safe(diff.mask_rule)}: {percent(changed / numel)} of the values)"
    if not overview:
        yield made
        return
    following = f"next: ckptdiff show {path} --by tensor"
    yield from [f"{made}      {following}"] if len(made) + len(following) < 75 else [made, following]
    yield f"pictures: ckptdiff report {path}"
