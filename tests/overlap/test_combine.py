"""Combined masks against the same operations on booleans."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from updates import Updates

import ckptdiff
from ckptdiff.errors import CkptdiffError, MaskError, OptionError, RunFileError
from ckptdiff.overlap import combine_masks

OPERATIONS = {"union": np.logical_or, "intersect": np.logical_and, "minus": lambda a, b: a & ~b}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("indices", [(0, 1), (2, 0, 1)])
def test_masks_are_combined(operation: str, indices: tuple[int, ...], updates: Updates, tmp_path: Path) -> None:
    out = tmp_path / "combined.h5"
    written = combine_masks(operation, [updates.run(i) for i in indices], out)
    with ckptdiff.RunFile(out) as run, ckptdiff.RunFile(updates.run(indices[0])) as first:
        assert str(run.masks.rule) == "combined"
        loaded, original = run.load(), first.load()
        for name, mask in run.masks.items():
            wanted = reduce(OPERATIONS[operation], [updates.masks(i)[name] for i in indices])
            assert np.array_equal(mask.dense(), wanted)
            assert mask.count == wanted.sum()
            assert np.array_equal(run.histograms[name].base, first.histograms[name].base)
        assert run.provenance["run"]["combined"]["operation"] == operation
    assert loaded.overall["delta_norm"] == original.overall["delta_norm"]
    assert loaded.overall["changed"] == written.overall["changed"]
    assert loaded.mask_rule == "combined"


def test_the_command_says_what_it_wrote(
    updates: Updates, tmp_path: Path, invoke: Callable, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "both.h5"
    assert invoke("mask", "combine", updates.run(1), updates.run(2), "--intersect", "-o", out) == 0
    assert "masks, " in capsys.readouterr().err
    assert invoke("mask", "list", out) == 0
    assert "by the rule combined" in capsys.readouterr().out
    assert invoke("show", out) == 0
    assert "combined" in capsys.readouterr().out
    assert invoke("overlap", out, updates.run(1), "--format", "json") == 0
    assert invoke("mask", "combine", updates.run(1), updates.run(2), "-o", out) == 2
    assert "one of --union, --intersect and --minus" in capsys.readouterr().err


@pytest.mark.parametrize("operations", [[], ["--union", "--minus"]])
def test_the_command_wants_one_operation(
    operations: list[str], updates: Updates, tmp_path: Path, invoke: Callable, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.h5"
    assert invoke("mask", "combine", updates.run(1), updates.run(2), *operations, "-o", out) == 2
    assert "one of --union, --intersect and --minus" in capsys.readouterr().err
    assert not out.exists()


def test_without_stderr_the_command_says_nothing(
    updates: Updates,
    tmp_path: Path,
    invoke: Callable,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importlib.import_module("numpy.f2py")  # which SciPy imports; that of NumPy 2.0 wants a stderr when it is
    monkeypatch.setattr("sys.stderr", None)
    assert invoke("mask", "combine", updates.run(1), updates.run(2), "--union", "-o", tmp_path / "any.h5") == 0
    assert capsys.readouterr().out == ""


def test_what_cannot_be_combined_is_refused_and_nothing_is_written(updates: Updates, tmp_path: Path) -> None:
    out = tmp_path / "combined.h5"
    ckptdiff.diff(
        updates.folder / "tuned0.safetensors",
        updates.folder / "tuned1.safetensors",
        out=tmp_path / "other.h5",
        mask="bitwise",
    )
    some = tmp_path / "some.h5"
    ckptdiff.diff(
        updates.folder / "base.safetensors", updates.folder / "tuned1.safetensors", out=some, include=("*.mlp.*",)
    )
    refused: list[tuple[type[CkptdiffError], str, list[Path]]] = [
        (OptionError, "cannot be combined", [updates.run(0)]),
        (MaskError, "same base", [updates.run(0), tmp_path / "other.h5"]),
        (MaskError, "different tensors", [updates.run(0), some]),
        (RunFileError, "holds no masks", [updates.run(0), updates.run(1, "none")]),
        (RunFileError, "cannot read", [updates.run(0), tmp_path / "absent.h5"]),
    ]
    for error, message, runs in refused:
        with pytest.raises(error, match=message):
            combine_masks("union", runs, out)
        assert not out.exists()
    with pytest.raises(RunFileError, match="one of the inputs"):
        combine_masks("union", [updates.run(0), updates.run(1)], updates.run(1))
    combine_masks("union", [updates.run(0), tmp_path / "other.h5"], out, force=True)
    with ckptdiff.RunFile(out) as run:
        assert "another base" in run.provenance["warnings"][-1]


def test_a_diff_cannot_ask_for_combined_masks(updates: Updates) -> None:
    with pytest.raises(OptionError, match="no masks to combine"):
        ckptdiff.diff(updates.folder / "base.safetensors", updates.folder / "tuned0.safetensors", mask="combined")
