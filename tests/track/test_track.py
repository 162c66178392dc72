"""Trajectories against sets of coordinates, by NumPy."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from told_stages import told_stages
from trajectories import SHAPES, Trajectory

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.cli.track import _labels
from ckptdiff.errors import ChangedFileError, CheckpointError, OptionError, PairingError, RunFileError
from ckptdiff.events import Event, StageBegun
from ckptdiff.track import Track, load_track, save_track, track
from ckptdiff.track import follow as follow_module
from ckptdiff.track import sums as sums_module


def assert_rows(found: list[dict], expected: list[dict]) -> None:
    """Counts are equal, fractions and norms to seven digits; None is None."""
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        for key, value in wanted.items():
            if value is None or isinstance(value, int | np.integer):
                assert row[key] == value, key
            else:
                assert row[key] == pytest.approx(value, rel=3e-7), key


@pytest.mark.parametrize("compare", ["bf16", "stored"])
def test_every_figure_at_every_step(any_trajectory: Trajectory, compare: str) -> None:
    found = track(any_trajectory.paths[0], any_trajectory.paths[1:], compare=compare)
    assert_rows(found.overall(), any_trajectory.rows(list(SHAPES), compare))
    assert "1 tensor of integers or opaque codes" in found.warnings[-1]
    for label, rows in found.grouped("tensor"):
        assert_rows(rows, any_trajectory.rows([label["name"]], compare))


def test_a_listener_follows_every_byte(trajectory: Trajectory) -> None:
    told: list[Event] = []
    found = track(trajectory.paths[0], trajectory.paths[1:], listener=told.append)
    with_values = [name for name, shape in zip(found.names, found.shapes, strict=True) if math.prod(shape)]
    assert told_stages(told)["following"][-1].what == with_values[-1]
    (begun,) = (event for event in told if isinstance(event, StageBegun) and event.stage == "following")
    sides = [ckptdiff.open_checkpoint(path).tensors for path in trajectory.paths]
    assert begun.total == sum(tensors[name].nbytes for tensors in sides for name in found.names)
    assert begun.unit == "bytes"


def test_groups(trajectory: Trajectory) -> None:
    found = track(trajectory.paths[0], trajectory.paths[1:])
    layers = found.grouped("layer")
    assert [label for label, _ in layers] == [{"tower": "language", "layer": 0}, {"tower": "language", "layer": 1}]
    assert_rows(layers[1][1], trajectory.rows(["model.layers.1.self_attn.q_proj.weight"], "bf16"))
    modules = {label["module_type"] for label, _ in found.grouped("module")}
    assert modules == {"embed_tokens", "up_proj", "q_proj", "norm", "other"}


def save_backwards(tensors: dict[str, np.ndarray], folder: Path) -> Path:
    """Write shards of tensors that are no neighbours in a single file, those with the last names first."""
    folder.mkdir()
    names = sorted(tensors, reverse=True)
    shards = {f"model-{at}.safetensors": names[at::3] for at in range(3)}
    for shard, some in shards.items():
        save_file({name: tensors[name] for name in some}, folder / shard)
    weights = {name: shard for shard, some in shards.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return folder


def assert_same(found: Track, expected: Track) -> None:
    """All counts and all digits of norms, whatever the order of tensors."""
    order = [found.names.index(name) for name in expected.names]
    for key, counts in expected.counts.items():
        assert np.array_equal(found.counts[key][:, order], counts), key
    assert np.array_equal(found.delta_norms[:, order], expected.delta_norms)
    assert np.array_equal(found.base_norms[order], expected.base_norms)


def test_no_digit_depends_on_threads_or_on_the_file_layout(trajectory: Trajectory, tmp_path: Path) -> None:
    base, *steps = trajectory.paths
    expected = track(base, steps, threads=1)
    assert_same(track(base, steps, threads=3), expected)
    moved = [
        save_backwards(tensors, tmp_path / path.name)
        for path, tensors in zip(trajectory.paths, trajectory.sides, strict=True)
    ]
    assert_same(track(moved[0], moved[1:]), expected)
    assert_same(track(base, [steps[0], moved[2], *steps[2:]]), expected)


def test_no_digit_depends_on_the_other_tensors(trajectory: Trajectory) -> None:
    together = track(trajectory.paths[0], trajectory.paths[1:])
    for index, name in enumerate(together.names):
        alone = track(trajectory.paths[0], trajectory.paths[1:], include=(name,))
        assert np.array_equal(alone.delta_norms[:, 0], together.delta_norms[:, index])
        assert alone.base_norms[0] == together.base_norms[index]


def test_tensors_of_many_jobs(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "_jobs", partial(follow_module._jobs, blocks=1))
    found = track(trajectory.paths[0], trajectory.paths[1:])
    for label, rows in found.grouped("tensor"):
        assert_rows(rows, trajectory.rows([label["name"]], "bf16"))


def test_each_byte_is_read_once(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    real = sums_module.follow_spans

    def spy(spans: np.ndarray, files: np.ndarray, *rest: object) -> int:
        for tensor, *extent in spans:
            asked.extend(
                (os.fstat(row[1]).st_ino, *(int(row[2] + row[3] * at) for at in extent)) for row in files[tensor]
            )
        return real(spans, files, *rest)

    monkeypatch.setattr(sums_module, "follow_spans", spy)
    track(trajectory.paths[0], trajectory.paths[1:], exclude=("position_ids",))
    for path, tensors in zip(trajectory.paths, trajectory.sides, strict=True):
        spans = sorted(span[1:] for span in asked if span[0] == path.stat().st_ino)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
        assert sum(stop - start for start, stop in spans) == sum(tensor.nbytes for tensor in tensors.values())


def test_differences_that_float32_cannot_square(tmp_path: Path) -> None:
    base = np.zeros(3000, ml_dtypes.bfloat16)
    tuned = base.copy()
    tuned[:3] = np.array([1e-30, 3e-30, -2e-30], ml_dtypes.bfloat16)
    huge = base.copy()
    huge[2000] = 1e30
    base[-1] = huge[-1] = tuned[-1] = 1.0
    for name, values in (("base", base), ("tuned", tuned), ("huge", huge)):
        save_file({"w": values}, tmp_path / f"{name}.safetensors")
    found = track(tmp_path / "base.safetensors", [tmp_path / "tuned.safetensors", tmp_path / "huge.safetensors"])
    expected = np.sqrt(np.square(tuned[:3].astype(np.float64)).sum())
    assert found.delta_norms[:, 0] == pytest.approx([expected, float(huge[2000])], rel=1e-12)


def test_values_that_float32_cannot_sum_beside_ones_that_it_can(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    piece, tile = 1 << 18, 1 << 13
    base = (rng.standard_normal(3 * piece + 77) * 0.02).astype(ml_dtypes.bfloat16)
    base[: 3 * tile : 7] = np.inf  # equal on all sides
    step = base.copy()
    step[5 * tile : 9 * tile : 3] += ml_dtypes.bfloat16(0.01)
    step[6 * tile + 1] = np.nan
    base[piece : 2 * piece] = 0
    step[piece : 2 * piece] = 0
    small = base.copy()
    small[piece + 9 * tile : piece + 10 * tile : 5] = 2e-22
    step[2 * piece + tile] = 1e25
    step[2 * piece + 4 * tile :: 9] *= ml_dtypes.bfloat16(1.25)
    sides = [{"w": base}, {"w": step}, {"w": small}, {"w": np.where(np.arange(base.size) < 2 * piece, base, step)}]
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(sides))]
    for path, tensors in zip(paths, sides, strict=True):
        save_file(tensors, path)
    expected = Trajectory(tuple(paths), tuple(sides))
    found = track(paths[0], paths[1:])
    assert_rows(found.overall(), expected.rows(["w"], "bf16"))
    smallest = np.linalg.norm(small.astype(np.float64)[piece : 2 * piece])
    assert found.delta_norms[1, 0] == pytest.approx(smallest, rel=1e-12, abs=0)
    # Without the one that is larger by far, whatever was lost elsewhere shows.
    for tensors in sides:
        tensors["w"] = tensors["w"].copy()
        tensors["w"][2 * piece + tile] = 1
    for path, tensors in zip(paths, sides, strict=True):
        save_file(tensors, path)
    assert_rows(track(paths[0], paths[1:]).overall(), expected.rows(["w"], "bf16"))


def test_many_steps_with_zeros_of_either_sign(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shape, zeros = (40_001,), slice(20_000, 20_100)
    now = (rng.standard_normal(shape) * 0.02).astype(ml_dtypes.bfloat16)
    now[zeros] = 0
    sides = [{"w": now}]
    for _ in range(70):
        now = now.copy()
        moves = rng.random(shape) < 0.02
        now[moves] = (rng.choice([-1, 0, 1], moves.sum()) * 0.01).astype(ml_dtypes.bfloat16)
        now[zeros] = np.where(rng.random(100) < 0.5, 0.0, -0.0).astype(ml_dtypes.bfloat16)
        sides.append({"w": now})
    paths = [tmp_path / f"{step}.safetensors" for step in range(71)]
    for path, tensors in zip(paths, sides, strict=True):
        save_file(tensors, path)
    expected = Trajectory(tuple(paths), tuple(sides)).rows(["w"], "bf16")
    assert_rows(track(paths[0], paths[1:]).overall(), expected)


def test_a_track_file_brings_everything_back(trajectory: Trajectory, tmp_path: Path) -> None:
    found = track(trajectory.paths[0], trajectory.paths[1:])
    save_track(found, tmp_path / "track.h5")
    loaded = load_track(tmp_path / "track.h5")
    assert_equal(loaded, found)
    with h5py.File(tmp_path / "track.h5") as file:  # as the docs say it, without ckptdiff
        assert file["tensors/support"].shape == (4, len(SHAPES))
        assert file["tensors/name"].asstr()[0] in SHAPES
    assert [path.name for path in tmp_path.iterdir()] == ["track.h5"]


def assert_equal(one: Track, two: Track) -> None:
    for field in ("base", "steps", "compare", "names", "shapes", "warnings"):
        assert getattr(one, field) == getattr(two, field)
    for key in two.counts:
        assert np.array_equal(one.counts[key], two.counts[key])
    assert np.array_equal(one.base_norms, two.base_norms)
    assert np.array_equal(one.delta_norms, two.delta_norms)


@pytest.mark.parametrize("key", ["support", "touched", "reverted", "churned"])
@pytest.mark.parametrize("count", [1 << 63, (1 << 64) - 1, 2])
def test_counts_that_no_tensor_has_are_refused(key: str, count: int, trajectory: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "track.h5"
    save_track(track(trajectory.paths[0], trajectory.paths[1:2], include=("scalar",)), path)
    load_track(path)
    with h5py.File(path, "r+") as file:
        file[f"tensors/{key}"][0, 0] = count
    with pytest.raises(RunFileError, match="damaged") as caught:
        load_track(path)
    assert "from 0 to 1" in str(caught.value.expected)


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (["step1", "step2/"], ["step1", "step2"]),
        (["a/1/model.safetensors", "a/2/model.safetensors"], ["1", "2"]),
        (["a/x/1", "b/x/1", "b/y/1"], ["a/x", "b/x", "b/y"]),
        (["a/model.safetensors"], ["model.safetensors"]),
        (["a", "a"], ["a", "a"]),
        (["x/model", "model"], ["x", "."]),
        (["/a/1", "b/1", "c/2"], ["a/1", "b/1", "c/2"]),
    ],
)
def test_steps_are_labelled_by_what_tells_them_apart(steps: list[str], labels: list[str]) -> None:
    assert _labels(steps) == labels


@pytest.mark.parametrize(
    "kind", ["absent", "text", "foreign", "incomplete", "newer", "no version", "damaged", "short", "no step"]
)
def test_files_that_are_no_track_files(kind: str, trajectory: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "track.h5"
    if kind == "text":
        path.write_text("track")
    elif kind != "absent":
        save_track(track(trajectory.paths[0], trajectory.paths[1:2], include=("scalar",)), path)
        with h5py.File(path, "r+") as file:
            if kind == "foreign":
                file.attrs["format"] = "other"
            elif kind == "incomplete":
                file.attrs["complete"] = 0
            elif kind == "newer":
                file.attrs["format_version"] = 99
            elif kind == "no version":
                del file.attrs["format_version"]
            elif kind == "no step":
                known = json.loads(file["provenance"][()])
                del file["provenance"]
                file["provenance"] = json.dumps(known | {"steps": []})
                for key in ("support", "touched", "reverted", "churned", "delta_norm"):
                    figures = file[f"tensors/{key}"][:0]
                    del file[f"tensors/{key}"]
                    file[f"tensors/{key}"] = figures
            elif kind == "short":
                counts = file["tensors/support"][:0]
                del file["tensors/support"]
                file["tensors/support"] = counts
            else:
                del file["tensors/support"]
    with pytest.raises(RunFileError) as caught:
        load_track(path)
    assert caught.value.file == str(path) and caught.value.found and caught.value.hint


def test_what_cannot_be_followed_is_refused(trajectory: Trajectory, tmp_path: Path) -> None:
    base = trajectory.paths[0]
    with pytest.raises(OptionError, match="nothing to follow"):
        track(base, [])
    with pytest.raises(OptionError, match="threads out of range"):
        track(base, trajectory.paths[1:], threads=-1)
    with pytest.raises(CheckpointError):
        track(base, [tmp_path / "absent"])
    save_file({"alone": np.ones(3, np.float32)}, tmp_path / "alone.safetensors")
    with pytest.raises(PairingError):
        track(base, [tmp_path / "alone.safetensors"])
    with pytest.raises(PairingError, match="no floating tensor"):
        track(base, trajectory.paths[1:], include=("position_ids",))
    tensors = load_file(trajectory.paths[2])
    del tensors["scalar"]
    save_file(tensors, tmp_path / "step.safetensors")
    with pytest.raises(PairingError, match="in one of the two checkpoints only") as caught:
        track(base, [trajectory.paths[1], tmp_path / "step.safetensors"], include=("scalar",))
    assert caught.value.file == str(tmp_path / "step.safetensors") and caught.value.found == "scalar"


def test_tensors_that_one_step_lacks_are_left_out_and_said(trajectory: Trajectory, tmp_path: Path) -> None:
    tensors = load_file(trajectory.paths[2])
    del tensors["scalar"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].copy()
    save_file(tensors, tmp_path / "step.safetensors")
    found = track(trajectory.paths[0], [trajectory.paths[1], tmp_path / "step.safetensors"])
    assert set(found.names) == set(SHAPES) - {"scalar", "model.norm.weight"}
    assert any("lacks 2 tensors of the base" in warning for warning in found.warnings)


def test_what_is_not_stored_alike_is_left_out_and_said_in_one_sentence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kept, gate, up = (rng.standard_normal((6, 8)).astype(ml_dtypes.bfloat16) for _ in range(3))
    split = {"n.weight": kept, "a.mlp.gate_proj.weight": gate, "a.mlp.up_proj.weight": up}
    fused = {"n.weight": kept + 1, "a.mlp.gate_up_proj.weight": np.concatenate([gate, up])}
    codes = {"a.mlp.gate_proj.weight": gate.astype(ml_dtypes.float8_e4m3fn)}
    scales = {"a.mlp.gate_proj.weight_scale": np.array([0.5], np.float32)}
    for name, tensors in {"base": split, "fused": fused, "quantised": split | codes | scales}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    steps = {
        "fused": "2 tensors left out, as only whole stored tensors are followed, .*: a.mlp.gate_proj.weight, a.mlp.up",
        "quantised": "1 tensor left out, as only whole stored tensors are followed, .*: a.mlp.gate_proj.weight$",
    }
    for step, sentence in steps.items():
        found = track(tmp_path / "base.safetensors", [tmp_path / f"{step}.safetensors"])
        assert [bool(re.search(sentence, warning)) for warning in found.warnings] == [True]
        assert found.names == (("n.weight",) if step == "fused" else ("a.mlp.up_proj.weight", "n.weight"))
    save_file(codes | scales, tmp_path / "codes.safetensors")
    with pytest.raises(PairingError, match="left out, as only whole stored tensors are followed"):
        track(tmp_path / "codes.safetensors", [tmp_path / "codes.safetensors"])


def test_a_checkpoint_that_shrinks_is_an_error(
    trajectory: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "step.safetensors"
    copy.write_bytes(trajectory.paths[1].read_bytes())
    real = sums_module.follow_spans

    def shrink(*arguments: object) -> int:
        os.truncate(copy, 1000)
        return real(*arguments)

    monkeypatch.setattr(sums_module, "follow_spans", shrink)
    with pytest.raises(ChangedFileError):
        track(trajectory.paths[0], [copy])


def test_a_read_that_fails_once_names_tensor_and_files(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums_module, "follow_spans", lambda *arguments: 0)
    with pytest.raises(CheckpointError, match="could not be read, and then it could") as caught:
        track(trajectory.paths[0], trajectory.paths[1:3])
    assert caught.value.file == " or ".join(str(path) for path in trajectory.paths[:3])
    assert caught.value.tensor in SHAPES and caught.value.hint


def test_one_step_has_no_chart_and_a_file_has_pictures(
    trajectory: Trajectory, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, *steps = map(str, trajectory.paths)
    charts = []
    for some in (steps[:1], steps):
        out = tmp_path / f"{len(some)}.h5"
        assert main(["track", base, *some, "-o", str(out), "--no-progress"]) == 0
        printed = capsys.readouterr().out
        assert printed.endswith(f"\npictures: ckptdiff report {out}\n")
        assert main(["track", str(out)]) == 0
        assert capsys.readouterr().out == printed
        charts.append("○ ever did" in printed)
    assert charts == [False, True]


def test_the_command(trajectory: Trajectory, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths, out = [str(path) for path in trajectory.paths], tmp_path / "track.h5"
    expected = trajectory.rows(list(SHAPES), "bf16")
    assert main(["track", *paths, "-o", str(out), "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "ckptdiff.track/1"
    assert document["steps"] == paths[1:]
    assert any("integers" in warning for warning in document["warnings"])
    assert_rows(document["global"], expected)
    assert {"tensors", "modules", "layers", "blocks"} < document.keys()
    assert document["layers"][0]["layer"] == 0

    assert main(["track", str(out), "--format", "csv", "--by", "block"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["step"] for row in rows[:4]] == ["0", "1", "2", "3"]
    assert {row["block"] for row in rows} == {"embedding", "ffn", "attention", "norm", "other"}

    assert main(["track", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("step1.safetensors")
    assert any("●" in line for line in lines)
    assert "\x1b" not in "".join(lines)

    for option in (["-o", str(tmp_path / "again.h5")], ["--include", "*"], ["--compare", "bf16"]):
        assert main(["track", str(out), *option]) == 2
        assert "only printed again" in capsys.readouterr().err
    assert not (tmp_path / "again.h5").exists()


@pytest.mark.parametrize("unit", [1.0, 3e152, 1e200])
def test_norms_near_and_beyond_the_end_of_float64(unit: float, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = np.arange(1.0, 17) * unit
    for name, values in (("base", base), ("step", base * 1.5), ("back", base)):
        save_file({"a": values, "b": values}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "step", "back")]
    expected = [None, None] if unit > 1e199 else [pytest.approx(0.5), 0]
    for by in ("tensor", "all"):
        assert main(["track", *paths, "--compare", "stored", "--format", "csv", "--by", by, "--no-progress"]) == 0
        out, err = capsys.readouterr()
        cells = [row["rel_norm"] for row in csv.DictReader(io.StringIO(out))]
        assert [float(cell) if cell else None for cell in cells[-2:]] == expected
        assert "Warning" not in err


def test_the_command_replaces_nothing_but_track_files(
    trajectory: Trajectory, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths, out = [str(path) for path in trajectory.paths[:2]], tmp_path / "track.h5"
    out.write_text("precious")
    assert main(["track", *paths, "-o", str(out)]) == 2
    assert "not a ckptdiff track file" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert main(["track", *paths, "-o", paths[0]]) == 2
    assert "one of the inputs" in capsys.readouterr().err
    assert main(["track", *paths, "-O", paths[1]]) == 2
    assert main(["track", paths[0]]) == 2
    assert "nothing to follow" in capsys.readouterr().err
    assert main(["track", str(tmp_path / "absent.h5")]) == 2
    assert "absent.h5" in capsys.readouterr().err
    assert main(["track", *paths, "-o", ""]) == 2
    assert "a directory" in capsys.readouterr().err
