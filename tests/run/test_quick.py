"""What `--quick` leaves unread: each figure is that of a run that reads everything, or undefined."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from quantised import LAYOUTS, save
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.checkpoint.open_shard import ShardReader
from ckptdiff.cli import main
from ckptdiff.errors import RunFileError
from ckptdiff.figures.catalogue import FIGURES
from ckptdiff.options import MaskRule, Options
from ckptdiff.run.engine import run
from ckptdiff.run.planning import prepare
from ckptdiff.run.tasks import Grain

OF_W0 = {figure.key for figure in FIGURES if figure.of_base}
Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Two folders of two files, the first of which is one file: a tensor of several blocks, small ones, integers."""
    rng = np.random.default_rng(1)
    same = {
        "layers.0.up_proj.weight": rng.normal(0, 0.02, (1100, 2000)).astype(np.float32),
        "layers.0.norm.weight": rng.normal(1, 0.02, 64).astype(np.float16),
        "layers.0.ids": np.arange(9),
        "layers.0.none": np.zeros((0, 3), np.float32),
    }
    base = {"layers.1.up_proj.weight": rng.normal(0, 0.02, (100, 90)).astype(np.float32)}
    base["layers.1.norm.weight"] = np.ones(70, np.float16)
    tuned = {name: np.where(rng.random(w.shape) < 0.2, w * w.dtype.type(1.01), w) for name, w in base.items()}
    sides = tmp_path / "base", tmp_path / "tuned"
    for side, changed in zip(sides, (base, tuned), strict=True):
        side.mkdir()
        save_file(changed, side / "model-00002-of-00002.safetensors")
    save_file(same, sides[0] / "model-00001-of-00002.safetensors")
    os.link(*(side / "model-00001-of-00002.safetensors" for side in sides))
    return sides


def differences(full: Any, quick: Any, where: str = "") -> set[str]:
    """Which keys of a quick run are undefined and those of the full one are not; fails if one has another value."""
    if isinstance(full, dict):
        assert full.keys() == quick.keys()
        return set().union(*(differences(full[key], quick[key], where or key) for key in full), set())
    if isinstance(full, list):
        assert len(full) == len(quick)
        return set().union(*(differences(*both, where) for both in zip(full, quick, strict=True)), set())
    assert quick in (full, None), where
    return {where} if quick != full else set()


def masks_of(path: Path) -> dict[str, bytes]:
    with ckptdiff.RunFile(path) as file:
        return {name: file.masks[name].packed().tobytes() for name in file.masks}


@pytest.mark.parametrize("mask", ["abs:1e-05", "top:20", "rel:1e-3", "bitwise", "none"])
def test_each_figure_is_that_of_a_full_run_or_undefined(pair: Pair, tmp_path: Path, mask: str) -> None:
    options = {"mask": mask, "compare": "stored", "out": tmp_path / "full.h5"}
    full, quick = (
        ckptdiff.diff(*pair, **options),
        ckptdiff.diff(*pair, **options | {"out": tmp_path / "quick.h5"}, quick=True),
    )
    assert quick.counts["unread"] == 4 and [facts.unread for facts in quick.tensors] == [True] * 4 + [False] * 2
    of_all = differences(full.overall, quick.overall)
    assert of_all == OF_W0 and quick.overall["changed"] == full.overall["changed"]
    # What nothing is known of the values of has no norms either, not even that of d: they might all be NaN.
    of_d = {"delta_norm", "delta_energy_share", "l1", "max_abs"}
    assert differences(full.per_tensor, quick.per_tensor) == OF_W0 | of_d
    assert full.per_tensor[4:] == quick.per_tensor[4:] and full.median_2d == quick.median_2d
    for by in ("module", "layer", "layer,module", "block", "tower"):
        assert differences(full.grouped(by), quick.grouped(by)) <= OF_W0 | of_d
    with ckptdiff.RunFile(tmp_path / "quick.h5") as file:
        loaded = file.load()
    assert loaded.per_tensor == quick.per_tensor and loaded.tensors == quick.tensors and loaded.overall == quick.overall
    if mask != "none":
        assert masks_of(tmp_path / "quick.h5") == masks_of(tmp_path / "full.h5")


def test_nothing_is_read_of_what_is_known(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = ShardReader.__init__

    def note(self: ShardReader, shard: Any, io: str) -> None:
        opened.append(Path(shard.path).name)
        real(self, shard, io)

    monkeypatch.setattr(ShardReader, "__init__", note)
    plan = prepare(*map(str, pair), options=Options(quick=True))
    changed = "model-00002-of-00002.safetensors"
    assert plan.total_bytes == sum((side / changed).stat().st_size for side in pair) - 2 * header_bytes(
        pair[0] / changed
    )
    ckptdiff.diff(*pair, quick=True, spectra="exact")
    assert set(opened) == {changed}
    opened.clear()
    found = ckptdiff.diff(pair[0], pair[0], quick=True)
    assert found.identical and not opened and found.overall["unchanged_bitwise"] == 1.0


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("grain", [Grain(blocks=1), Grain(blocks=2, tensors=1)])
def test_the_cut_into_tasks_changes_nothing(pair: Pair, tmp_path: Path, grain: Grain) -> None:
    sides, options = list(map(str, pair)), Options(quick=True, mask=MaskRule("bitwise"), threads=2)
    found = [
        run(*sides, out=tmp_path / f"{name}.h5", options=options, grain=one)
        for name, one in (("a", None), ("b", grain))
    ]
    assert found[0].per_tensor == found[1].per_tensor and masks_of(tmp_path / "a.h5") == masks_of(tmp_path / "b.h5")


def link_twice(file: Path, other: Path) -> None:
    """As the hub's cache does: names lead to one blob."""
    blob = file.with_name("blob")
    file.rename(blob)
    file.symlink_to(blob)
    other.symlink_to(blob)


@pytest.mark.parametrize("link", [os.link, link_twice, lambda file, other: other.symlink_to(file)])
def test_links_to_a_file_are_that_file(tmp_path: Path, link: Callable[[Path, Path], object]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "tuned").mkdir()
    files = [tmp_path / side / "model.safetensors" for side in ("base", "tuned")]
    save_file({"w.weight": np.ones((3, 4), np.float32)}, files[0])
    link(*files)
    assert ckptdiff.diff(*files, quick=True).counts["unread"] == 1
    files[1].unlink()
    shutil.copy(files[0], files[1])
    copied = ckptdiff.diff(*files, quick=True)
    assert copied.counts["unread"] == 0 and copied.identical, "equal, but nobody knew"


@pytest.mark.parametrize("layout", ["DeepSeek fp8", "MXFP4 of GPT-OSS", "NVFP4 of ModelOpt", "4 bits in words"])
def test_quantised_weights_of_one_file_are_not_read(tmp_path: Path, layout: str) -> None:
    sample = LAYOUTS[layout](np.random.default_rng(1), 64, 256)
    model = save(tmp_path / "model", sample.tensors, sample.config)
    full, quick = (ckptdiff.diff(model, model, quick=quick) for quick in (False, True))
    assert quick.counts["unread"] == quick.counts["matched"] > 0
    assert quick.overall["unchanged_bitwise"] == full.overall["unchanged_bitwise"] == 1.0


def test_every_report_says_so(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.h5"
    assert main(["diff", *map(str, pair), "--quick", "-o", str(out), "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["global"]["rel_norm"] is None and document["counts"]["unread"] == 4
    assert [row.get("unread") for row in document["tensors"]] == [True] * 4 + [None] * 2
    for command in (["show", str(out)], ["show", str(out), "--by", "tensor"], ["show", str(out), "--format", "ndjson"]):
        assert main(command) == 0
        told = capsys.readouterr()
        assert "4 tensors known to be the same, not read (--quick)" in told.out + told.err, command
        assert "nan" not in told.out.lower()
    page = tmp_path / "page.html"
    assert main(["report", str(out), "-o", str(page)]) == 0
    assert "4 tensors known to be the same" in page.read_text() and "--quick" in page.read_text()
    with h5py.File(out) as file:
        assert file["tensors/unread"][:].tolist() == [1, 1, 1, 1, 0, 0]
        assert np.isnan(file["tensors/base_norm"][0]) and not file["tensors/changed"][:4].any()
    capsys.readouterr()
    assert main(["diff", *map(str, pair), "--quick", "--fail-if", "counts.unread>3"]) == 1


def test_a_run_that_reads_all_does_not_go_on_from_a_quick_one(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"

    def give_up(event: object) -> None:
        if type(event).__name__ == "StageBegun" and getattr(event, "stage", "") == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckptdiff.diff(*pair, out=out, quick=True, resume=True, listener=give_up)
    with pytest.raises(RunFileError, match="belongs to another run") as raised:
        ckptdiff.diff(*pair, out=out, resume=True)
    assert "--quick yes" in str(raised.value.expected)
    assert ckptdiff.diff(*pair, out=out, quick=True, resume=True).counts["unread"] == 4
