"""What torch saved gives the figures and masks, digit for digit, that the same tensors give as safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_ranks import part_of, save_as_dcp, save_by_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.errors import CheckpointError
from ckptdiff.exports import apply_patch, export_patch
from ckptdiff.figures.result import Diff
from ckptdiff.runfile.identity import open_side
from ckptdiff.track import track

FIXTURES = Path(__file__).parents[2] / "fixtures"
State = dict[str, torch.Tensor]
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": [{"lr": 0.1}]}


def state_of(folder: Path) -> State:
    """All tensors of a folder of safetensors, in the order of its files."""
    found: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def as_zip(state: State, folder: Path) -> Path:
    folder.mkdir()
    torch.save({"model": state, "optimizer": OPTIMIZER}, folder / "step.pt")
    return folder / "step.pt"


def as_views(state: State, folder: Path) -> Path:
    """None of them in one run: matrices transposed, all else every other element of a storage."""
    folder.mkdir()
    views = {
        name: value.t().contiguous().t() if value.dim() == 2 else torch.stack([value, value], -1)[..., 0]
        for name, value in state.items()
    }
    torch.save(views, folder / "views.pth")
    return folder


def as_shards(state: State, folder: Path) -> Path:
    folder.mkdir()
    names = sorted(state)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in some}, folder / file)
        index["weight_map"] |= dict.fromkeys(some, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def _cut(state: State, mesh: torch.distributed.device_mesh.DeviceMesh) -> State:
    """Rows over one dimension of the mesh, and columns of every other matrix over the other."""
    cut = {}
    for number, (name, value) in enumerate(state.items()):
        axes = [Shard(0), Shard(value.dim() - 1 if number % 2 else 0)]
        cut[name] = part_of(value, mesh, axes) if value.dim() else value
    return cut


def as_ranks(state: State, folder: Path) -> Path:
    return save_by_ranks(folder, (2, 2), lambda mesh: _cut(state, mesh))


def as_dcp(state: State, folder: Path) -> Path:
    return save_as_dcp(folder, (2, 2), lambda mesh: {"model": _cut(state, mesh)})


FORMS: dict[str, Callable[[State, Path], Path]] = {
    form.__name__: form for form in (as_zip, as_views, as_shards, as_ranks, as_dcp)
}


def assert_same(found: Diff, expected: Diff) -> None:
    """Every figure of every tensor, to the last digit, whatever the order of tensors."""
    order = {facts.name: row for row, facts in enumerate(found.tensors)}
    assert order.keys() == {facts.name for facts in expected.tensors}
    rows = [order[facts.name] for facts in expected.tensors]
    assert [found.tensors[row] for row in rows] == list(expected.tensors)
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(found.columns[name][rows], column, name)
    assert (found.only_in_base, found.only_in_tuned) == (expected.only_in_base, expected.only_in_tuned)
    assert found.identical == expected.identical


def masks_of(path: Path) -> dict[str, bytes]:
    with ckptdiff.RunFile(path) as run:
        return {name: mask.packed().tobytes() for name, mask in run.masks.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Diff, dict[str, bytes]]]:
    """What the fixtures themselves give, by their name."""
    folder = tmp_path_factory.mktemp("expected")

    @cache
    def of(case: str) -> tuple[Diff, dict[str, bytes]]:
        sides = (FIXTURES / case / side for side in ("base", "tuned"))
        diff = ckptdiff.diff(*sides, out=folder / f"{case}.h5", spectra="randomized" if case == "llama" else None)
        return diff, masks_of(folder / f"{case}.h5")

    return of


@pytest.mark.parametrize(
    ("form", "case"),
    [
        *((form, "llama") for form in FORMS),
        *((form, case) for form in ("as_views", "as_dcp") for case in ("moe", "fp8")),
    ],
)
def test_figures_and_masks(
    tmp_path: Path, expected: Callable[[str], tuple[Diff, dict[str, bytes]]], form: str, case: str
) -> None:
    folders = [FIXTURES / case / side for side in ("base", "tuned")]
    base, tuned = (FORMS[form](state_of(folder), tmp_path / folder.name) for folder in folders)
    figures, masks = expected(case)
    spectra = "randomized" if figures.spectra is not None else None
    found = ckptdiff.diff(base, tuned, out=tmp_path / "run.h5", threads=2, spectra=spectra)
    assert_same(found, figures)
    assert masks_of(tmp_path / "run.h5") == masks
    if figures.spectra is not None:
        assert found.spectra is not None
        rows = {facts.name: found.spectra.tensor(row) for row, facts in enumerate(found.tensors)}
        for row, facts in enumerate(figures.tensors):
            assert str(rows[facts.name]) == str(figures.spectra.tensor(row))  # NaN equals itself as text
    assert_same(ckptdiff.diff(folders[0], tuned, out=tmp_path / "mixed.h5", io="mmap"), figures)
    assert masks_of(tmp_path / "mixed.h5") == masks


def test_trajectories(tmp_path: Path) -> None:
    state, tuned = (state_of(FIXTURES / "llama" / side) for side in ("base", "tuned"))
    half = {
        name: torch.where(torch.arange(value.shape[-1]) % 2 == 0, value, state[name]) for name, value in tuned.items()
    }
    save_file(half, tmp_path / "half.safetensors")
    plain = [FIXTURES / "llama" / "base", tmp_path / "half.safetensors", FIXTURES / "llama" / "tuned"]
    expected = track(plain[0], plain[1:])
    for form in FORMS.values():
        sides = [form(one, tmp_path / f"{form.__name__}{step}") for step, one in enumerate((state, half, tuned))]
        for base, *steps in (sides, [plain[0], *sides[1:]], [sides[0], plain[1], sides[2]]):
            found = track(base, steps, threads=2)
            order = [found.names.index(name) for name in expected.names]
            assert len(order) == len(found.names)
            for name, counts in expected.counts.items():
                np.testing.assert_array_equal(found.counts[name][:, order], counts)
            np.testing.assert_array_equal(found.base_norms[order], expected.base_norms)
            np.testing.assert_array_equal(found.delta_norms[:, order], expected.delta_norms)


@pytest.mark.parametrize("form", FORMS)
def test_what_starts_from_a_run(tmp_path: Path, form: str) -> None:
    """Patches, spectra that are added later, and the look at whether a checkpoint is still the one of the run."""
    base, tuned = (FORMS[form](state_of(FIXTURES / "llama" / side), tmp_path / side) for side in ("base", "tuned"))
    out = tmp_path / "run.h5"
    ckptdiff.diff(base, tuned, out=out, compare="stored", mask="bitwise")
    with ckptdiff.RunFile(out) as run:
        export_patch(run, tmp_path / "patch.safetensors")
    apply_patch(FIXTURES / "llama" / "base", tmp_path / "patch.safetensors", tmp_path / "patched", force=True)
    assert ckptdiff.diff(tmp_path / "patched", tuned, compare="stored").identical
    with pytest.raises(CheckpointError, match="a patch is applied to safetensors files"):
        apply_patch(base, tmp_path / "patch.safetensors", tmp_path / "again")
    assert main(["spectra", "add", str(out)]) == 0
    file = base if base.is_file() else next(path for path in base.iterdir() if path.suffix != ".json")
    file.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="not the base checkpoint"), ckptdiff.RunFile(out) as run:
        open_side(run, "base")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_of(FIXTURES / "llama" / "base")
    folder = as_dcp(state, tmp_path / "dcp")
    assert main(["inspect", str(folder), "--format", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    rows = listed["tensors"]
    assert listed["shards"] == 4
    assert rows[0]["shard"].startswith("__0_0.distcp, __1_0.distcp")
    assert {row["name"]: row["shape"] for row in rows} == {name: list(value.shape) for name, value in state.items()}
    path = as_zip(state, tmp_path / "zip")
    assert main(["diff", str(path), str(folder)]) == 0
    told = capsys.readouterr()
    assert "identical" in told.out
    assert "its part 'model' is read, and not 'optimizer' (1 tensor)" in told.out
    assert main(["inspect", str(path), "-O", str(path), "--format", "csv"]) == 2
    (folder / "__2_0.distcp").unlink()
    assert main(["diff", str(path), str(folder), "-o", str(tmp_path / "run.h5")]) == 2
    told = capsys.readouterr()
    assert "file that is missing" in told.err
    assert "__2_0.distcp" in told.err
    assert not (tmp_path / "run.h5").exists()
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    assert main(["diff", str(path), str(path)]) == 2
    assert "torch.nn.modules.linear.Linear" in capsys.readouterr().err
