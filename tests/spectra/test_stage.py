from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.errors import OptionError
from ckptdiff.figures.result import Diff
from ckptdiff.lora.extract import extract_lora
from ckptdiff.options import SpectraOptions
from ckptdiff.spectra.budget import Budget, WorkSpace, cache_bytes
from ckptdiff.spectra.existing import add_spectra
from ckptdiff.spectra.job import Measuring
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.panels import StoredPanels

pytestmark = pytest.mark.usefixtures("each_library")

BF16 = ml_dtypes.bfloat16
Sides = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def sides() -> Sides:
    """Weights of every shape, with a rounded update of low rank and noise."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (96, 96),
        "model.layers.0.mlp.down_proj.weight": (64, 200),
        "model.layers.0.mlp.up_proj.weight": (200, 64),
        "model.layers.0.mlp.experts.gate_up_proj": (3, 48, 80),
        "vision_tower.patch_embed.weight": (40, 3, 5, 5),
        "model.embed_tokens.weight": (300, 16),
        "model.norm.weight": (64,),
        "model.row": (1, 33),
        "model.column": (33, 1),
        "model.none": (0, 8),
    }
    base, tuned = {}, {}
    for name, shape in shapes.items():
        weights = (0.02 * rng.standard_normal(shape)).astype(BF16)
        lead = rng.standard_normal((shape[0], *[1] * (len(shape) - 1))) * rng.standard_normal(shape[1:])
        base[name] = weights
        tuned[name] = (weights.astype(np.float32) + 2e-5 * (lead + rng.standard_normal(shape))).astype(BF16)
    return base, tuned


@pytest.fixture(scope="module")
def pair(sides: Sides, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    for name, tensors in zip(("base", "tuned"), sides, strict=True):
        save_file(tensors, folder / f"{name}.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def spectral(diff: Diff) -> dict[str, Any]:
    return {facts.name: row["spectral"] for facts, row in zip(diff.tensors, diff.per_tensor, strict=True)}


def delta_of(sides: Sides, name: str) -> np.ndarray:
    return sides[1][name].astype(np.float64) - sides[0][name].astype(np.float64)


@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_every_matrix_of_a_checkpoint(pair: tuple[Path, Path], sides: Sides, mode: str) -> None:
    found = spectral(ckptdiff.diff(*pair, spectra=mode))
    assert found["model.norm.weight"] is None
    assert found["model.none"] is None
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.row"):
        values = np.linalg.svd(delta_of(sides, name), compute_uv=False)
        energies = np.cumsum(values**2) / np.sum(values**2)
        assert found[name]["method"] == mode
        assert found[name]["topk_energy"]["16"] == pytest.approx(energies[min(16, values.size) - 1], rel=1e-6)
        assert found[name]["stable_rank"] == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=1e-6)
        assert found[name]["error_bound"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_left_and_right_are_those_of_the_stored_matrix(pair: tuple[Path, Path], sides: Sides, name: str) -> None:
    found = spectral(ckptdiff.diff(*pair, spectra="exact"))[name]
    left, _, right = np.linalg.svd(sides[0][name].astype(np.float64), full_matrices=False)
    delta, k = delta_of(sides, name), 6
    total = np.sum(delta**2)
    assert found["principal_energy_left"]["0.1"] == pytest.approx(np.sum((left[:, :k].T @ delta) ** 2) / total)
    assert found["principal_energy_right"]["0.1"] == pytest.approx(np.sum((delta @ right[:k].T) ** 2) / total)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_what_the_papers_script_prints(pair: tuple[Path, Path], sides: Sides, name: str) -> None:
    """Of a wide matrix and of a tall one, against NumPy's decompositions and sorts."""
    diff = ckptdiff.diff(*pair, spectra="exact")
    found = spectral(diff)[name]
    base, tuned, delta = sides[0][name].astype(np.float64), sides[1][name].astype(np.float64), delta_of(sides, name)
    (left, values, right), (left1, values1, right1) = (
        np.linalg.svd(side, full_matrices=False) for side in (base, tuned)
    )
    short = np.linalg.svd(delta, compute_uv=False)
    energies = np.cumsum(short**2) / np.sum(short**2)
    for p in (1, 5, 10):
        assert found["topp_energy"][str(p)] == pytest.approx(energies[-(-p * 64 // 100) - 1], rel=1e-9)
    drift = np.linalg.norm(values1 - values) / np.linalg.norm(delta)
    assert found["spectral_drift"] == pytest.approx(drift, rel=1e-7)
    b = min(delta.shape) / max(delta.shape)
    above = short > (0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43) * np.median(short)
    assert found["dg_rank"] == above.sum() > 0
    assert found["dg_energy"] == pytest.approx(np.sum(short[above] ** 2) / np.sum(short**2), rel=1e-9)
    low, large = np.sort(np.abs(base), axis=None), np.abs(delta) > 1e-5
    for rho, k in ((0.01, 1), (0.05, 3), (0.1, 6), (0.2, 12)):
        for side, (one, other) in {"left": (left, left1), "right": (right.T, right1.T)}.items():
            cosines = np.linalg.svd(one[:, :k].T @ other[:, :k], compute_uv=False)
            sine = np.sqrt(np.clip(1 - cosines**2, 0, None)).mean()
            assert found[f"top_subspace_rotation_{side}"][f"{rho:g}"] == pytest.approx(sine, rel=1e-5)
        count = -(-round(rho * 100) * base.size // 100)
        below, tied = np.abs(base) < low[count - 1], np.abs(base) == low[count - 1]
        part = (count - below.sum()) / tied.sum()
        expected = ((large & below).sum() + part * (large & tied).sum()) / large.sum()
        assert found["low_coverage_abs"][f"{rho:g}"] == pytest.approx(expected, rel=1e-12)
        assert found["principal_not_low_abs"][f"{rho:g}"] <= found["principal_coverage_abs"][f"{rho:g}"] + 1e-12
    randomized = spectral(ckptdiff.diff(*pair, spectra="randomized"))[name]
    assert randomized["low_coverage_abs"] == found["low_coverage_abs"]
    assert randomized["dg_rank"] is None and randomized["topp_energy"]["5"] is None


def test_no_rotation_without_a_subspace(tmp_path: Path) -> None:
    """Neither of what has equal singular values, nor of what is noise."""
    flat, moved = np.eye(40, 30), np.eye(40, 30) + 0.01 * np.random.default_rng(0).standard_normal((40, 30))
    found = found_between(
        tmp_path, flat.astype(np.float32), moved.astype(np.float32), compare="stored", spectra="exact"
    )
    assert set(found["top_subspace_rotation_left"].values()) == {None}
    assert found["angle_left"] is not None
    thin = np.outer(np.arange(1.0, 41), np.ones(30))
    thick = thin + 0.1 * np.random.default_rng(0).standard_normal((40, 30))
    found = found_between(
        tmp_path, thin.astype(np.float32), thick.astype(np.float32), compare="stored", spectra="exact"
    )
    known = [found["top_subspace_rotation_right"][rho] is not None for rho in ("0.01", "0.05", "0.1", "0.2")]
    assert known == [True, True, False, False]  # of one vector, and of three and more
    assert found["angle_right"] is None and "no principal angles" in found["reason"]
    found = found_between(tmp_path, (thick + moved).astype(np.float32), flat.astype(np.float32), spectra="exact")
    assert set(found["top_subspace_rotation_left"].values()) == {None}
    assert "no rotation at rho 0.2: no gap in the tuned side's spectrum" in found["reason"]


def test_slices_of_experts_and_convolutions(pair: tuple[Path, Path], sides: Sides) -> None:
    diff = ckptdiff.diff(*pair, spectra="exact")
    found = spectral(diff)
    ranks = []
    for part in delta_of(sides, "model.layers.0.mlp.experts.gate_up_proj"):
        values = np.linalg.svd(part, compute_uv=False)
        ranks.append(np.sum(values**2) / values[0] ** 2)
    experts = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts["matrices"] == 3
    assert experts["stable_rank"] == pytest.approx(np.median(ranks))
    values = np.linalg.svd(delta_of(sides, "vision_tower.patch_embed.weight").reshape(40, 75), compute_uv=False)
    patches = found["vision_tower.patch_embed.weight"]
    assert patches["stable_rank"] == pytest.approx(np.sum(values**2) / values[0] ** 2)
    native = [row["stable_rank"] for name, row in found.items() if row and len(sides[0][name].shape) == 2] + ranks
    assert diff.median_2d["spectral"]["matrices"] == len(native)
    assert diff.median_2d["spectral"]["stable_rank"] == pytest.approx(np.median(native))


@pytest.mark.slow
def test_a_matrix_streamed_is_a_matrix_in_memory(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {mode: spectral(ckptdiff.diff(*pair, spectra=mode)) for mode in ("randomized", "exact")}
    monkeypatch.setattr("ckptdiff.spectra.job.cache_bytes", lambda view, itemsize: 1 << 60)
    monkeypatch.setattr("ckptdiff.spectra.job.StoredPanels", partial(StoredPanels, entries=1 << 10))
    for io in ("pread", "mmap"):
        for mode, known in kept.items():
            streamed = spectral(ckptdiff.diff(*pair, spectra=mode, io=io))
            for name, row in known.items():
                assert_close(streamed[name], row, 1e-4 if mode == "randomized" else 1e-7)


@pytest.mark.parametrize("mode", ["randomized", "exact"])
def test_no_digit_depends_on_threads_memory_or_io(pair: tuple[Path, Path], mode: str) -> None:
    expected = json.dumps(spectral(ckptdiff.diff(*pair, spectra=mode, threads=1)))
    for how in ({"threads": 2}, {"threads": 5, "io": "mmap"}, {"threads": 3, "max_memory": "8G"}):
        assert json.dumps(spectral(ckptdiff.diff(*pair, spectra=mode, **how))) == expected


def test_a_large_matrix_takes_the_threads_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    base = {f"w{i}": rng.standard_normal((700, 650)).astype(np.float32) for i in range(3)}
    tuned = {name: side + np.float32(1e-3) * rng.standard_normal(side.shape, np.float32) for name, side in base.items()}
    save_file(base, tmp_path / "a.safetensors")
    save_file(tuned, tmp_path / "b.safetensors")
    sides = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    known = spectral(ckptdiff.diff(*sides, spectra="randomized", threads=4))
    slots: list[int] = []
    measure_all = Measuring.measure_all
    monkeypatch.setattr(
        Measuring,
        "measure_all",
        lambda self, jobs, taken, meter: slots.append(taken) or measure_all(self, jobs, taken, meter),
    )
    free = WorkSpace().randomized(MatrixView(0, 700, 650), 4, 320) + cache_bytes(MatrixView(0, 700, 650), 4)
    monkeypatch.setattr(Budget, "of", lambda options, taken, views: Budget(SpectraOptions(), free, 0, 4))
    assert spectral(ckptdiff.diff(*sides, spectra="randomized", threads=4)) == known
    assert slots == [4, 4]  # two of them in one go
    slots.clear()
    monkeypatch.setattr(Budget, "of", lambda options, taken, views: Budget(SpectraOptions(), 2 * free, 0, 4))
    assert spectral(ckptdiff.diff(*sides, spectra="randomized", threads=4)) == known
    assert slots == [2, 2]


def assert_close(found: Any, known: Any, error: float) -> None:
    if isinstance(known, dict):
        assert found.keys() == known.keys()
        for key in known:
            assert_close(found[key], known[key], error)
    elif isinstance(known, float):
        assert found == pytest.approx(known, rel=error, abs=error)
    else:
        assert found == known


def test_run_file_keeps_spectra(pair: tuple[Path, Path], tmp_path: Path) -> None:
    diff = ckptdiff.diff(*pair, spectra="exact", out=tmp_path / "run.h5")
    with ckptdiff.RunFile(tmp_path / "run.h5") as run:
        loaded = run.load()
        assert loaded.per_tensor == diff.per_tensor
        assert loaded.median_2d == diff.median_2d
        assert loaded.grouped("module") == diff.grouped("module")
        assert len(run.spectra) == 8
        lists = run.spectra["model.layers.0.mlp.experts.gate_up_proj"]
        assert lists["delta"].shape == (3, 48)
        assert run.spectra["model.row"].keys() == {"delta", "base", "tuned"}


def test_a_run_file_of_0_1_0_lacks_some_figures(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path, name = tmp_path / "run.h5", "model.layers.0.mlp.down_proj.weight"
    known = spectral(ckptdiff.diff(*pair, spectra="exact", out=path))[name]
    new = {"dg_rank", "dg_energy", "spectral_drift", "topp_energy", "principal_not_low_abs", "low_coverage_abs"}
    new |= {"top_subspace_rotation_left", "top_subspace_rotation_right"}
    with h5py.File(path, "r+") as file:
        for column in list(file["tensors"]):
            if column.startswith(tuple(f"spectral_{key}" for key in new)):
                del file["tensors"][column]
    with ckptdiff.RunFile(path) as run:
        older = spectral(run.load())[name]
    assert {key for key in known if older[key] != known[key]} == new
    assert older["dg_rank"] is None and set(older["topp_energy"].values()) == {None}
    with h5py.File(path, "r+") as file:
        del file["tensors/spectral_nss"]
    with pytest.raises(ckptdiff.RunFileError, match="spectral_nss"), ckptdiff.RunFile(path) as run:
        run.load()


@pytest.mark.parametrize(
    ("base", "tuned", "compare"), [("f32", "f32", "stored"), ("f32", "bf16", "bf16"), ("f16", "f64", "bf16")]
)
def test_other_dtypes(tmp_path: Path, base: str, tuned: str, compare: str) -> None:
    rng = np.random.default_rng(1)
    dtypes = {"f32": np.float32, "bf16": BF16, "f16": np.float16, "f64": np.float64}
    weights = rng.standard_normal((60, 40)).astype(dtypes[base])
    moved = (weights.astype(np.float64) + 0.05 * rng.standard_normal((60, 40))).astype(dtypes[tuned])
    row = found_between(tmp_path, weights, moved, compare=compare, spectra="exact")
    if compare == "bf16":
        weights, moved = (side.astype(np.float32).astype(BF16) for side in (weights, moved))
    values = np.linalg.svd(moved.astype(np.float64) - weights.astype(np.float64), compute_uv=False)
    assert row["stable_rank"] == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=1e-6)


def found_between(folder: Path, base: np.ndarray, tuned: np.ndarray, **options: Any) -> Any:
    save_file({"w": base}, folder / "a.safetensors")
    save_file({"w": tuned}, folder / "b.safetensors")
    return spectral(ckptdiff.diff(folder / "a.safetensors", folder / "b.safetensors", **options))["w"]


@pytest.mark.parametrize("scale", [1e-22, 1e22])
def test_norms_out_of_float32s_range(tmp_path: Path, scale: float) -> None:
    rng = np.random.default_rng(1)
    weights = (scale * rng.standard_normal((60, 40))).astype(BF16)
    moved = (weights.astype(np.float64) + 0.05 * scale * rng.standard_normal((60, 40))).astype(BF16)
    found = found_between(tmp_path, weights, moved, spectra="randomized")
    left, _, right = np.linalg.svd(weights.astype(np.float64))
    delta = moved.astype(np.float64) - weights.astype(np.float64)
    known = np.sum((left[:, :4].T @ delta @ right[:4].T) ** 2) / np.sum(delta**2)
    assert found["principal_energy"]["0.1"] == pytest.approx(known, rel=1e-5)


@pytest.mark.parametrize(("dtype", "known"), [(ml_dtypes.float8_e4m3fn, False), (BF16, True)], ids=["f8", "bf16"])
def test_the_rounding_null_is_for_the_grid_of_bfloat16(tmp_path: Path, dtype: Any, known: bool) -> None:
    rng = np.random.default_rng(0)
    base = 0.1 * rng.standard_normal((64, 48))
    tuned = base + 0.003 * rng.standard_normal(base.shape)
    for compare in ("bf16", "stored"):
        found = found_between(tmp_path, base.astype(dtype), tuned.astype(dtype), compare=compare, spectra="randomized")
        assert found["principal_coverage"]["0.1"] is not None
        assert (found["principal_coverage_null"]["0.1"] is not None) == known


def diff_of(tmp_path: Path, base: np.ndarray, tuned: np.ndarray, **options: Any) -> dict[str, Any]:
    rest = np.ones((40, 30), BF16)
    rest[:, :7] = 2
    save_file({"w": base, "x": np.eye(40, 30).astype(BF16)}, tmp_path / "a.safetensors")
    save_file({"w": tuned, "x": rest}, tmp_path / "b.safetensors")
    return spectral(ckptdiff.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options))


def poisoned(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def poison(weights: np.ndarray) -> np.ndarray:
        weights = weights.copy()
        weights[3, 4] = value
        return weights

    return poison


@pytest.mark.parametrize("mode", ["randomized", "exact"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights, "the update is zero"),
        (poisoned(np.nan), "NaN, Inf"),
        (poisoned(np.inf), "NaN, Inf"),
    ],
    ids=["zero", "NaN", "Inf"],
)
def test_what_cannot_be_measured_has_a_reason(
    tmp_path: Path, mode: str, change: Callable[[np.ndarray], np.ndarray], reason: str
) -> None:
    weights = np.random.default_rng(0).standard_normal((40, 30)).astype(BF16)
    found = diff_of(tmp_path, weights, change(weights), spectra=mode)
    assert found["w"]["method"] is None
    assert found["w"]["stable_rank"] is None
    assert reason in found["w"]["reason"]
    assert found["x"]["method"] == mode  # the run went on
    assert "no gap" in found["x"]["reason"]


@pytest.mark.parametrize("mode", ["randomized", "exact"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=["tall", "wide"])
def test_values_whose_squares_overflow_are_no_warning(
    tmp_path: Path, mode: str, shape: tuple[int, int], each_library: str
) -> None:
    weights = 1e160 * np.random.default_rng(0).standard_normal(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if each_library == "numpy" else "ignore")  # array-api-strict warns by itself
        found = diff_of(tmp_path, weights, 1.01 * weights, compare="stored", spectra=mode)
    assert found["w"]["method"] is None
    assert "out of range" in found["w"]["reason"]
    assert found["x"]["method"] == mode


def test_too_little_memory_has_a_reason(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((40, 30)).astype(BF16)
    found = diff_of(tmp_path, weights, (2 * weights).astype(BF16), spectra="exact", max_memory="8G")
    assert found["w"]["method"] == "exact"
    found = diff_of(tmp_path, weights, (2 * weights).astype(BF16), spectra=SpectraOptions("exact", limit=20))
    assert found["w"]["method"] == "randomized"
    assert "longer than 20" in found["w"]["reason"]


def test_command_line(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.h5"
    assert main(["diff", *map(str, pair), "--spectra", "randomized", "--format", "json", "-o", str(run)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["median_2d"]["spectral"]["method"] == "randomized"
    assert {row["module_type"]: row["spectral"]["matrices"] for row in document["modules"]}["norm"] == 0
    assert main(["show", str(run), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    by_rank = ["--by", "tensor", "--sort", "spectral.stable_rank"]
    for arguments in (["--format", "csv"], ["--format", "ndjson"], by_rank):
        assert main(["show", str(run), *arguments]) == 0
    assert "top 16" in capsys.readouterr().out
    assert main(["show", str(run), "--fail-if", "median_2d.spectral.topk_energy.16>0.01", "-q"]) == 1
    assert main(["show", str(run), "--fail-if", "median_2d.spectral.nss>0"]) == 2


def test_a_missing_scipy_is_said_before_any_work(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run.h5"
    ckptdiff.diff(*pair, out=run)
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    ckptdiff.diff(*pair)
    for work in (
        lambda: ckptdiff.diff(*pair, out=tmp_path / "other.h5", spectra="randomized"),
        lambda: add_spectra(str(run), SpectraOptions()),
        lambda: extract_lora(str(pair[0]), str(pair[1]), tmp_path / "adapter", rank=4),
    ):
        with pytest.raises(OptionError, match="need SciPy"):
            work()
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


@pytest.mark.parametrize("on_grid", [True, False])
def test_the_rounding_null_is_of_a_base_on_or_off_the_grid(tmp_path: Path, on_grid: bool) -> None:
    """Of drawn noise it is what was found, and the two are far apart."""
    rng = np.random.default_rng(0)
    base = (0.1 * rng.standard_normal((240, 160))).astype(np.float32)
    base = base.astype(BF16).astype(np.float32) if on_grid else base
    tuned = base + np.float32(3e-5) * rng.standard_normal(base.shape).astype(np.float32)
    save_file({"w": base}, tmp_path / "base.safetensors")
    save_file({"w": tuned}, tmp_path / "tuned.safetensors")
    paths = [str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    found = ckptdiff.diff(*paths, spectra="randomized")
    assert (found.columns["off_grid"][0] == 0) == on_grid
    figures = found.per_tensor[0]["spectral"]
    assert figures["principal_coverage"]["0.1"] == pytest.approx(figures["principal_coverage_null"]["0.1"], abs=0.02)
    low = found.per_tensor[0]["low_coverage_null"]["0.1"]
    assert low == pytest.approx(0.77 if on_grid else 0.38, abs=0.15)


def test_runs_that_knew_no_pieces_get_spectra_of_what_they_compared(tmp_path: Path) -> None:
    """As those of 0.1.0: what is put together of pieces today was in one side only."""
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal((24, 16)).astype(np.float32) for _ in range(3)]
    inside = "model.layers.0.mlp."
    split = {f"{inside}gate_proj.weight": drawn[0], f"{inside}up_proj.weight": drawn[1]}
    whole = {f"{inside}down_proj.weight": drawn[2]}
    save_file({**whole, **split}, tmp_path / "base.safetensors")
    fused = np.concatenate([drawn[0], drawn[1]])
    tuned = {f"{inside}down_proj.weight": drawn[2] * 1.5, f"{inside}gate_up_proj.weight": fused}
    save_file(tuned, tmp_path / "tuned.safetensors")
    paths = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    run, old = tmp_path / "run.h5", tmp_path / "old.h5"
    whole_run = ckptdiff.diff(*paths, out=run)
    diff = ckptdiff.diff(*paths, out=old, include=[f"{inside}down_proj.weight"], mask="none")
    assert (len(whole_run.tensors), len(diff.tensors)) == (3, 1)
    with h5py.File(old, "a") as file:
        provenance = json.loads(file["provenance"][()])
        provenance["options"]["include"] = []
        del file["provenance"]
        file["provenance"] = json.dumps(provenance)
    found = add_spectra(str(old), SpectraOptions())
    assert [facts.name for facts in found.tensors] == list(whole)
    added = add_spectra(str(run), SpectraOptions())
    row = [facts.name for facts in added.tensors].index(*whole)
    assert found.per_tensor[0]["spectral"] == added.per_tensor[row]["spectral"]
