"""The study's tables, in Markdown, from whatever results are there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from claims import claims
from retraining import VARIANTS, retrained
from settings import Scale
from store import Store

BF16, MASTER, PERMUTED = "bf16", "master", "permuted"


def report(store: Store, scale: Scale) -> str:
    """Every table that has a row."""
    sections = [
        ("Models", prepared(store)),
        ("Sparsity over learning rate, steps and width", surface_rows(store)),
        ("Spectra and subspaces, medians over matrices, at the last step", spectral_rows(store)),
        ("Retraining: accuracy, mean over seeds (lowest to highest)", retraining_rows(store, scale)),
        ("Overlap of the OPD mask with others, beside chance", overlap_rows(store)),
        ("The paper's claims at this scale", claims(store, scale)),
    ]
    return "\n".join(f"## {title}\n\n{table(rows)}\n" for title, rows in sections if rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of a Markdown table."""
    keys = list(rows[0])
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    lines += [f"| {' | '.join(str(row[key]) for key in keys)} |" for row in rows]
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """A fraction with three digits, or n/a."""
    return "n/a" if value is None else f"{100 * value:.3g} %"


def prepared(store: Store) -> list[dict[str, Any]]:
    """One row per width."""
    found = sorted(store.results("prepare-").values(), key=lambda row: row["width"])
    return [
        {
            "width": row["width"],
            "parameters": f"{row['parameters']:,}",
            "teacher": percent(row["teacher"]),
            "student (base)": percent(row["base"]),
        }
        for row in found
    ]


def runs_of_the_surface(store: Store) -> list[dict[str, Any]]:
    """Every run, in the order in which tables list them."""
    return sorted(store.results("surface-").values(), key=lambda run: (run["width"], run["method"], run["lr"]))


def surface_rows(store: Store) -> list[dict[str, Any]]:
    """One row per run and step."""
    return [
        {
            "width": run["width"],
            "method": run["method"],
            "lr": f"{run['lr']:g}",
            "step": row["step"],
            "accuracy": percent(row["accuracy"]),
            "unchanged, bf16 file": percent(row[BF16]["global"]["unchanged_bitwise"]),
            "float32 master": percent(row[MASTER]["global"]["unchanged_bitwise"]),
            "permuted update": percent(row[PERMUTED]["global"]["unchanged_bitwise"]),
            "update": percent(row[BF16]["global"]["rel_norm"]),
            "of the master": percent(row[MASTER]["global"]["rel_norm"]),
            "low 10 %": percent(row[BF16]["global"]["low_coverage"]),
            "rounding null": percent(row[BF16]["global"]["low_coverage_null"]),
            "permuted ": percent(row[PERMUTED]["global"]["low_coverage"]),
            "ever changed": f"{row['track']['union']:,}",
        }
        for run in runs_of_the_surface(store)
        for row in run["rows"]
    ]


def spectral_rows(store: Store) -> list[dict[str, Any]]:
    """One row per run and kind of update, after the last step."""
    titles = {
        "topk_energy": "top 16",
        "numerical_rank_frac": "rank 1e-5",
        "principal_energy": "principal energy",
        "principal_coverage": "principal coverage",
        "principal_coverage_null": "rounding null",
    }
    return [
        {
            "width": run["width"],
            "method": run["method"],
            "lr": f"{run['lr']:g}",
            "update": title,
            "stable rank": "n/a" if found["stable_rank"] is None else f"{found['stable_rank']:.3g}",
            **{name: percent(found[key]) for key, name in titles.items()},
        }
        for run in runs_of_the_surface(store)
        for kind, title in ((BF16, "bf16 file"), (MASTER, "float32 master"), (PERMUTED, "permuted"))
        for found in [run["rows"][-1][kind]["spectral"]]
    ]


def retraining_rows(store: Store, scale: Scale) -> list[dict[str, Any]]:
    """One row per variant and density, one column per optimizer."""
    runs = retrained(store)
    rows = []
    for density in scale.densities:
        for variant in VARIANTS:
            row: dict[str, Any] = {
                "coordinates": variant,
                "of each tensor": "all" if variant == "full" else f"{density} %",
            }
            if variant == "complement":
                row["of each tensor"] = f"{100 - density} %"
            for optimizer in scale.tuned_lrs:
                these = runs.get((optimizer, variant, density), [])
                reached = [run["accuracy"] for run in these]
                row[optimizer] = (
                    f"{percent(statistics.mean(reached))} ({percent(min(reached))} to {percent(max(reached))})"
                    if reached
                    else ""
                )
                row[f"{optimizer} lr"] = f"{these[0]['lr']:g}" if these else ""
            if any(row[optimizer] for optimizer in scale.tuned_lrs):
                rows.append(row)
    return rows


def overlap_rows(store: Store) -> list[dict[str, Any]]:
    """One row per density and other mask."""
    titles = {"sft": "SFT", "again": "OPD, other samples"}
    return [
        {"with": titles[row["other"]], "density": f"{row['density']} %"}
        | {key: percent(row[key]) for key in row if key.startswith(("o1", "jaccard"))}
        for row in store.results("pairs").get("", {}).get("overlap", [])
    ]
