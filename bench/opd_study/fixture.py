"""Make the pair of checkpoints in `fixtures/addition`: a student of 48 units before and after on-policy distillation.

    python bench/opd_study/fixture.py fixtures/addition

The bits depend on torch and on the processor, so what is committed is what one run wrote.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import checkpoints
from settings import FULL
from task import accuracy
from training import pretrain, train

WIDTH, STEPS, LR = 48, 60, 3e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    scale = replace(FULL, digits=2, pretrain_lr=3e-3)
    teacher, taught = pretrain(scale, WIDTH, 1, scale.teacher_accuracy, scale.teacher_check)
    student, _ = pretrain(scale, WIDTH, 2, scale.student_accuracy, scale.student_check)
    base = checkpoints.load(checkpoints.save(student, folder / "base", torch.bfloat16), scale, WIDTH)
    print(f"teacher {taught:.3f}, base {accuracy(base, scale.digits):.3f}")

    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)

    for step, tuned in train("opd", base, teacher, scale, make, steps=STEPS, seed=0):
        if step == STEPS:
            checkpoints.save(tuned, folder / "tuned", torch.bfloat16)
            print(f"tuned {accuracy(tuned, scale.digits):.3f}")


if __name__ == "__main__":
    main()
