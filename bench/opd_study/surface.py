"""Sparsity as a surface over learning rate, steps and width, each point beside two nulls."""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checkpoints
import torch
from model import Model
from settings import Scale
from store import Store
from task import accuracy
from training import METHODS, pretrain, train

import ckptdiff
from ckptdiff.claims import judge_claims
from ckptdiff.track import track

FIGURES = ("rel_norm", "unchanged_bitwise", "max_abs")
KEYED = {"unchanged_abs": "1e-05", "low_coverage": "0.1", "low_coverage_null": "0.1", "coord_energy": "1"}
SPECTRAL = {
    "topk_energy": "16",
    "numerical_rank_frac": "1e-05",
    "principal_energy": "0.1",
    "principal_coverage": "0.1",
    "principal_coverage_null": "0.1",
}


def prepare(store: Store, scale: Scale, width: int) -> dict[str, Any]:
    """Train a teacher and a student; the student, rounded to bfloat16, is the base of all that follows."""

    def work() -> dict[str, Any]:
        teacher, taught = pretrain(scale, width, seed=1, until=scale.teacher_accuracy, every=scale.teacher_check)
        student, _ = pretrain(scale, width, seed=2, until=scale.student_accuracy, every=scale.student_check)
        checkpoints.save(teacher, place(store, width, "teacher"), torch.float32)
        checkpoints.save(student, place(store, width, "base"), torch.bfloat16)
        base = checkpoints.load(place(store, width, "base"), scale, width)
        checkpoints.save(base, place(store, width, "base-f32"), torch.float32)
        return {
            "width": width,
            "parameters": sum(parameter.numel() for parameter in base.parameters()),
            "teacher": taught,
            "base": accuracy(base, scale.digits),
        }

    return store.part(f"prepare-{width}", work)


def models(store: Store, scale: Scale, width: int) -> tuple[Model, Model]:
    """Base and teacher."""
    return tuple(checkpoints.load(place(store, width, name), scale, width) for name in ("base", "teacher"))  # type: ignore[return-value]


def place(store: Store, width: int, name: str) -> Path:
    """Folder of a checkpoint."""
    return store.checkpoints / str(width) / name


def surface(store: Store, scale: Scale) -> None:
    """One run per method and learning rate at the first width, distillation only at the others."""
    for width in scale.widths:
        prepare(store, scale, width)
        first = width == scale.widths[0]
        for method in METHODS if first else METHODS[:1]:
            for lr in scale.lrs:
                steps = scale.steps if first else scale.wide_steps
                store.part(
                    f"surface-{width}-{method}-{lr:g}",
                    lambda width=width, method=method, lr=lr, steps=steps: point(
                        store, scale, width, method, lr, steps
                    ),
                )


def point(store: Store, scale: Scale, width: int, method: str, lr: float, steps: tuple[int, ...]) -> dict[str, Any]:
    """Train once, write checkpoints at the steps, and measure them with ckptdiff."""
    base, teacher = models(store, scale, width)
    folder = place(store, width, f"{method}-{lr:g}")
    rows = []

    def make(student: Model) -> torch.optim.Optimizer:
        return torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)

    for step, student in train(method, base, teacher, scale, make, steps=steps[-1], seed=0):
        if step in steps:
            checkpoints.save(student, folder / f"step{step}", torch.bfloat16)
            checkpoints.save(student, folder / f"step{step}-f32", torch.float32)
            rows.append({"step": step, "accuracy": accuracy(student, scale.digits)})
            rows[-1] |= measure(store, width, folder / f"step{step}", base, student, spectra=step == steps[-1])
    growth = track(place(store, width, "base"), [folder / f"step{step}" for step in steps])
    for row, grown in zip(rows, growth.overall(), strict=True):
        row["track"] = {key: grown[key] for key in ("support", "touched", "returned", "reverted", "churned", "union")}
    return {"width": width, "method": method, "lr": lr, "rows": rows}


def measure(store: Store, width: int, tuned: Path, base: Model, student: Model, *, spectra: bool) -> dict[str, Any]:
    """Figures of the bfloat16 file, of the float32 master, and of the same update with its coordinates permuted."""
    permuted = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for shuffled, before, after in zip(permuted.parameters(), base.parameters(), student.parameters(), strict=True):
            delta = (after - before).flatten()
            shuffled += delta[torch.randperm(delta.numel(), generator=generator)].view(shuffled.shape)
    null = checkpoints.save(permuted, tuned.with_name(f"{tuned.name}-permuted"), torch.bfloat16)
    stored, master = place(store, width, "base"), place(store, width, "base-f32")
    exact = {"spectra": "exact" if spectra else None}
    measured = {
        "bf16": figures(ckptdiff.diff(stored, tuned, out=tuned / "run.h5", mask="bitwise", **exact)),
        "master": figures(
            ckptdiff.diff(master, tuned.with_name(f"{tuned.name}-f32"), compare="stored", mask="none", **exact)
        ),
        "permuted": figures(ckptdiff.diff(stored, null, mask="none", **exact)),
    }
    shutil.rmtree(null)
    return measured


def figures(diff: ckptdiff.Diff) -> dict[str, Any]:
    """What the study keeps of a diff: all values together, medians over matrices, the share of each block, verdicts."""

    def chosen(row: dict[str, Any]) -> dict[str, Any]:
        return {key: row[key] for key in FIGURES} | {key: row[key][at] for key, at in KEYED.items()}

    found: dict[str, Any] = {}
    if diff.spectra is not None:
        medians = diff.median_2d["spectral"]
        found["spectral"] = {key: medians[key][at] for key, at in SPECTRAL.items()}
        found["spectral"]["stable_rank"] = medians["stable_rank"]
        found["claims"] = [asdict(verdict) for verdict in judge_claims(diff)]
    return found | {
        "global": chosen(diff.overall),
        "median_2d": chosen(diff.median_2d),
        "blocks": {
            row["block"]: {key: row[key] for key in ("rel_norm", "delta_energy_share", "unchanged_bitwise")}
            for row in diff.grouped("block")
        },
    }
