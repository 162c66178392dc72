"""Retraining with masks: does the subnetwork that a run changed recover what full training reaches?"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import torch
from model import Model
from settings import Scale
from store import Store
from surface import models, place, prepare
from task import accuracy
from training import train

import ckptdiff
from ckptdiff.overlap import overlap
from ckptdiff.retrain import MaskedAdamW, MaskedSGD, PackedMask, ParameterMasks, load_masks

VARIANTS = ("full", "opd", "random", "magnitude", "lowest", "sft", "complement")
"""All coordinates; the mask of the OPD run; as many at random, at random with the same magnitudes of the base, the
smallest weights; the mask of the SFT run; what the OPD mask leaves out."""

MASK_RUNS = {"opd": ("opd", 77), "again": ("opd", 78), "sft": ("sft", 77)}
"""Method and sampling seed of the runs that make masks: OPD twice, for scale."""
SPARE_SEED = 99
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[..., torch.optim.Optimizer]]] = {
    "adamw": (
        lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.01),
        lambda p, masks, lr: MaskedAdamW(p, masks, lr=lr, weight_decay=0.01),
    ),
    "sgd": (
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
        lambda p, masks, lr: MaskedSGD(p, masks, lr=lr, momentum=0.9),
    ),
}


def retraining(store: Store, scale: Scale) -> None:
    """Make the masks, choose learning rates on a spare seed, retrain with each mask and seed."""
    width = scale.widths[0]
    prepare(store, scale, width)
    store.part("masks", lambda: make_masks(store, scale, width))
    for optimizer, lrs in scale.tuned_lrs.items():
        chosen = {}
        for variant in VARIANTS:
            tried = {
                lr: one_run(store, scale, optimizer, variant, scale.densities[0], lr, SPARE_SEED)["accuracy"]
                for lr in lrs
            }
            chosen[variant] = max(tried, key=lambda lr: tried[lr])
        for seed in scale.seeds:
            for density in scale.densities:
                for variant in VARIANTS:
                    if variant != "full" or density == scale.densities[0]:
                        one_run(store, scale, optimizer, variant, density, chosen[variant], seed)
    store.part("pairs", lambda: compare_masks(store, scale, width))


def make_masks(store: Store, scale: Scale, width: int) -> dict[str, Any]:
    """Run OPD twice and SFT once from the base, and write run files of their largest changes."""
    base, teacher = models(store, scale, width)
    reached = {}
    for name, (method, seed) in MASK_RUNS.items():

        def make(student: Model) -> torch.optim.Optimizer:
            return torch.optim.AdamW(student.parameters(), lr=scale.retrain_lr, weight_decay=0.0)

        student = trained(train(method, base, teacher, scale, make, steps=scale.retrain_steps, seed=seed))
        reached[name] = accuracy(student, scale.digits)
        tuned = checkpoints.save(student, place(store, width, f"mask-{name}"), torch.float32)
        for density in scale.densities:
            ckptdiff.diff(
                place(store, width, "base-f32"),
                tuned,
                out=run_file(store, width, name, density),
                mask=f"top:{density}",
                compare="stored",
            )
    return {"accuracy": reached}


def run_file(store: Store, width: int, name: str, density: int) -> Path:
    """Run file of a mask."""
    return place(store, width, f"mask-{name}-{density}.h5")


def compare_masks(store: Store, scale: Scale, width: int) -> dict[str, Any]:
    """What the OPD mask has in common with that of SFT, and with that of OPD on other samples, beside chance."""
    rows = []
    for density in scale.densities:
        for other in ("sft", "again"):
            runs = [run_file(store, width, name, density) for name in ("opd", other)]
            found = overlap(runs, base=place(store, width, "base-f32"))
            rows.append({"density": density, "other": other, **found.overall(found.pairs[0])})
    return {"overlap": rows}


def one_run(
    store: Store, scale: Scale, optimizer: str, variant: str, density: int, lr: float, seed: int
) -> dict[str, Any]:
    """Retrain once from the base; a full run takes no mask, whatever the density."""
    name = f"retrain-{optimizer}-{variant}-{density}-{lr:g}-{seed}"
    return store.part(name, lambda: retrain(store, scale, optimizer, variant, density, lr, seed))


def retrain(
    store: Store, scale: Scale, optimizer: str, variant: str, density: int, lr: float, seed: int
) -> dict[str, Any]:
    """Train, and check that every frozen coordinate kept every bit."""
    width = scale.widths[0]
    base, teacher = models(store, scale, width)
    dense, masked = OPTIMIZERS[optimizer]
    kept: list[ParameterMasks] = []

    def make(student: Model) -> torch.optim.Optimizer:
        if variant == "full":
            return dense(student.parameters(), lr)
        kept.append(masks_of(store, scale, student, variant, density, seed))
        return masked(student.parameters(), kept[0], lr)

    student = trained(train("opd", base, teacher, scale, make, steps=scale.retrain_steps, seed=seed))
    result: dict[str, Any] = {
        "optimizer": optimizer,
        "variant": variant,
        "density": density,
        "lr": lr,
        "seed": seed,
        "base_accuracy": accuracy(base, scale.digits),
        "accuracy": accuracy(student, scale.digits),
    }
    if kept:
        moved = 0
        for parameter, before in zip(student.parameters(), base.parameters(), strict=True):
            inside = torch.from_numpy(kept[0][parameter].dense())
            if not torch.equal(parameter[~inside].view(torch.int32), before[~inside].view(torch.int32)):
                raise AssertionError("a frozen coordinate moved")
            moved += int((parameter != before).sum())
        result |= {"mask_density": kept[0].density, "moved": moved}
    return result


def trained(steps: Iterator[tuple[int, Model]]) -> Model:
    """The student after its last step."""
    ((_, student),) = deque(steps, maxlen=1)
    return student


def masks_of(store: Store, scale: Scale, student: Model, variant: str, density: int, seed: int) -> ParameterMasks:
    """The masks of a variant, of equal density in each tensor, apart from the complement."""
    width = scale.widths[0]
    found = load_masks(run_file(store, width, "sft" if variant == "sft" else "opd", density), student)
    if variant == "random":
        return found.random(seed)
    if variant == "complement":
        return found.inverted()
    if variant in ("opd", "sft"):
        return found
    rng = np.random.default_rng(seed)
    choose = lowest if variant == "lowest" else lambda mask, weights: same_magnitudes(mask, weights, rng)
    changed = {p: PackedMask.of(choose(mask.dense(), p.detach().numpy())) for p, mask in found.items()}
    return ParameterMasks(changed, found.names)


def lowest(mask: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """As many coordinates, those of the smallest weights."""
    chosen = np.zeros(mask.size, bool)
    chosen[np.argsort(np.abs(weights), axis=None, kind="stable")[: mask.sum()]] = True
    return chosen.reshape(mask.shape)


def same_magnitudes(mask: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many coordinates of each floor(log2 |W0|), at random."""
    octaves = np.frexp(weights.ravel())[1]
    chosen = np.zeros(mask.size, bool)
    for octave in np.unique(octaves):
        there = np.flatnonzero(octaves == octave)
        chosen[rng.choice(there, mask.ravel()[there].sum(), replace=False)] = True
    return chosen.reshape(mask.shape)


def retrained(store: Store) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Runs by optimizer, variant and density, without those that chose a learning rate."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in store.results("retrain-").values():
        if run["seed"] != SPARE_SEED:
            found.setdefault((run["optimizer"], run["variant"], run["density"]), []).append(run)
    return found
