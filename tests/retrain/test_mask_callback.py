"""The masks inside transformers' Trainer, and in the loop of the documentation."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_the_trainer_trains_the_masked_coordinates_only(run_file: Path, make_task: Callable, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from ckptdiff.retrain import MaskCallback, load_masks

    task = make_task()
    before = [parameter.detach().clone() for parameter in task.parameters()]
    tokens = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) * 2 + i} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        learning_rate=1e-2,
        weight_decay=0.5,
        max_grad_norm=0.1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = MaskCallback(run_file, change=lambda masks: masks.random(1))
    trainer = transformers.Trainer(task, arguments, train_dataset=tokens, callbacks=[callback])
    trainer.train()
    masks = load_masks(run_file, task).random(1)
    for parameter, start in zip(task.parameters(), before, strict=True):
        inside = masks[parameter].dense()
        after = parameter.detach().numpy()
        assert np.array_equal(after[~inside], start.numpy()[~inside])
    assert (
        sum((p != start).sum().item() for p, start in zip(task.parameters(), before, strict=True)) > 0.5 * masks.count
    )


def test_hooks_of_an_interrupted_training_can_be_taken_away(run_file: Path, make_model: Callable) -> None:
    pytest.importorskip("transformers")
    from ckptdiff.retrain import MaskCallback

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters())
    callback = MaskCallback(run_file)
    for _ in range(2):  # the second training begins where the first was interrupted
        callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
        assert all(len(parameter._post_accumulate_grad_hooks) == 1 for parameter in model.parameters())
    for _ in range(2):
        callback.remove()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


@pytest.mark.parametrize("page", ["README.md", "docs/retraining.md"])
def test_the_loop_of_a_page(page: str, run_file: Path, make_task: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (loop,) = (block for block in blocks if "MaskedAdamW" in block)
    task = make_task()
    model = task.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = [(torch.arange(6)[None] + i, torch.arange(6)[None] * 2 + i) for i in range(4)]
    monkeypatch.chdir(run_file.parent)
    names = {"model": model, "batches": batches, "loss_of": lambda model, batch: task(*batch)["loss"]}
    exec(compile(loop, page, "exec"), names)
    masks = names["masks"]
    for name, parameter in model.named_parameters():
        inside = torch.from_numpy(masks[parameter].dense())
        assert torch.equal(parameter[~inside], before[name][~inside])
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
