from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.claims import judge_claims
from ckptdiff.claims.judge import noise_energy
from ckptdiff.claims.published import COLUMNS, PUBLISHED, figures_of
from ckptdiff.cli import claims, main
from ckptdiff.report.text import percent

BF16 = ml_dtypes.bfloat16
SHAPE = (240, 160)
CLAIMS = (
    "do not change",
    "is small",
    "across layers",
    "feed-forward",
    "full-rank",
    "concentrated",
    "principal subspaces",
    "principal weights",
    "near zero",
)


def weights_of(rng: np.random.Generator) -> np.ndarray:
    """Weights with a spectrum that falls, so that principal weights are not just the large ones."""
    return (0.02 * rng.standard_normal(SHAPE) * np.exp(-np.arange(SHAPE[1]) / 80)).astype(BF16)


def diff_of(folder: Path, step: Any, seed: int = 0) -> ckptdiff.Diff:
    rng = np.random.default_rng(seed)
    base = {f"model.layers.{i}.mlp.up_proj.weight": weights_of(rng) for i in range(3)}
    tuned = {name: (w.astype(np.float64) + step(rng, w.astype(np.float64))).astype(BF16) for name, w in base.items()}
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return ckptdiff.diff(folder / "base.safetensors", folder / "tuned.safetensors", mask="none", spectra="exact")


def outcomes(diff: ckptdiff.Diff) -> dict[str, str]:
    found = {}
    for verdict in judge_claims(diff):
        (short,) = (short for short in CLAIMS if short in verdict.claim)
        found[short] = verdict.outcome
        assert verdict.claim in verdict.sentence
        assert verdict.outcome in verdict.sentence
    assert tuple(found) == CLAIMS
    return found


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        (lambda rng, w: 1e-5 * rng.standard_normal(w.shape), "no more than chance"),
        (lambda rng, w: np.where(rng.random(w.shape) < 0.02, w, 0), "shown"),
    ],
    ids=["noise", "few weights"],
)
def test_sparsity_is_held_against_rounding_too(tmp_path: Path, step: Any, outcome: str) -> None:
    """Both keep most of their bits; of the first that is all that rounding does."""
    diff = diff_of(tmp_path, step)
    sparse = judge_claims(diff)[0]
    assert (sparse.outcome, sparse.null, sparse.beyond) == ("shown", 0.5, outcome)
    assert sparse.rounding == diff.overall["unchanged_null"]
    assert f"noise of this size, rounded, would leave {percent(sparse.rounding)}" in sparse.sentence


def test_where_it_moves_is_held_against_noise(tmp_path: Path) -> None:
    """In float32, so that noise of one size has the norm that it is said to have."""
    rng = np.random.default_rng(0)
    shape, scales = (200, 150), {"self_attn.q_proj": 0.02, "mlp.up_proj": 0.01}
    base = {
        f"model.layers.{i}.{name}.weight": scale * (1 + i) * rng.standard_normal(shape)
        for i in range(4)
        for name, scale in scales.items()
    }

    def spread_and_block(factor: Callable[[str], float]) -> list[Any]:
        tuned = {name: side + factor(name) * 1e-4 * rng.standard_normal(shape) for name, side in base.items()}
        for path, side in (("base", base), ("tuned", tuned)):
            save_file({name: w.astype(np.float32) for name, w in side.items()}, tmp_path / f"{path}.safetensors")
        paths = (tmp_path / f"{path}.safetensors" for path in ("base", "tuned"))
        return judge_claims(ckptdiff.diff(*paths, compare="stored", mask="none", spectra="randomized"))[2:4]

    layers, block = spread_and_block(lambda name: 1.0)
    known = 1 / np.arange(1, 5)
    assert (
        layers.value == pytest.approx(layers.rounding, rel=0.02) == pytest.approx(known.std() / known.mean(), rel=0.02)
    )
    assert (layers.outcome, layers.beyond) == ("shown", "no more than chance")
    assert block.value == pytest.approx(block.rounding, rel=0.02) == pytest.approx(2 * block.null, rel=0.02)
    assert (block.outcome, block.beyond) == ("shown", "no more than chance")
    layers, block = spread_and_block(lambda name: 0.1 if "mlp" in name else 1.0 + float(name.split(".")[2]))
    assert (layers.outcome, layers.beyond) == ("shown", "shown")
    assert (block.outcome, block.beyond) == ("not shown", "not shown")
    layers, block = spread_and_block(lambda name: float("layers.2.mlp" in name))
    assert layers.value == pytest.approx(3**0.5)  # one of four has it all
    assert (layers.outcome, layers.beyond) == ("not shown", "not shown")
    assert (block.outcome, block.beyond, block.null) == ("shown", "shown", 0.0)
    assert "relative norms of the 4 layers" in layers.sentence and "attention by 0 %" in block.sentence


def test_rounded_noise_shows_nothing_but_sparsity(tmp_path: Path) -> None:
    found = outcomes(diff_of(tmp_path, lambda rng, w: 1e-5 * rng.standard_normal(w.shape)))
    assert found["do not change"] == found["is small"] == found["full-rank"] == "shown"
    assert found["near zero"] == found["principal weights"] == "no more than chance"


def test_dense_training_is_not_sparse(tmp_path: Path) -> None:
    found = outcomes(diff_of(tmp_path, lambda rng, w: 0.02 * rng.standard_normal(w.shape)))
    assert found["do not change"] == found["is small"] == "not shown"
    assert found["concentrated"] == "no more than chance"


def test_an_update_of_low_rank_in_the_principal_subspaces(tmp_path: Path) -> None:
    def step(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
        left, values, right = np.linalg.svd(weights, full_matrices=False)
        return (left[:, :4] * values[:4] * 0.3) @ right[:4]

    found = outcomes(diff_of(tmp_path, step))
    assert found["concentrated"] == "shown"
    assert found["principal subspaces"] == "not shown"


def test_an_update_of_small_weights_alone_is_seen_against_rounding(tmp_path: Path) -> None:
    def step(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
        return np.where(
            np.abs(weights) < np.quantile(np.abs(weights), 0.05), 1e-4 * rng.standard_normal(weights.shape), 0
        )

    assert outcomes(diff_of(tmp_path, step))["near zero"] == "shown"


@pytest.mark.parametrize("shape", [(400, 300), (1000, 200), (60, 60)], ids=str)
def test_energy_of_noise(shape: tuple[int, int]) -> None:
    values = np.linalg.svd(np.random.default_rng(0).standard_normal(shape), compute_uv=False)
    assert noise_energy(*shape) == pytest.approx(np.sum(values[:16] ** 2) / np.sum(values**2), rel=0.03)
    assert noise_energy(12, 500) == 1.0


def test_published_rows_are_shares() -> None:
    row = PUBLISHED["DS-Qwen -> OPD"]
    assert row.keys() == COLUMNS.keys()
    assert row["rel_norm"] == pytest.approx(0.00047)
    assert row["stable_rank"] == 9.97
    assert row["numerical_rank_frac"] is None


def test_figures_follow_the_papers_conventions(tmp_path: Path) -> None:
    diff = diff_of(tmp_path, lambda rng, w: 3e-5 * rng.standard_normal(w.shape))
    row = figures_of(diff)
    assert row["unchanged_abs"] == diff.overall["unchanged_abs"]["1e-05"]
    assert row["rel_norm"] == diff.overall["rel_norm"]
    ranks = [tensor["spectral"]["stable_rank"] for tensor in diff.per_tensor]
    assert row["stable_rank"] == np.median(ranks)
    assert row["low_coverage"] == np.median([tensor["low_coverage"]["0.1"] for tensor in diff.per_tensor])


def test_undefined_figures_make_claims_unknown(tmp_path: Path) -> None:
    diff = diff_of(tmp_path, lambda rng, w: 0 * w)
    assert set(list(outcomes(diff).values())[2:]) == {"unknown"}
    assert outcomes(diff)["do not change"] == "shown"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diff = diff_of(tmp_path, lambda rng, w: 3e-5 * rng.standard_normal(w.shape))
    sides = [str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    run = str(tmp_path / "run.h5")
    assert main(["claims", *sides, "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["pair"] == figures_of(diff)
    assert [claim["outcome"] for claim in document["claims"]] == [verdict.outcome for verdict in judge_claims(diff)]
    assert main(["diff", *sides, "-o", run]) == 0
    assert main(["claims", run]) == 2
    assert "spectra add" in capsys.readouterr().err
    assert main(["spectra", "add", run, "--spectra", "exact"]) == 0
    assert main(["claims", run, "-q"]) == 0
    assert main(["claims", *sides, run]) == 2
    capsys.readouterr()
    assert main(["claims", run]) == 0
    assert "DS-Qwen -> OPD" in capsys.readouterr().out


def test_the_pair_of_the_command_line_can_be_narrowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal((40, 30)).astype(np.float32) for name in ("a.w", "b.w")}
    save_file(base, tmp_path / "base.safetensors")
    save_file({f"old_{name}": value * 1.01 for name, value in base.items()}, tmp_path / "tuned.safetensors")
    sides = [str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    narrow = ["--map", "^=old_", "--include", "*a.w", "--threads", "1", "--max-memory", "16G", "--no-progress"]
    assert main(["claims", *sides]) == 2
    assert main(["claims", *sides, *narrow, "--format", "json"]) == 0
    output = capsys.readouterr()
    one = ckptdiff.diff(*sides, renames=["^=old_"], include=["*a.w"], compare="bf16", spectra="exact")
    assert len(one.tensors) == 1
    assert json.loads(output.out)["pair"] == figures_of(one)
    assert main(["diff", *sides, *narrow, "-o", str(tmp_path / "run.h5"), "--spectra", "exact"]) == 0
    assert main(["claims", str(tmp_path / "run.h5"), "--include", "a.w"]) == 2
    assert "leave them out" in capsys.readouterr().err


def test_spectra_added_later_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diff = diff_of(tmp_path, lambda rng, w: 3e-5 * rng.standard_normal(w.shape))
    sides = [str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    run = str(tmp_path / "run.h5")
    assert main(["diff", *sides, "-o", run]) == 0
    assert main(["spectra", "plot", run]) == 2
    moved = tmp_path / "elsewhere.safetensors"
    Path(sides[0]).rename(moved)
    assert main(["spectra", "add", run, "--spectra", "exact"]) == 2
    before = Path(run).read_bytes()
    capsys.readouterr()
    other = tmp_path / "other.safetensors"
    shutil.copy(moved, other)
    other_values(other)
    assert main(["spectra", "add", run, "--spectra", "exact", "--base", str(other)]) == 2
    assert "its headers are the same, but other values" in capsys.readouterr().err
    assert Path(run).read_bytes() == before
    assert main(["spectra", "add", run, "--spectra", "exact", "--base", str(moved)]) == 0
    with ckptdiff.RunFile(run) as file:
        loaded = file.load()
        for tensor, known in zip(loaded.per_tensor, diff.per_tensor, strict=True):
            assert tensor["spectral"] == known["spectral"]
        assert len(file.masks) == 3
    assert main(["spectra", "add", run]) == 2  # it has them
    capsys.readouterr()
    assert main(["spectra", "plot", run, "*layers.1*"]) == 0
    assert "s_i / s_1" in capsys.readouterr().out
    assert main(["spectra", "plot", run, "nothing"]) == 2


def other_tensors(base: Path) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight": np.zeros(SHAPE, BF16)}, base)


def other_values(base: Path) -> None:
    base.write_bytes(base.read_bytes()[:-2] + b"\x00\x40")


@pytest.mark.parametrize("overwrite", [other_tensors, other_values])
def test_another_checkpoint_is_refused(
    overwrite: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diff_of(tmp_path, lambda rng, w: 3e-5 * rng.standard_normal(w.shape))
    run = str(tmp_path / "run.h5")
    assert main(["diff", *(str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")), "-o", run]) == 0
    before = Path(run).read_bytes()
    overwrite(tmp_path / "base.safetensors")
    assert main(["spectra", "add", run]) == 2
    assert "not the base checkpoint that the run compared" in capsys.readouterr().err
    assert Path(run).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "run.h5", "tuned.safetensors"]


def test_randomized_spectra_say_what_numerical_ranks_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diff_of(tmp_path, lambda rng, w: 3e-5 * rng.standard_normal(w.shape))
    sides = [str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    assert main(["claims", *sides, "--spectra", "randomized", "--seed", "1"]) == 0
    assert "full-rank: unknown; only exact spectra have numerical ranks (--spectra exact)." in capsys.readouterr().out


def test_a_checkpoint_alone_is_no_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "base.safetensors"):
        assert main(["claims", str(path)]) == 2
        assert "expected: BASE and TUNED, or a run file" in capsys.readouterr().err


def test_a_narrow_terminal_is_not_overrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    diff = diff_of(tmp_path, lambda rng, w: 3e-5 * rng.standard_normal(w.shape))
    claims._write(stream, diff, "table")
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "No room for: <=1e-5, s. rank, pr. energy" in " ".join(lines)
    assert sum(line.startswith("  ") for line in lines) >= len(CLAIMS)


def test_a_pipe_gets_all_columns_in_120_characters(tmp_path: Path) -> None:
    stream = io.StringIO()
    claims._write(stream, diff_of(tmp_path, lambda rng, w: 3e-5 * rng.standard_normal(w.shape)), "table")
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert all(title in lines[0] for title in COLUMNS.values())
    assert "; chance, 10 %." in " ".join(lines)
