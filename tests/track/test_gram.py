"""Which way an update goes: products, cosines, straightness and subspaces against NumPy."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file
from trajectories import SHAPES, Trajectory, cast

from ckptdiff.cli import main
from ckptdiff.errors import OptionError, RunFileError
from ckptdiff.track import load_track, save_track, track
from ckptdiff.track.geometry import gram_row, line_r2, random_walk, rank1_share, step_cosines

KEYS = ("step_rel_norm", "step_cosine", "rank1_share", "line_r2")


def updates(trajectory: Trajectory, names: list[str], compare: str = "bf16") -> np.ndarray:
    """W - W0 at each step, where it is finite; shape (steps, coordinates)."""
    base, *later = (np.concatenate([cast(side[name], compare).ravel() for name in names]) for side in trajectory.sides)
    with np.errstate(invalid="ignore"):
        deltas = np.array([now - base for now in later])
    return np.where(np.isfinite(deltas), deltas, 0.0)


def expected(deltas: np.ndarray, base_norm: float) -> dict[str, float]:
    """Figures of the last step, from the updates themselves."""
    steps = np.diff(deltas, axis=0, prepend=0)
    points = np.vstack([np.zeros_like(deltas[:1]), deltas])
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False) ** 2
    whole = np.linalg.svd(deltas, compute_uv=False) ** 2
    lengths = np.linalg.norm(steps, axis=1)
    return {
        "step_rel_norm": lengths[-1] / base_norm,
        "step_cosine": steps[-1] @ steps[-2] / lengths[-1] / lengths[-2],
        "rank1_share": whole[0] / whole.sum(),
        "line_r2": spread[0] / spread.sum(),
    }


@pytest.mark.parametrize("compare", ["bf16", "stored"])
def test_products_of_every_two_steps(any_trajectory: Trajectory, compare: str) -> None:
    found = track(any_trajectory.paths[0], any_trajectory.paths[1:], compare=compare, gram=True)
    plain = track(any_trajectory.paths[0], any_trajectory.paths[1:], compare=compare)
    assert np.array_equal(found.delta_norms, plain.delta_norms) and plain.products is None
    with pytest.raises(OptionError, match="no products"):
        plain.gram()
    for row, name in enumerate(found.names):
        deltas = updates(any_trajectory, [name], compare)
        scale = max((deltas**2).sum(), 1e-300)
        assert np.abs(found.gram([row]) - deltas @ deltas.T).max() <= 1e-13 * scale, name
    deltas = updates(any_trajectory, list(SHAPES), compare)
    base = np.concatenate([cast(any_trajectory.sides[0][name], compare).ravel() for name in SHAPES])
    norm = np.linalg.norm(base[np.isfinite(base)])
    rows = found.overall()
    for step in range(1, len(rows)):
        wanted = expected(deltas[: step + 1], norm)
        assert {key: rows[step][key] for key in KEYS} == pytest.approx(wanted, rel=1e-6), step
    assert [rows[0][key] for key in KEYS[1:]] == [None] * 3
    assert rows[0]["step_rel_norm"] == pytest.approx(rows[0]["rel_norm"], rel=1e-6)
    (layer,) = (rows for label, rows in found.grouped("layer") if label["layer"] == 1)
    alone = updates(any_trajectory, ["model.layers.1.self_attn.q_proj.weight"], compare)
    assert layer[-1]["rank1_share"] == pytest.approx(expected(alone, 1.0)["rank1_share"], rel=1e-9)


def test_no_digit_depends_on_threads_or_other_tensors(trajectory: Trajectory) -> None:
    base, *steps = trajectory.paths
    one, three = (track(base, steps, gram=True, spectra=True, threads=threads) for threads in (1, 3))
    assert np.array_equal(one.products, three.products)
    for key in ("left_overlap", "right_overlap"):
        assert np.array_equal(getattr(one.locking, key), getattr(three.locking, key), equal_nan=True)
    for row, name in enumerate(one.names):
        alone = track(base, steps, gram=True, include=(name,))
        assert np.array_equal(alone.products[0], one.products[row])


def test_values_that_are_not_finite_or_out_of_range(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = [rng.standard_normal(20_000).astype(np.float32) for _ in range(4)]
    sides[0][:3], sides[1][:3], sides[2][:3] = [np.nan, np.inf, 3e38], [np.nan, np.inf, -3e38], [1, -np.inf, np.inf]
    sides[3] = sides[0]
    paths = []
    for number, values in enumerate(sides):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"w": values}, paths[-1])
    deltas = updates(Trajectory(tuple(paths), tuple({"w": side} for side in sides)), ["w"], "stored")
    found = track(paths[0], paths[1:], compare="stored", gram=True)
    assert found.gram() == pytest.approx(deltas @ deltas.T, rel=1e-12)
    # Twice the base, in float64, whose squares are beyond it: undefined, not infinite.
    huge = [tmp_path / "huge0.safetensors", tmp_path / "huge1.safetensors"]
    for path, factor in zip(huge, (1.0, 2.0), strict=True):
        save_file({"w": np.full(40, 1e200) * factor}, path)
    beyond = track(huge[0], [huge[1], huge[1]], compare="stored", gram=True, spectra=True)
    assert [[row[key] for key in KEYS] for row in beyond.overall()] == [[None] * 4] * 2
    assert json.dumps(beyond.as_json(), allow_nan=False)


def test_many_steps_are_estimated_from_a_sample(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shapes = {"large": (90, 8192), "small": (100, 30)}
    now = {name: rng.standard_normal(shape) * 0.02 for name, shape in shapes.items()}
    drift = {name: rng.standard_normal(shape) * 1e-3 for name, shape in shapes.items()}
    paths, sides = [], []
    for step in range(14):
        sides.append({name: value.astype(ml_dtypes.bfloat16) for name, value in now.items()})
        paths.append(tmp_path / f"{step}.safetensors")
        save_file(sides[-1], paths[-1])
        now = {name: value + drift[name] + rng.standard_normal(value.shape) * 1e-3 for name, value in now.items()}
    found = track(paths[0], paths[1:], gram=True)
    assert any("one tile of 8,192 coordinates in 16" in words and "13 steps" in words for words in found.warnings)
    trajectory = Trajectory(tuple(paths), tuple(sides))
    small, large = updates(trajectory, ["small"]), updates(trajectory, ["large"])
    assert found.gram([found.names.index("small")]) == pytest.approx(small @ small.T, rel=1e-12)
    # Ninety tiles: one of each sixteen, at places 0, 5, 10, 15, 4 and 9 of theirs.
    chosen = large.reshape(13, 90, 8192)[:, [0, 21, 42, 63, 68, 89]].reshape(13, -1)
    assert found.gram([found.names.index("large")]) == pytest.approx(chosen @ chosen.T * 90 / 6, rel=1e-9)
    assert found.gram() == pytest.approx(large @ large.T + small @ small.T, rel=0.02)
    exact = track(paths[0], paths[1:13], gram=True)
    assert exact.warnings == () and exact.gram([0, 1]) == pytest.approx(
        large[:12] @ large[:12].T + small[:12] @ small[:12].T, rel=1e-9
    )


def test_a_straight_line_a_random_walk_and_a_way_there_and_back() -> None:
    rng = np.random.default_rng(1)
    direction = rng.standard_normal(50_000)
    line = np.outer(np.arange(1, 7), direction)
    assert gram_row(line @ line.T, 1.0) == pytest.approx(
        {
            "step_rel_norm": np.linalg.norm(direction),
            "step_cosine": 1.0,
            "rank1_share": 1.0,
            "line_r2": 1.0,
            "rank1_share_null": rank1_share(random_walk(line @ line.T)),
            "line_r2_null": line_r2(random_walk(line @ line.T)),
        }
    )
    walk = np.cumsum(rng.standard_normal((6, 50_000)) * rng.uniform(0.5, 2, (6, 1)), axis=0)
    found = gram_row(walk @ walk.T, 1.0)
    for key in ("rank1_share", "line_r2"):
        assert found[key] == pytest.approx(found[f"{key}_null"], abs=0.01)
    assert abs(found["step_cosine"]) < 0.02
    back = np.array([direction, 0 * direction, direction, direction])
    cosines = step_cosines(back @ back.T)
    assert cosines[:3, :3] == pytest.approx(np.array([[1, -1, 1], [-1, 1, -1], [1, -1, 1]]))
    assert np.isnan(cosines[3]).all() and np.isnan(cosines[:, 3]).all()
    assert gram_row(back @ back.T, 0.0)["step_rel_norm"] is None
    zero = gram_row(np.zeros((3, 3)), 1.0)
    assert zero.pop("step_rel_norm") == 0.0 and {*zero.values()} == {None}


@given(arrays(np.float64, (4, 6), elements=st.floats(-10, 10, width=16)))
def test_figures_of_any_path(deltas: np.ndarray) -> None:
    """Shares lie between 0 and 1, do not depend on the unit, and a line is no better than a plane."""
    row, scaled = (gram_row(points @ points.T, 1.0) for points in (deltas, deltas * 4))
    for key in ("rank1_share", "rank1_share_null", "line_r2", "line_r2_null"):
        assert row[key] is None or 0.24 <= row[key] <= 1
        assert row[key] == pytest.approx(scaled[key], abs=1e-12)
    if row["line_r2"] is not None:
        assert row["line_r2"] == pytest.approx(expected_line(deltas), abs=1e-9)


def expected_line(deltas: np.ndarray) -> float:
    points = np.vstack([np.zeros_like(deltas[:1]), deltas])
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False) ** 2
    return spread[0] / spread.sum()


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict[str, np.ndarray]]]:
    """Matrices of every kind through three steps, one of which has NaN, and one an update of rank 4."""
    folder, rng = tmp_path_factory.mktemp("matrices"), np.random.default_rng(2)
    shapes = {
        "tall.weight": (90, 40),
        "wide.weight": (30, 70),
        "small.weight": (6, 5),
        "model.layers.0.mlp.experts.up_proj": (3, 40, 36),
        "column.weight": (9, 1),
        "norm.weight": (40,),
        "bad.weight": (40, 40),
        "low.weight": (60, 50),
    }
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    sides = [base]
    for step in range(3):
        moved = {
            name: value + 1e-3 * rng.standard_normal(value.shape).astype(np.float32)
            for name, value in sides[-1].items()
        }
        left, right = (rng.standard_normal((n, 4)).astype(np.float32) for n in (60, 50))
        moved["low.weight"] = base["low.weight"] + (left @ right.T if step else 0)
        moved["bad.weight"][0, 0] = np.nan if step == 1 else 0
        sides.append(moved)
    paths = [folder / f"{number}.safetensors" for number in range(len(sides))]
    for path, tensors in zip(paths, sides, strict=True):
        save_file(tensors, path)
    return paths, sides


def overlap_of(one: np.ndarray, two: np.ndarray, rank: int) -> tuple[float, float]:
    """By the singular vectors of NumPy: left and right."""
    (left, _, right), (other_left, _, other_right) = (np.linalg.svd(d, full_matrices=False) for d in (one, two))
    return (
        np.square(left[:, :rank].T @ other_left[:, :rank]).sum() / rank,
        np.square(right[:rank] @ other_right[:rank].T).sum() / rank,
    )


def test_subspaces_of_every_two_steps(matrices: tuple[list[Path], list[dict[str, np.ndarray]]]) -> None:
    paths, sides = matrices
    found = track(paths[0], paths[1:], compare="stored", spectra=True)
    assert found.products is None and found.locking is not None

    def update(name: str, step: int, part: object = ...) -> np.ndarray:
        return (sides[step][name].astype(float) - sides[0][name].astype(float))[part]

    def row_of(name: str) -> np.ndarray:
        at = found.names.index(name)
        return np.array([found.locking.left_overlap[at], found.locking.right_overlap[at]])

    pairs = [(2, 1), (3, 1), (3, 2)]
    for name, rank in {"tall.weight": 16, "wide.weight": 15, "small.weight": 2}.items():
        wanted = np.array([overlap_of(update(name, a), update(name, b), rank) for a, b in pairs]).T
        assert row_of(name) == pytest.approx(wanted, rel=1e-4), name
        at, (m, n) = found.names.index(name), sides[0][name].shape
        assert found.locking.left_overlap_null[at] == pytest.approx(rank / m)
        assert found.locking.right_overlap_null[at] == pytest.approx(rank / n)
    name = "model.layers.0.mlp.experts.up_proj"
    each = [[overlap_of(update(name, a, e), update(name, b, e), 16) for a, b in pairs] for e in range(3)]
    assert row_of(name) == pytest.approx(np.median(each, axis=0).T, rel=1e-4)
    assert np.isnan(row_of("column.weight")).all() and np.isnan(row_of("norm.weight")).all()
    assert np.isnan(row_of("bad.weight")[:, [0, 2]]).all() and np.isfinite(row_of("bad.weight")[:, 1]).all()
    # Its first update is zero, and the others have rank 4.
    assert np.isnan(row_of("low.weight")[:, :2]).all()
    assert row_of("low.weight")[:, 2] == pytest.approx(overlap_of(update("low.weight", 3), update("low.weight", 2), 4))
    (row,) = (rows for label, rows in found.grouped("tensor") if label["name"] == "tall.weight")
    assert [row[step]["left_overlap"] for step in range(3)] == [
        None,
        found.locking.left_overlap[found.names.index("tall.weight"), 0],
        found.locking.left_overlap[found.names.index("tall.weight"), 2],
    ]
    matrix = found.as_json()["left_overlaps"]
    assert matrix[2][1] == matrix[1][2] == found.overall()[2]["left_overlap"] and matrix[0][0] == 1.0


def test_subspaces_that_a_krylov_space_finds(tmp_path: Path) -> None:
    """Of updates whose leading directions stand out, in a matrix too large to take all eigenvalues of."""
    rng = np.random.default_rng(7)
    m, n = 720, 660
    base = rng.standard_normal((m, n)).astype(np.float32)
    left, right = rng.standard_normal((m, 16)), rng.standard_normal((n, 16))
    one = left @ right.T / 30 + rng.standard_normal((m, n)) * 0.05
    two = one + rng.standard_normal((m, 16)) @ rng.standard_normal((16, n)) / 40
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    sides = [base, base + one.astype(np.float32), base + two.astype(np.float32)]
    for path, values in zip(paths, sides, strict=True):
        save_file({"w.weight": values}, path)
    found = track(paths[0], paths[1:], compare="stored", spectra=True)
    wanted = overlap_of(sides[2].astype(float) - base, sides[1].astype(float) - base, 16)
    assert (found.locking.left_overlap[0, 0], found.locking.right_overlap[0, 0]) == pytest.approx(wanted, rel=1e-3)


def test_updates_that_float32_does_not_hold(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base, one, two = (rng.standard_normal((40, 30)) for _ in range(3))
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    sides = [base, base + 1e-10 * one, base + 1e-10 * (one + two)]
    for path, values in zip(paths, sides, strict=True):
        save_file({"w.weight": values}, path)
    found = track(paths[0], paths[1:], compare="stored", gram=True, spectra=True)
    left, right = overlap_of(sides[2] - base, sides[1] - base, 15)
    assert (found.locking.left_overlap[0, 0], found.locking.right_overlap[0, 0]) == pytest.approx((left, right))
    deltas = np.array([side.ravel() - base.ravel() for side in sides[1:]])
    assert found.gram() == pytest.approx(deltas @ deltas.T)


def test_a_track_file_keeps_them_and_older_ones_have_none(trajectory: Trajectory, tmp_path: Path) -> None:
    found, path = track(trajectory.paths[0], trajectory.paths[1:], gram=True, spectra=True), tmp_path / "track.h5"
    save_track(found, path)
    loaded = load_track(path)
    assert np.array_equal(loaded.products, found.products)
    assert loaded.as_json() == found.as_json() and loaded.figures == found.figures
    with h5py.File(path, "r+") as file:  # as the docs say it, without ckptdiff
        assert file.attrs["format_version"] == 1
        at = [name.decode() for name in file["tensors/name"][()]].index("model.norm.weight")
        triangle = file["tensors/products"][at]
        gram = np.zeros((4, 4))
        gram[np.tril_indices(4)] = triangle
        deltas = updates(trajectory, ["model.norm.weight"])
        assert gram == pytest.approx(np.tril(deltas @ deltas.T), rel=1e-12)
        for key in ("products", "left_overlap", "left_overlap_null", "right_overlap", "right_overlap_null"):
            del file[f"tensors/{key}"]
    bare = load_track(path)
    assert bare.products is None and bare.locking is None and "step_cosine" not in bare.overall()[0]


@pytest.mark.parametrize("damage", ["shape", "text", "half"])
def test_damaged_products(damage: str, trajectory: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "track.h5"
    save_track(track(trajectory.paths[0], trajectory.paths[1:3], gram=True, spectra=True), path)
    with h5py.File(path, "r+") as file:
        if damage == "half":
            del file["tensors/right_overlap"]
        else:
            del file["tensors/products"]
            file["tensors/products"] = np.zeros((2, 2)) if damage == "shape" else ["a", "b"]
    with pytest.raises(RunFileError, match="damaged"):
        load_track(path)


def test_the_command_and_its_page(trajectory: Trajectory, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths, out = [str(path) for path in trajectory.paths], tmp_path / "track.h5"
    assert main(["track", *paths, "--gram", "--spectra", "-o", str(out), "--no-progress"]) == 0
    table = capsys.readouterr().out
    for title in ("length", "turn", "rank 1", "walk", "line", "left", "right", "chance"):
        assert title in table
    rows = load_track(out).overall()
    assert f"{rows[-1]['step_cosine']:.3g}" in table
    assert main(["track", str(out)]) == 0
    assert capsys.readouterr().out == table
    assert main(["track", str(out), "--format", "csv"]) == 0
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(read[-1]["line_r2"]) == rows[-1]["line_r2"] and read[0]["line_r2"] == ""
    assert float(read[-1]["right_overlap"]) == rows[-1]["right_overlap"]
    assert main(["track", str(out), "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gram"] == load_track(out).gram().tolist()
    assert {"gram", "step_cosines", "left_overlaps"} < document["layers"][0].keys()
    assert "gram" not in document["tensors"][0]
    assert main(["track", str(out), "--gram"]) == 2
    assert "--gram means nothing for a track file" in capsys.readouterr().err
    assert main(["track", str(out), "--patch-format", "flat"]) == 2
    assert "--patch-format means nothing for a track file" in capsys.readouterr().err
    assert main(["track", *paths, "-o", str(out) + "2", "--patches", str(out) + "2", "--no-progress"]) == 2
    assert "one name" in capsys.readouterr().err and not Path(str(out) + "2").exists()
    assert main(["track", *paths, "--no-progress"]) == 0
    assert "rank 1" not in capsys.readouterr().out


def test_spectra_without_scipy(trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    with pytest.raises(OptionError, match="need SciPy") as caught:
        track(trajectory.paths[0], trajectory.paths[1:], spectra=True)
    assert "ckptdiff[spectra]" in str(caught.value.hint)
