"""What the papers say, and whether it holds here; each verdict is a rule on the study's own figures."""

from __future__ import annotations

import statistics
from itertools import product
from typing import Any

from retraining import retrained
from settings import Scale
from store import Store
from training import METHODS


def claims(store: Store, scale: Scale) -> list[dict[str, Any]]:
    """One row per claim of which the figures are there."""
    rows = [*_of_the_surface(store, scale), *_of_retraining(store, scale), *_of_overlap(store)]
    return [{"claim": claim, "here": found, "holds": "yes" if holds else "no"} for claim, found, holds in rows]


def _of_the_surface(store: Store, scale: Scale) -> list[tuple[str, str, bool]]:
    """Claims about one update: of the run whose learning rate made the masks, at the last step; the first is of all."""
    width = scale.widths[0]
    ends = {}
    for method in METHODS:
        runs = store.results(f"surface-{width}-{method}-")
        run = runs.get(f"{scale.retrain_lr:g}")
        if run is None:
            return []
        ends[method] = run["rows"][-1]
    figures = {method: end["bf16"]["global"] for method, end in ends.items()}
    unchanged = {method: row["unchanged_bitwise"] for method, row in figures.items()}
    starts = {made["width"]: made["base"] for made in store.results("prepare-").values()}
    ends_of_all = [run | run["rows"][-1] for width in starts for run in store.results(f"surface-{width}-opd-").values()]
    learned = [
        (end["bf16"]["global"]["unchanged_bitwise"], f"width {end['width']}, lr {end['lr']:g}, step {end['step']}")
        for end in ends_of_all
        if end["accuracy"] >= starts[end["width"]] + 0.1
    ]
    sparsest = max(learned, default=None)
    opd, blocks = figures["opd"], ends["opd"]["bf16"]["blocks"]
    permuted = ends["opd"]["permuted"]["global"]
    return [
        (
            "An update that teaches leaves most of the bfloat16 coordinates as they were (S1: 82 %)",
            "no run learned 10 points"
            if sparsest is None
            else f"most unchanged at the end of a run that gained 10 points: {sparsest[0]:.1%} ({sparsest[1]})",
            sparsest is not None and sparsest[0] > 0.5,
        ),
        (
            "The sparsity is a property of the update, not of rounding: the float32 master is sparse too",
            f"unchanged in the master {ends['opd']['master']['global']['unchanged_bitwise']:.1%},"
            f" in the file {unchanged['opd']:.1%}, permuted {permuted['unchanged_bitwise']:.1%}",
            ends["opd"]["master"]["global"]["unchanged_bitwise"] > 0.5,
        ),
        (
            "OPD is sparser than RLVR (S1: 82 against 77 %), and both far sparser than offline SFT (3 %)",
            ", ".join(f"{method} {share:.1%}" for method, share in unchanged.items()),
            unchanged["opd"] > unchanged["rlvr"] > unchanged["sft"] + 0.1,
        ),
        (
            "Updates fall on the smallest 10 % of weights (S1: 38 %)",
            f"{opd['low_coverage']:.1%}; rounding null {opd['low_coverage_null']:.1%}, chance 10 %",
            opd["low_coverage"] > max(0.1, opd["low_coverage_null"]),
        ),
        (
            "Feed-forward blocks change most, norms hardly (S1: FFN .074, attention .021, norms .0002 %)",
            ", ".join(f"{block} {100 * row['rel_norm']:.2g} %" for block, row in blocks.items()),
            max(blocks, key=lambda block: blocks[block]["rel_norm"]) == "ffn"
            and blocks["norm"]["rel_norm"] < 0.1 * blocks["attention"]["rel_norm"],
        ),
        *_of_spectra(ends["opd"]),
    ]


def _of_spectra(end: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Claims about matrices: verdicts of ``ckptdiff claims``, beside those of the master and the permuted update."""
    judged = {kind: {row["figure"]: row for row in end[kind]["claims"]} for kind in ("bf16", "master", "permuted")}
    return [
        (
            f"{row['claim'].capitalize()} (`ckptdiff claims`)",
            f"{row['sentence'].split('; ', 1)[1].rstrip('.')}; float32 master {_outcome(judged['master'][figure])},"
            f" permuted {_outcome(judged['permuted'][figure])}",
            row["outcome"] == "shown",
        )
        for figure, row in judged["bf16"].items()
        if "spectral" in figure and row["value"] is not None
    ]


def _outcome(row: dict[str, Any]) -> str:
    return "n/a" if row["value"] is None else f"{row['value']:.3g} ({row['outcome']})"


def _of_retraining(store: Store, scale: Scale) -> list[tuple[str, str, bool]]:
    """Claims about masks of each density; spreads are those of seeds."""
    rows = []
    runs = retrained(store)
    for optimizer, density in product(scale.tuned_lrs, scale.densities):
        found = {
            variant: [run["accuracy"] for run in these]
            for (o, variant, d), these in runs.items()
            if o == optimizer and (d == density or variant == "full")
        }
        if not {"full", "opd", "random", "sft", "complement"} <= found.keys():
            continue
        mean = {variant: statistics.mean(reached) for variant, reached in found.items()}
        spread = max(found["full"]) - min(found["full"])
        base = next(iter(runs.values()))[0]["base_accuracy"]
        rows += [
            (
                f"{optimizer}, {density} %: the OPD mask recovers full training (S1: 35.1 of 35.5)",
                f"{mean['opd']:.3f} of {mean['full']:.3f} (base {base:.3f}; full runs spread over {spread:.3f})",
                mean["opd"] >= mean["full"] - max(spread, 0.02),
            ),
            (
                f"{optimizer}, {density} %: a random mask of that density does not (S1: 32.9)",
                f"random {mean['random']:.3f}, same magnitudes {mean['magnitude']:.3f}, smallest {mean['lowest']:.3f}",
                mean["random"] < mean["opd"] - max(spread, 0.02),
            ),
            (
                f"{optimizer}, {density} %: it takes the mask of this method, not any run's",
                f"SFT mask {mean['sft']:.3f}, complement {mean['complement']:.3f}",
                mean["sft"] < mean["opd"] - max(spread, 0.02),
            ),
        ]
    return rows


def _of_overlap(store: Store) -> list[tuple[str, str, bool]]:
    """Claims about two masks."""
    rows = store.results("pairs").get("", {}).get("overlap", [])
    same = {row["density"]: row["o1"] for row in rows if row["other"] == "again"}
    return [
        (
            f"Different methods move the same coordinates (S2), beyond chance and magnitude; top {row['density']} %",
            f"OPD and SFT share {row['o1']:.1%}, two runs of OPD {same[row['density']]:.1%}; chance"
            f" {row['o1_independent']:.1%}, by magnitude {row['o1_conditional']:.1%}",
            row["o1"] > 1.2 * row["o1_conditional"],
        )
        for row in rows
        if row["other"] == "sft"
    ]
