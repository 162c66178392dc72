"""What the callback logs of a training, against the same checkpoints followed here."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptdiff.errors import OptionError
from ckptdiff.track import track

pytestmark = pytest.mark.slow


def make_trainer(task: torch.nn.Module, folder: Path, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tokens = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) * 2 + i} for i in range(8)]
    options = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(output_dir=folder, **(options | more))
    return transformers.Trainer(task, arguments, train_dataset=tokens)


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "track/step" in entry]


def test_each_save_is_logged_where_the_trainer_logs(make_task: Callable, tmp_path: Path) -> None:
    from ckptdiff.retrain import TrackCallback

    trainer = make_trainer(make_task(), tmp_path / "out")
    trainer.save_model(tmp_path / "base")
    callback = TrackCallback(trainer, tmp_path / "base")
    trainer.add_callback(callback)
    trainer.train()
    entries = logged(trainer)
    # A save that comes while another is followed may give way to the next one; the last never does.
    assert entries[-1]["track/step"] == 6 and entries[-1]["track/checkpoints"] == 3
    saved = [tmp_path / "out" / f"checkpoint-{step}" for step in (2, 4, 6)]
    for entry in entries:
        count = int(entry["track/checkpoints"])
        row = track(tmp_path / "base", saved[:count], gram=True).overall()[-1]
        for key in ("support_fraction", "union_fraction", "touched", "rel_norm", "step_rel_norm", "line_r2_null"):
            assert entry.get(f"track/{key}") == (row[key] if row[key] is None else pytest.approx(row[key])), key
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    # Every step's loss was logged all the same.
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("gone", [True, False])
def test_checkpoints_that_are_gone_or_later_are_not_followed(gone: bool, make_task: Callable, tmp_path: Path) -> None:
    from ckptdiff.retrain import TrackCallback

    trainer = make_trainer(make_task(), tmp_path / "out", save_total_limit=1 if gone else None)
    trainer.save_model(tmp_path / "base")
    if not gone:  # not both: which is the oldest, transformers tells by times or by numbers, as the file system lets it
        shutil.copytree(tmp_path / "base", tmp_path / "out" / "checkpoint-1000")
    trainer.add_callback(TrackCallback(trainer, tmp_path / "base", gram=False, include=("*weight",), threads=0))
    trainer.train()
    last = logged(trainer)[-1]
    assert (last["track/step"], last["track/checkpoints"]) == (6, 1 if gone else 3)
    assert not any(key.startswith("track/step_") for key in last) or not gone
    alone = track(tmp_path / "base", [tmp_path / "out" / "checkpoint-6"], include=("*weight",)).overall()[-1]
    assert last["track/rel_norm"] == pytest.approx(alone["rel_norm"])
    assert last["track/touched"] == alone["touched"] or not gone


@pytest.mark.parametrize("trouble", ["no base", "no Python"])
def test_what_cannot_be_followed_does_not_end_the_training(
    trouble: str, make_task: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptdiff.retrain import TrackCallback

    trainer = make_trainer(make_task(), tmp_path / "out")
    trainer.save_model(tmp_path / "base")
    trainer.add_callback(TrackCallback(trainer, tmp_path / ("absent" if trouble == "no base" else "base")))
    if trouble == "no Python":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with caplog.at_level(logging.WARNING, "ckptdiff.retrain"):
        trainer.train()
    assert trainer.state.global_step == 6 and logged(trainer) == []
    said = [record.message for record in caplog.records if record.name == "ckptdiff.retrain"]
    assert said and all("were not followed" in message for message in said)
    assert ("absent" if trouble == "no base" else "nothing") in said[-1]


def test_a_training_that_failed_leaves_no_process(make_task: Callable, tmp_path: Path) -> None:
    from ckptdiff.retrain import TrackCallback

    trainer = make_trainer(make_task(), tmp_path / "out", save_steps=1)
    trainer.save_model(tmp_path / "base")
    callback = TrackCallback(trainer, tmp_path / "base")
    trainer.add_callback(callback)
    real, calls = trainer.training_step, []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise FloatingPointError("NaN")
        return real(*arguments, **options)

    trainer.training_step = fail
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert callback._running is not None
    process = callback._running.process
    for _ in range(2):
        callback.close()
    assert process.poll() is not None
    with pytest.raises(OptionError):
        TrackCallback(trainer, tmp_path / "base", threads=-1)
