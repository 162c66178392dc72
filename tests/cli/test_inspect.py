"""``ckptdiff inspect`` lists what safetensors wrote."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

Cli = Callable[..., Any]
EVIL = "evil\x1b[2J\nname"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    first = {"model.layers.3.mlp.up_proj.weight": np.zeros((4, 6), np.float16), EVIL: np.zeros((), np.int64)}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": np.zeros((10, 4), np.float32)}, folder / "model-00002-of-00002.safetensors")
    return folder


def test_table(cli: Cli, checkpoint: Path) -> None:
    code, out, err = cli("inspect", checkpoint)
    assert (code, err) == (0, "") and "\x1b" not in out
    row = next(line for line in out.splitlines() if "up_proj.weight" in line)
    assert row.split() == [
        *("model.layers.3.mlp.up_proj.weight", "F16", "4x6", "48", "B", "up_proj", "3"),
        "model-00001-of-00002.safetensors",
    ]
    assert out.splitlines()[-1].startswith("3 tensors in 2 shards, 65 values, 216 B (")


def test_json(cli: Cli, checkpoint: Path) -> None:
    listed = json.loads(cli("inspect", checkpoint, "--format", "json").out)
    assert listed["schema"] == "ckptdiff.inspect/1" and listed["bytes"] == 216 and listed["shards"] == 2
    tensors = {row["name"]: row for row in listed["tensors"]}
    assert set(tensors) == {"model.layers.3.mlp.up_proj.weight", EVIL, "lm_head.weight"}
    assert tensors["lm_head.weight"]["shape"] == [10, 4] and tensors["lm_head.weight"]["block"] == "head"
    assert tensors[EVIL]["shape"] == [] and tensors[EVIL]["numel"] == 1


def test_ndjson_and_csv(cli: Cli, checkpoint: Path) -> None:
    rows = [json.loads(line) for line in cli("inspect", checkpoint, "--format", "ndjson").out.splitlines()]
    assert [row["numel"] for row in rows if row["dtype"] == "F32"] == [40]
    table = list(csv.DictReader(io.StringIO(cli("inspect", checkpoint, "--format", "csv").out)))
    assert len(table) == 3 and {row["shape"] for row in table} == {"4x6", "", "10x4"}


def test_globs(cli: Cli, checkpoint: Path) -> None:
    code, out, err = cli("inspect", checkpoint, "--include", "*weight", "--exclude", "lm_head*", "--exclude", "none")
    assert code == 0 and "1 tensor in 1 shard, 24 values" in out
    assert "--exclude none matches no tensor" in err
    assert cli("inspect", checkpoint, "--include", "none").code == 2


def test_to_a_file_but_never_over_a_shard(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "list.txt"
    assert cli("inspect", checkpoint, "-O", target) == (0, "", "")
    assert "up_proj" in target.read_text()
    shard = checkpoint / "model-00001-of-00002.safetensors"
    assert cli("inspect", checkpoint, "-O", shard).code == 2
    assert cli("inspect", checkpoint).code == 0


def test_trouble(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    for path in (tmp_path / "missing", tmp_path / "broken.safetensors"):
        code, out, err = cli("inspect", path)
        assert (code, out) == (2, "") and path.name in err


def test_a_closed_stderr_leaves_the_report_alone(cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    found = cli("inspect", checkpoint, "--include", "nothing", "--include", "*", "--format", "json")
    assert found.code == 0 and len(json.loads(found.out)["tensors"]) == 3
