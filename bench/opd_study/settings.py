"""How large the study is: in full, quick enough for CI, or just the pair of checkpoints for `fixtures/`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of everything.

    Attributes
    ----------
    digits, layers, batch : int
    widths : tuple of int
        The first one is used wherever only one is.
    lrs : tuple of float
        Of the surface.
    steps : tuple of int
        At which checkpoints are written; the last one ends a run of the first width.
    wide_steps : tuple of int
        The same for the other widths.
    retrain_lr, retrain_steps : float, int
        Of the run that makes the masks, and how long each retraining runs.
    densities : tuple of int
        Percent of each tensor in the masks.
    tuned_lrs : dict of str to tuple of float
        What each optimizer's learning rate is chosen from.
    seeds : tuple of int
        Of the retraining runs; the masks were made with another one, learning rates chosen with a third.
    pretrain_lr, pretrain_steps : float, int
    teacher_accuracy, student_accuracy : float
        Where pretraining stops.
    teacher_check, student_check : int
        Steps between two looks at it: a student passes 40 % within a few.
    """

    digits: int
    layers: int
    batch: int
    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    steps: tuple[int, ...]
    wide_steps: tuple[int, ...]
    retrain_lr: float
    retrain_steps: int
    densities: tuple[int, ...]
    tuned_lrs: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    pretrain_lr: float
    pretrain_steps: int
    teacher_accuracy: float
    student_accuracy: float
    teacher_check: int
    student_check: int


FULL = Scale(
    digits=3,
    layers=3,
    batch=128,
    widths=(128, 256, 384),
    lrs=(1e-6, 1e-5, 1e-4, 1e-3),
    steps=(10, 25, 50, 100),
    wide_steps=(10, 25, 50),
    retrain_lr=1e-4,
    retrain_steps=50,
    densities=(20, 10),
    tuned_lrs={"adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "sgd": (0.03, 0.1, 0.3, 1.0)},
    seeds=(0, 1, 2),
    pretrain_lr=1e-3,
    pretrain_steps=6000,
    teacher_accuracy=0.995,
    student_accuracy=0.4,
    teacher_check=50,
    student_check=4,
)

QUICK = Scale(
    digits=1,
    layers=2,
    batch=64,
    widths=(32,),
    lrs=(1e-5, 1e-3),
    steps=(5, 20),
    wide_steps=(),
    retrain_lr=1e-3,
    retrain_steps=30,
    densities=(20,),
    tuned_lrs={"adamw": (1e-3, 3e-3), "sgd": (0.1,)},
    seeds=(0,),
    pretrain_lr=3e-3,
    pretrain_steps=1500,
    teacher_accuracy=0.95,
    student_accuracy=0.4,
    teacher_check=20,
    student_check=20,
)
