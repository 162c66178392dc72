"""``ckptdiff show`` prints what ``diff`` printed, and ``mask`` lists and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from safetensors.numpy import load_file

Cli = Callable[..., Any]


@pytest.mark.parametrize("view", [
    [],
    ["--by", "module"],
    ["--by", "tensor", "--sort", "rel_norm", "--top", "3"],
    ["--format", "json"],
    ["--format", "ndjson"],
    ["--format", "ndjson", "--by", "layer"],
    ["--format", "csv"],
    ["--format", "csv", "--by", "block", "--sort", "numel:asc"],
])  # fmt: skip
@pytest.mark.parametrize("name", ["diff", "troubled_diff"])
def test_show_equals_diff(
    cli: Cli, engine: FakeEngine, tmp_path: Path, view: list[str], name: str, request: pytest.FixtureRequest
) -> None:
    engine.diff = request.getfixturevalue(name)
    run = tmp_path / "run.h5"
    code, printed, _ = cli("diff", "base", "tuned", "-o", run, *view)
    assert code == 0 and printed
    assert cli("show", run, *view) == (0, printed, "")


def test_show_has_exit_codes(cli: Cli, run_file: Path) -> None:
    assert cli("show", run_file, "-q") == (1, "", "")
    assert cli("show", run_file, "--exit-code").code == 1
    assert cli("show", run_file, "--fail-if", "global.rel_norm<0").code == 0
    code, out, err = cli("show", run_file, "--fail-if", "global.rel_norm>0")
    assert code == 1 and out and "check failed: global.rel_norm>0" in err
    code, out, err = cli("show", run_file, "--fail-if", "layers.7.rel_norm>0")
    assert code == 2 and out == "" and "nothing of that name" in err


def test_show_parquet(cli: Cli, run_file: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    target = tmp_path / "t.parquet"
    assert cli("show", run_file, "--format", "parquet", "-O", target).code == 0
    assert pq.read_table(target).num_rows == 18


@pytest.mark.parametrize("command", [["show"], ["mask", "list"]])
def test_what_is_no_run_file(cli: Cli, command: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"no HDF5")
    for name in ("x.h5", "missing.h5", "."):
        code, out, err = cli(*command, tmp_path / name)
        assert (code, out) == (2, "") and err.startswith("ckptdiff: error: ") and name.strip(".") in err


def test_a_report_never_replaces_the_run_file(cli: Cli, run_file: Path) -> None:
    before = run_file.read_bytes()
    for command in (["show"], ["mask", "list"]):
        assert cli(*command, run_file, "-O", run_file).code == 2
    assert run_file.read_bytes() == before


def test_mask_list(cli: Cli, engine: FakeEngine, run_file: Path) -> None:
    code, out, err = cli("mask", "list", run_file)
    assert (code, err) == (0, "") and "model.layers.0.self_attn.q_proj.weight" in out and "18 masks by the rule" in out
    listed = json.loads(cli("mask", "list", run_file, "--format", "json").out)
    assert listed["mask_rule"] == "abs:1e-05"
    assert [row["changed"] for row in listed["tensors"]] == engine.diff.columns["changed"].tolist()
    assert len(cli("mask", "list", run_file, "--format", "csv").out.splitlines()) == 19
    rows = [json.loads(line) for line in cli("mask", "list", run_file, "--format", "ndjson").out.splitlines()]
    assert rows == listed["tensors"]


def test_mask_export(cli: Cli, run_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "masks.safetensors"
    code, out, err = cli("mask", "export", run_file, "-o", target, "model.layers.0.self_attn.*")
    assert (code, out) == (0, "") and "4 masks written" in err
    masks = load_file(target)
    assert masks["model.layers.0.self_attn.k_proj.weight"].shape == (128, 512)
    packed = tmp_path / "masks.npz"
    assert cli("mask", "export", run_file, "-o", packed, "--layout", "flat", "model.norm.weight").code == 0
    assert np.load(packed)["model.norm.weight"].size == 0


@pytest.mark.parametrize("arguments", [["-o", "m.txt"], ["-o", "m.npz", "nonsense"], ["-o", "/nowhere/m.npz"]])
def test_exports_that_cannot_be(
    cli: Cli, run_file: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("mask", "export", run_file, *arguments)
    assert (code, out) == (2, "") and err.startswith("ckptdiff: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


@pytest.mark.parametrize("by", ["layer", "group"])
@pytest.mark.parametrize("form", ["table", "csv", "ndjson"])
def test_a_grouping_without_members_is_refused(
    cli: Cli, engine: FakeEngine, tmp_path: Path, by: str, form: str, make_diff: Any, make_facts: Any
) -> None:
    engine.diff = make_diff(tensors=[(make_facts("embed.weight", (8, 4)), 0.5)])
    run = tmp_path / "run.h5"
    assert cli("diff", "base", "tuned", "-o", run, "-q").code == 1
    code, out, err = cli("show", run, "--by", by, "--format", form)
    assert (code, out) == (2, "") and f"no tensor has a {by}" in err and "--by tensor shows each" in err
    assert cli("show", run, "--by", by, "--format", "json").code == 0
