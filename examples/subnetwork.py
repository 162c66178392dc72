"""Train a model, find the subnetwork that moved, train it alone from the same start, and compare.

    python examples/subnetwork.py

The base is that of fixtures/addition (`retrain.py` beside this file has the model and its task). A short training at a
small learning rate makes it add better, and in bfloat16, as checkpoints are stored, leaves some coordinates as they
were. It is repeated three times by transformers' Trainer, from the same start and on the same data, with some
coordinates only: those that changed; the fifth of each tensor that changed most; and as many at random. Needs torch,
transformers and accelerate.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from retrain import PAIR, Model, loss_of, problems
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import ckptdiff
from ckptdiff.retrain import MaskCallback, ParameterMasks, load_masks

STEPS, BATCH, RATE = 40, 64, 3e-5


class Adding(Trainer):
    """A trainer of the answers alone."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Of a batch of problems."""
        return loss_of(model, inputs["tokens"])


def model_of(checkpoint: Path) -> Model:
    """Its values are those of bfloat16, and train in float32."""
    model = Model()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors_of(checkpoint).items()})
    return model


def train(target: Path, *callbacks: MaskCallback) -> Path:
    """Train the base, each time on the same data in the same order, and store it in bfloat16."""
    model = model_of(PAIR / "base")
    arguments = TrainingArguments(
        output_dir=target,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        weight_decay=0.01,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"tokens": tokens} for tokens in problems(BATCH * STEPS, seed=1)]
    trainer = Adding(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    target.mkdir(exist_ok=True)
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(stored, target / "model.safetensors")
    return target


def held_out_loss(checkpoint: Path) -> float:
    """Of problems and answers that no training has seen in this order."""
    with torch.no_grad():
        return loss_of(model_of(checkpoint), problems(4000, seed=2)).item()


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """By their names, which are those of the model's parameters."""
    return {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}


def energy_inside(masks: ParameterMasks, base: Path, tuned: Path) -> float:
    """Which share of the sum of the squares of an update lies in the masks."""
    ours, theirs = tensors_of(base), tensors_of(tuned)
    inside = total = 0.0
    for parameter, mask in masks.items():
        name = masks.names[parameter]
        squares = (theirs[name].double() - ours[name].double()).square()
        inside += squares[torch.from_numpy(mask.dense())].sum().item()
        total += squares.sum().item()
    return inside / total


def bytes_outside(masks: ParameterMasks, base: Path, other: Path) -> int:
    """How many bytes of two checkpoints differ outside the masks."""
    ours, theirs = tensors_of(base), tensors_of(other)
    found = 0
    for parameter, mask in masks.items():
        name = masks.names[parameter]
        differs = ours[name].view(torch.uint8) != theirs[name].view(torch.uint8)
        found += int(differs.view(*mask.shape, 2)[~torch.from_numpy(mask.dense())].sum())
    return found


def main() -> None:
    """Train, diff, mask, retrain, diff again, compare."""
    transformers.logging.set_verbosity_error()
    base = PAIR / "base"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tuned = train(folder / "tuned")
        update = ckptdiff.diff(base, tuned, out=folder / "changed.h5", mask="bitwise")
        ckptdiff.diff(base, tuned, out=folder / "most.h5", mask="top:20")
        print("trained                  coordinates   energy     loss   off by   bytes outside")
        print(f"nothing: the base               0.0%     0.0%   {held_out_loss(base):.4f}   100.0%")
        print(f"all: the tuned model          100.0%   100.0%   {held_out_loss(tuned):.4f}     0.0%")
        for what, run, change in (
            ("what changed", "changed.h5", None),
            ("the fifth most changed", "most.h5", None),
            ("a fifth at random", "most.h5", lambda masks: masks.random(0)),
        ):
            again = train(folder / "again", MaskCallback(folder / run, change=change))
            masks = load_masks(folder / run, model_of(base))
            masks = change(masks) if change else masks
            off = ckptdiff.diff(tuned, again).overall["delta_norm"] / update.overall["delta_norm"]
            print(
                f"{what:24}{masks.density:12.1%}{energy_inside(masks, base, tuned):9.1%}{held_out_loss(again):9.4f}"
                f"{off**2:9.1%}{bytes_outside(masks, base, again):16,}"
            )


if __name__ == "__main__":
    main()
