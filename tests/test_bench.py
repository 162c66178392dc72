"""The benchmarks run, at sizes that mean nothing, so that they cannot rot."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors

import ckptdiff

BENCH = Path(__file__).parents[1] / "bench"
BF16 = np.dtype(ml_dtypes.bfloat16)
NUMPY = {"BF16": BF16, "F32": np.dtype(np.float32)}

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


@pytest.fixture(scope="module", autouse=True)
def bench_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def pair(bench_path, tmp_path_factory) -> Path:
    from make_pair import make_pair

    folder = tmp_path_factory.mktemp("bf16")
    make_pair(1 << 20, folder)
    return folder


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, BENCH / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def read(side: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(side.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            found[name] = np.frombuffer(tensor["data"], NUMPY[tensor["dtype"]]).reshape(tensor["shape"])
    # deserialize() gives the tensors of a file in any order.
    return dict(sorted(found.items()))


def test_pair_has_the_asked_size_several_shards_and_a_true_index(pair):
    for side in (pair / "base", pair / "tuned"):
        tensors = read(side)
        assert sum(t.nbytes for t in tensors.values()) == pytest.approx(1 << 20, rel=1e-3)
        index = json.loads((side / "model.safetensors.index.json").read_bytes())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert index["weight_map"].keys() == tensors.keys()
        assert len(set(index["weight_map"].values())) >= 3
        assert {name.split(".")[-2] for name in tensors} >= {"embed_tokens", "q_proj", "down_proj", "norm", "lm_head"}


def test_pair_moves_a_tenth_of_the_coordinates_by_one_to_four_steps(pair):
    base, tuned = read(pair / "base"), read(pair / "tuned")
    moved = total = 0
    for name, w0 in base.items():
        steps = tuned[name].view(np.int16).astype(int) - w0.view(np.int16)
        assert np.abs(steps).max() <= 4
        assert np.isfinite(tuned[name].astype(float)).all()
        if "norm" in name:
            assert not steps.any()
        moved += np.count_nonzero(steps)
        total += steps.size
    assert 0.09 < moved / total < 0.11


def test_pair_is_the_same_for_the_same_seed_alone(tmp_path):
    from make_pair import make_pair

    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        make_pair(200_000, tmp_path / name, seed=seed)
    first, again, other = (
        b"".join(path.read_bytes() for path in sorted((tmp_path / name).rglob("*.safetensors")))
        for name in ("first", "again", "other")
    )
    assert first == again != other


def test_pair_is_the_same_by_any_number_of_processes(tmp_path):
    from make_pair import make_pair

    for processes in (1, 2, 3):
        make_pair(200_000, tmp_path / str(processes), processes=processes)
    names = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.*"))
    assert len(names) == 2 * (3 + 1)
    for name in names:
        assert len({(tmp_path / str(processes) / name).read_bytes() for processes in (1, 2, 3)}) == 1
    shards = [read(tmp_path / "1" / side) for side in ("base", "tuned")]
    whole = np.concatenate([tensor.ravel() for tensor in shards[0].values() if tensor.ndim == 2])
    # No shard is a copy of another: hardly a value comes again at the same distance.
    assert max((whole[:1000] == whole[at : at + 1000]).mean() for at in range(1000, whole.size - 1000, 97)) < 0.1


@pytest.mark.parametrize(("dtype", "tuned_dtype"), [("fp32", np.dtype(np.float32)), ("mixed", BF16)])
def test_wide_pairs_leave_the_bf16_grid_and_change_a_tenth_after_the_cast(tmp_path, dtype, tuned_dtype):
    from make_pair import make_pair

    make_pair(1 << 20, tmp_path, dtype=dtype)
    base, tuned = read(tmp_path / "base"), read(tmp_path / "tuned")
    name = "model.embed_tokens.weight"
    assert (base[name].dtype, tuned[name].dtype) == (np.dtype(np.float32), tuned_dtype)
    assert (base[name] != base[name].astype(BF16).astype(np.float32)).mean() > 0.9
    assert 0.08 < (base[name].astype(BF16) != tuned[name].astype(BF16)).mean() < 0.14


def test_tiny_tensors_have_64_kib_each(tmp_path):
    from make_pair import make_pair

    make_pair(20 << 16, tmp_path, tensors="tiny")
    sizes = [tensor.nbytes for tensor in read(tmp_path / "base").values()]
    assert sizes == [65536] * 20
    make_pair(1200 << 9, tmp_path / "tinier", tensors="tiny", tensor_bytes=512)
    assert [tensor.nbytes for tensor in read(tmp_path / "tinier" / "base").values()] == [512] * 1200


def test_pair_does_not_overwrite(pair):
    from make_pair import make_pair

    with pytest.raises(SystemExit, match="not empty"):
        make_pair(1 << 20, pair)


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 64 << 20), ("2GiB", 2 << 30), ("1.5 gb", 1_500_000_000), ("9", 9)]
)
def test_sizes(text, size):
    from make_pair import parse_size

    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 TiBs"])
def test_what_is_no_size_is_refused(text):
    from make_pair import parse_size

    with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
        parse_size(text)


def test_read_limit_reads_every_word(pair):
    from read_limit import shards, xor_reduce

    found = json.loads(script("read_limit.py", pair / "base", pair / "tuned", "--rounds", 1, "--threads", 2))
    assert found["bytes"] == sum(path.stat().st_size for path in shards(pair / "base", pair / "tuned")) > 2 << 20
    words = np.frombuffer(np.random.default_rng(0).bytes(8 * 1001), np.uint64)
    assert xor_reduce(words) == np.bitwise_xor.reduce(words)


@needs_torch
def test_torch_peer_counts_what_numpy_counts(pair):
    found = json.loads(script("peers.py", "torch-float64", pair / "base", pair / "tuned"))
    base, tuned = (
        np.concatenate([t.ravel() for t in read(pair / side).values()]).astype(np.float32) for side in ("base", "tuned")
    )
    delta = tuned - base
    assert found["numel"] == delta.size
    assert found["equal"] == np.count_nonzero(delta == 0)
    assert found["within"]["1e-05"] == np.count_nonzero(np.abs(delta) <= 1e-5)
    assert found["delta_norm"] == pytest.approx(np.linalg.norm(delta.astype(float)), rel=1e-12)


def test_cmp_peer_counts_differing_bytes(pair):
    found = json.loads(script("peers.py", "cmp", pair / "base", pair / "tuned"))
    expected = 0
    for path in (pair / "base").glob("*.safetensors"):
        first, second = (np.frombuffer(p.read_bytes(), np.uint8) for p in (path, pair / "tuned" / path.name))
        expected += np.count_nonzero(first != second)
    assert found["differing_bytes"] == expected


def test_peak_memory_is_the_command_s_own():
    from measure import run

    ballast = bytearray(b"x" * (200 << 20))
    small = run([sys.executable, "-S", "-c", "pass"])
    large = run([sys.executable, "-S", "-c", "x = bytearray(b'x' * (50 << 20)); print(len(x))"])
    assert len(ballast) > 4 * small.peak_rss
    assert large.peak_rss > small.peak_rss + (49 << 20)
    assert large.output == f"{50 << 20}\n"


def test_a_failing_command_ends_the_benchmark_with_its_words():
    from measure import run

    with pytest.raises(SystemExit, match=r"(?s)ended with 3.*because"):
        run([sys.executable, "-S", "-c", "import sys; print('because', file=sys.stderr); sys.exit(3)"])


def test_two_versions_are_measured_in_turns(tmp_path):
    options = ("--sections", "ending,whole", "--size", "1MiB", "--rounds", 1, "--json", tmp_path / "found.json")
    script("between_versions.py", sys.executable, sys.executable, *options)
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found["versions"] == [ckptdiff.__version__] * 2
    assert [row["what"][:11] for row in found["rows"]] == ["end after a", "end after 0", "diff, 0.000"]
    assert all(row["newer / older"] > 0 for row in found["rows"])


def test_versions_that_disagree_are_refused():
    from between_versions import check_alike

    older = {"global": {"changed": 3, "unchanged_abs": {"0": 0.5}, "spectral": {"rank": 1}, "gone": 1}}
    check_alike("a", older, {"global": {"changed": 3, "unchanged_abs": {"0": 0.5 + 1e-12}, "spectral": {"rank": 2}}})
    for key, wrong in (("changed", {"changed": 4}), (r"unchanged_abs\.0", {"unchanged_abs": {"0": 0.5 + 1e-8}})):
        with pytest.raises(SystemExit, match=f"disagree about {key}"):
            check_alike("a", older, {"global": wrong})
    with pytest.raises(SystemExit, match="no figure in common"):
        check_alike("a", older, {"global": {"new": 1}})


def test_results_that_disagree_with_the_torch_diff_are_refused():
    from harness import Target
    from sections import check_equal

    torch = {"numel": 4, "equal": 3, "within": {"1e-05": 4}, "delta_norm": 1.0, "base_norm": 2.0}
    figures = {"unchanged_bitwise": 0.75, "unchanged_abs": {"1e-05": 1.0}, "delta_norm": 1.0, "base_norm": 2.0}
    document = {"global": figures, "tensors": [{"numel": 1}, {"numel": 3}]}
    assert "4 coordinates" in check_equal(document, torch)
    with pytest.raises(SystemExit, match="equal"):
        check_equal(document, torch | {"equal": 2})
    with pytest.raises(SystemExit, match="delta_norm"):
        check_equal(document, torch | {"delta_norm": 1 + 1e-8})
    assert Target("", 2.0, ">=", 2.0).met
    assert not Target("", 2.0, "<=", 1.0).met


def test_known_figures_of_the_real_pair_are_held_to_their_digits():
    from real_pairs import KNOWN, NUMEL, wrong_facts

    tensors = [{"numel": NUMEL - 102}] + [{"numel": 1}] * 102
    figures = {"unchanged_bitwise": 0.67683, "unchanged_abs": {"1e-05": 0.67745}, "unchanged_eta": 0.67683}
    good = {
        "global": figures | {"rel_norm": 0.0032449},
        "tensors": tensors,
        "only_in_base": ["embeddings.position_ids"],
        "only_in_tuned": [],
    }
    assert wrong_facts(good, "bf16") == []
    assert len(wrong_facts(good | {"only_in_base": []}, "bf16")) == 1
    assert len(wrong_facts(good | {"tensors": tensors[1:]}, "bf16")) == 1
    assert len(wrong_facts(good, "stored")) == len(KNOWN["stored"])


@pytest.mark.slow
def test_compare_runs(tmp_path):
    report = tmp_path / "report.json"
    lines = tmp_path / "history.csv"
    options = ("--quick", "--sections", "main", "--scratch", tmp_path, "--json", report, "--history", lines)
    printed = script("compare.py", *options)
    found = json.loads(report.read_bytes())["levels"]
    for level, sections in found.items():
        section = sections["main"]
        assert {row["what"] for row in section["rows"]} >= {"ckptdiff, masks", "engine in process, masks", "read limit"}
        assert all(row["seconds"] > 0 for row in section["rows"])
        assert f"{section['title']}; kernels for {level}" in printed
    with lines.open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert [one["level"] for one in kept] == list(found)
    assert all(float(one["engine, s"]) > 0 and one["fixture, s"] == "" for one in kept)
    assert sorted(tmp_path.iterdir()) == [lines, report]


def test_a_history_grows_and_keeps_its_columns(tmp_path):
    import history

    machine = {"packages": {"ckptdiff": "1.0"}, "processor": "x", "cores": 2}
    rows = {"startup": {"rows": [{"what": "diff of a fixture, warm", "seconds": 0.4321}], "targets": []}}
    rows["main"] = {"rows": [], "targets": [{"name": "peak MB, masks", "value": 150.4}]}
    path = tmp_path / "deep" / "history.csv"
    for level in ("v3", "v4"):
        history.append(path, [history.line(machine, level, rows, 1 << 30)])
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["level"], second["level"]) == ("v3", "v4")
    assert (first["fixture, s"], first["peak MB"], first["diff -o, s"], first["GiB a side"]) == (
        "0.432",
        "150",
        "",
        "1",
    )
    path.write_text("other,columns\n")
    with pytest.raises(SystemExit, match="other columns"):
        history.append(path, [])


def test_levels_are_what_the_processor_says(tmp_path):
    import levels

    cpuinfo = tmp_path / "cpuinfo"
    assert levels.levels_here(cpuinfo) == ["native"]
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx avx2 bmi2 fma\n")
    assert levels.levels_here(cpuinfo) == ["v3"]
    flags = " ".join(set().union(*levels.NEEDED.values()))
    cpuinfo.write_text(f"flags : {flags}\n")
    assert levels.levels_here(cpuinfo) == ["v3", "v4"]
    with pytest.raises(SystemExit, match="no v9"):
        levels.chosen("v9")


@pytest.mark.slow
def test_spectra_are_right_and_small_in_memory():
    output = script("spectra.py", "--quick", "--threads", 1, "--sections", "accuracy,products,memory")
    # At this size nothing is faster than anything.
    assert all("/ ckptdiff" in line for line in output.splitlines() if "MISSED" in line)
    assert "median bound" in output


@pytest.mark.slow
@needs_torch
def test_spectra_beside_torch():
    output = script("spectra.py", "--quick", "--threads", 1, "--sections", "update,principal,exact")
    missed = [line for line in output.splitlines() if "MISSED" in line]
    # At this size nothing is faster than anything.
    assert all("/ ckptdiff" in line for line in missed)
    assert "NSS" in output


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_step_measures_and_checks_every_optimizer(dtype: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # on a busy machine, threads wait longer for each other than they work
    printed = script(
        "masked_step.py", "--numel", 96_000, "--rounds", 1, "--dtype", dtype, "--json", tmp_path / "rows.json"
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["optimizer"].split(",")[0] for row in rows] == ["MaskedAdamW"] + 3 * ["torch AdamW"]
    state = rows[0]["state, bytes per parameter"]
    assert state == pytest.approx(2.0 if dtype == "float32" else 2.8, rel=0.02)
    assert rows[1]["/ fused"] == 1 and "freeze_outside" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overlap_speed.py", "track_speed.py"])
def test_speeds_of_other_commands(name: str, tmp_path: Path):
    pytest.importorskip("torch")
    printed = script(name, "--size", "1MiB", "--rounds", 1, "--folder", tmp_path)
    assert "ratio" in printed or "track / load with safetensors:" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_speed_on_a_cluster(tmp_path: Path):
    """The script ends with an error if figures or masks are others there."""
    pytest.importorskip("ray", reason="Ray is not installed")
    printed = script("ray_speed.py", "--size", "1MiB", "--rounds", 1, "--folder", tmp_path)
    assert "masks are the same" in printed and "driver of Ray" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_torch
def test_weights_in_other_layouts_have_the_same_figures(tmp_path: Path):
    """The script ends with an error if they have not."""
    figures = tmp_path / "figures.json"
    script("weights.py", "--size", "12MiB", "--rounds", "1", "--threads", "2", "--json", figures)
    found = json.loads(figures.read_text())["figures"]
    assert len(found) == 8 and all(one["seconds"] > 0 < one["peak_mib"] for one in found.values())


@pytest.mark.slow
def test_speed_of_remote_checkpoints_is_that_of_equal_digits(tmp_path):
    pytest.importorskip("obstore")
    report = tmp_path / "found.json"
    lines = script(
        "remote_speed.py", "--size", "1MiB", "--rounds", 1, "--server", "http", "--json", report
    ).splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["http", way] for way in ("obstore", "fetching", "diff", "memory")
    ]
    found = json.loads(report.read_text())["http"]
    assert 0 < found["peak"] <= found["allowed"] and found["diff"]["processor seconds a GB"] > 0
