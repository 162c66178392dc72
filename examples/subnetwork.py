"""Train a model, find the subnetwork that moved, train it alone from the same start, and compare.

    python examples/subnetwork.py

The models are tiny Llamas that transformers makes; nothing is downloaded. The base has seen two rules by which digits
follow each other; a short training at a small learning rate then makes it expect one of them, and in bfloat16, as
checkpoints are stored, leaves about half of the coordinates as they were. It is repeated three times, from the same
start and on the same data, with some coordinates only: those that changed; the fifth of each tensor that changed most;
and as many at random. Needs torch, transformers and accelerate.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ckptdiff
from ckptdiff.retrain import MaskCallback, ParameterMasks, load_masks

DIGITS, LENGTH, BATCH = 10, 10, 64
CONFIG = LlamaConfig(
    vocab_size=DIGITS,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
)


def sequences(count: int, rules: list[int], seed: int) -> Tensor:
    """Each digit is the sum of the two before it and of a number, the rule, modulo ten; shape (count, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(DIGITS, (count, LENGTH), generator=generator)
    rule = torch.tensor(rules)[torch.randint(len(rules), (count,), generator=generator)]
    for place in range(2, LENGTH):
        tokens[:, place] = (tokens[:, place - 2] + tokens[:, place - 1] + rule) % DIGITS
    return tokens


def model_of(checkpoint: Path) -> LlamaForCausalLM:
    """Its values are those of bfloat16, and train in float32."""
    return LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def train(model: LlamaForCausalLM, rules: list[int], steps: int, target: Path, *callbacks: MaskCallback) -> Path:
    """Train a model, each time on the same data in the same order, and store it in bfloat16."""
    arguments = TrainingArguments(
        output_dir=target,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3 if len(rules) > 1 else 1e-5,
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": tokens, "labels": tokens} for tokens in sequences(BATCH * steps, rules, seed=1)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    model.to(torch.bfloat16).save_pretrained(target)
    return target


def loss_of(checkpoint: Path) -> float:
    """Cross entropy on sequences of the one rule that no training has seen."""
    tokens = sequences(1000, [1], seed=2)
    with torch.no_grad():
        return model_of(checkpoint)(input_ids=tokens, labels=tokens).loss.item()


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """By their names, which are those of the model's parameters."""
    return load_file(checkpoint / "model.safetensors")


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
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        base = train(LlamaForCausalLM(CONFIG), [0, 1], 150, folder / "base")
        tuned = train(model_of(base), [1], 40, folder / "tuned")
        update = ckptdiff.diff(base, tuned, out=folder / "changed.h5", mask="bitwise")
        ckptdiff.diff(base, tuned, out=folder / "most.h5", mask="top:20")
        print("trained                  coordinates   energy     loss   off by   bytes outside")
        print(f"nothing: the base               0.0%     0.0%   {loss_of(base):.4f}   100.0%")
        print(f"all: the tuned model          100.0%   100.0%   {loss_of(tuned):.4f}     0.0%")
        for what, run, change in (
            ("what changed", "changed.h5", None),
            ("the fifth most changed", "most.h5", None),
            ("a fifth at random", "most.h5", lambda masks: masks.random(0)),
        ):
            callback = MaskCallback(folder / run, change=change)
            again = train(model_of(base), [1], 40, folder / "again", callback)
            masks = load_masks(folder / run, model_of(base))
            masks = change(masks) if change else masks
            off = ckptdiff.diff(tuned, again).overall["delta_norm"] / update.overall["delta_norm"]
            print(
                f"{what:24}{masks.density:12.1%}{energy_inside(masks, base, tuned):9.1%}{loss_of(again):9.4f}"
                f"{off**2:9.1%}{bytes_outside(masks, base, again):16,}"
            )


if __name__ == "__main__":
    main()
