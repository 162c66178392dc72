"""The whole program on the fixtures: figures, masks, views and failures, from the command line."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from patience import PATIENCE
from safetensors.numpy import load_file, save_file

from ckptdiff.cli import main
from ckptdiff.options import MaskRule, Options
from ckptdiff.run.engine import run
from ckptdiff.run.tasks import Grain

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = ("llama", "wide", "tied", "vlm", "moe", "fp8", "odd")
VIEWS = (
    [],
    ["--by", "tensor", "--sort", "rel_norm", "--top", "4"],
    ["--by", "module"],
    ["--by", "layer"],
    ["--by", "layer,module"],
    ["--by", "block"],
    ["--by", "tower"],
    ["--format", "json"],
    ["--format", "ndjson"],
    ["--format", "csv"],
    ["--format", "csv", "--by", "module"],
)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    sys.path.insert(0, str(FIXTURES))
    try:
        return importlib.import_module("oracle")
    finally:
        sys.path.remove(str(FIXTURES))


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "run.h5"
    assert main(["diff", *sides("llama"), "-o", str(path), "-O", os.devnull]) == 0
    return path


def sides(case: str) -> tuple[str, str]:
    return str(FIXTURES / case / "base"), str(FIXTURES / case / "tuned")


def golden(case: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((FIXTURES / f"golden/{case}.json").read_bytes())
    return result


def tolerance(case: str, key: str) -> float:
    """Relative tolerance of a figure that is no count."""
    if key in ("low_coverage_null", "unchanged_null"):
        return 1e-9
    if case == "fp8" and key in ("tuned_norm", "cosine"):
        # W1 enters these through d, a float32; the codes of F8_E5M2 span 32 powers of two, so that d is rounded
        # (to 2^-24 of itself), and a cosine near zero is what is left of the difference.
        return 1e-6
    return 1e-11


def assert_figures(found: Mapping[str, Any], expected: Mapping[str, Any], case: str, where: str) -> None:
    """Counts and fractions to the last digit, sums to their tolerance."""
    for key, value in expected.items():
        if key not in found:
            continue
        cells = {"": value} if not isinstance(value, dict) else value
        measured = {"": found[key]} if not isinstance(found[key], dict) else found[key]
        assert measured.keys() == cells.keys(), f"{where} {key}"
        for parameter, cell in cells.items():
            got, place = measured[parameter], f"{case} {where} {key} {parameter}"
            exact = key != "unchanged_null" and key.startswith(("unchanged", "nonfinite", "changed", "numel"))
            if exact or cell is None or isinstance(cell, str | list):
                assert got == cell, place
            else:
                assert got == pytest.approx(cell, rel=tolerance(case, key), abs=1e-15), place


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("compare", ["bf16", "stored"])
@pytest.mark.parametrize("case", CASES)
def test_figures_are_golden(cli: Cli, case: str, compare: str, device: str) -> None:
    expected = golden(case)
    code, out, _ = cli(
        "diff", *sides(case), "--compare", compare, "--values", "codes", "--device", device, "--format", "json"
    )
    assert code == 0
    result = json.loads(out)
    assert result["schema"] == "ckptdiff.diff/1" and result["compare"] == compare
    assert_figures(result["global"], expected[compare]["global"], case, "global")
    tensors = {row["name"]: row for row in result["tensors"]}
    assert tensors.keys() == {row["name"] for row in expected[compare]["tensors"]}
    for row in expected[compare]["tensors"]:
        found = {"tuned_name": row["name"], **tensors[row["name"]]}
        assert_figures(found, row, case, row["name"])
    assert result["only_in_base"] == expected["only_in_base"]
    assert result["only_in_tuned"] == expected["only_in_tuned"]
    assert result["aliased"] == expected["aliased"]
    assert [row["name"] for row in result["mismatched"]] == expected["mismatched"]


@pytest.mark.parametrize("view", VIEWS, ids=" ".join)
@pytest.mark.parametrize("case", ["llama", "odd"])
def test_show_prints_what_diff_printed(cli: Cli, tmp_path: Path, case: str, view: list[str]) -> None:
    run = tmp_path / "run.h5"
    code, printed, _ = cli("diff", *sides(case), "-o", run, *view)
    assert code == 0 and len(printed) > 100
    if case == "odd" and view in (["--by", "layer"], ["--by", "layer,module"]):
        assert "no layer to show" in printed or "no layer, module type to show" in printed
        code, shown, complaint = cli("show", run, *view)
        assert (code, shown) == (2, "") and "no tensor has a layer" in complaint
    else:
        assert cli("show", run, *view) == (0, printed, "")


@pytest.mark.parametrize("case", ["wide", "odd", "moe", "fp8", "llama"])
def test_no_digit_depends_on_how_it_ran(cli: Cli, case: str) -> None:
    outputs = set()
    for how in (["--threads", "1"], ["--threads", "7"], ["--io", "pread"], ["--io", "mmap", "--max-memory", "8G"]):
        outputs.add(cli("diff", *sides(case), "--format", "ndjson", *how).out)
    assert len(outputs) == 1


@pytest.mark.parametrize("case", ["wide", "odd", "moe", "fp8", "llama"])
@pytest.mark.parametrize("rule", ["bitwise", "abs:1e-5", "eta:4e-3"])
def test_small_tensors_in_one_call_leave_the_same_run_file(tmp_path: Path, case: str, rule: str) -> None:
    contents = []
    # Of more tasks than may wait, facts are written before the last figures.
    for number, grain in enumerate((Grain(many=1), Grain(many=10**6), Grain(many=1, tensors=1))):
        out, options = tmp_path / f"{number}.h5", Options(mask=MaskRule.parse(rule), threads=1)
        run(*sides(case), out=out, options=options, grain=grain)
        contents.append(_datasets(out))
    assert contents[0] == contents[1] == contents[2] and any(name.startswith("masks/") for name in contents[0])


def _datasets(path: Path) -> dict[str, str | bytes]:
    """Everything in a run file but the provenance, which tells when it ran."""
    found: dict[str, str | bytes] = {}

    def note(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and name != "provenance":
            value = np.asarray(item[()])
            found[name] = repr(value.tolist()) if value.dtype == object else value.tobytes()

    with h5py.File(path) as file:
        file.visititems(note)
    return found


def test_masks_are_the_threshold(cli: Cli, llama_run: Path, oracle: ModuleType) -> None:
    base, tuned = (oracle.read_side(Path(side)) for side in sides("llama"))
    with h5py.File(llama_run) as file:
        assert file.attrs["format"] == "ckptdiff-run" and file.attrs["complete"] == 1
        for name, stored in base.items():
            w0, w1 = oracle.compare_arrays(stored, tuned[name], "bf16")
            expected = ~oracle.within_abs(w0, w1, 1e-5)
            bits = np.unpackbits(file["masks"][name][:], count=w0.size, bitorder="little").astype(bool)
            np.testing.assert_array_equal(bits, expected, err_msg=name)


@pytest.mark.parametrize("layout", ["bool", "packed", "flat"])
def test_exports_hold_the_masks(cli: Cli, llama_run: Path, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "masks.safetensors"
    assert cli("mask", "export", llama_run, "-o", target, "--layout", layout).code == 0
    listed = json.loads(cli("mask", "list", llama_run, "--format", "json").out)["tensors"]
    masks = load_file(target)
    assert masks.keys() == {row["name"] for row in listed}
    for row in listed:
        mask = masks[row["name"]]
        count = {"bool": mask.sum, "packed": lambda m=mask: np.unpackbits(m).sum(), "flat": lambda m=mask: m.size}
        assert count[layout]() == row["changed"], row["name"]


def test_the_mask_rule_changes_the_mask_only(cli: Cli) -> None:
    def result(*rule: str) -> dict[str, Any]:
        code, out, _ = cli("diff", *sides("llama"), "--format", "json", *rule)
        assert code == 0
        whole: dict[str, Any] = json.loads(out)
        return whole

    plain, bitwise, none = result(), result("--mask", "bitwise"), result("--mask", "none")
    numel = sum(row["numel"] for row in plain["tensors"])
    assert bitwise["global"]["changed"] == round((1 - plain["global"]["unchanged_bitwise"]) * numel)
    assert none["global"]["changed"] is None and none["mask_rule"] == "none"
    top = result("--mask", "top:20")["global"]["changed"]
    assert 0 < top <= bitwise["global"]["changed"]
    for other in (bitwise, none):
        assert {**other["global"], "changed": 0} == {**plain["global"], "changed": 0}


def test_csv_agrees_with_json(cli: Cli) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("diff", *sides("moe"), "--format", "csv").out)))
    tensors = json.loads(cli("diff", *sides("moe"), "--format", "json").out)["tensors"]
    assert [row["name"] for row in rows] == [row["name"] for row in tensors]
    for row, tensor in zip(rows, tensors, strict=True):
        assert row["delta_norm"] == ("" if tensor["delta_norm"] is None else repr(tensor["delta_norm"]))


def test_parquet_through_a_pipe(llama_run: Path) -> None:
    import pyarrow.parquet as pq

    command = [sys.executable, "-m", "ckptdiff.cli", "show", str(llama_run), "--format", "parquet"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert pq.read_table(io.BytesIO(done.stdout)).num_rows == len(golden("llama")["bf16"]["tensors"])


def test_equal_checkpoints(cli: Cli) -> None:
    base = sides("llama")[0]
    assert cli("diff", base, base, "-q") == (0, "", "")
    result = json.loads(cli("diff", base, base, "--format", "json", "--exit-code").out)
    assert result["counts"]["same_bytes"] == result["counts"]["matched"] > 0
    assert result["global"]["unchanged_bitwise"] == 1.0 and result["global"]["base_norm"] > 0
    assert cli("diff", *sides("llama"), "-q") == (1, "", "")


def test_checks(cli: Cli) -> None:
    code, _, err = cli("diff", *sides("llama"), "--fail-if", "global.unchanged_bitwise<0.9")
    assert code == 1 and "check failed: global.unchanged_bitwise<0.9" in err
    assert cli("diff", *sides("llama"), "--fail-if", "modules.norm.rel_norm>0.5").code == 0
    assert cli("diff", *sides("llama"), "--fail-if", "modules.nonsense.rel_norm>0.5").code == 2


def test_choosing_tensors(cli: Cli) -> None:
    result = json.loads(
        cli("diff", *sides("llama"), "--include", "*q_proj*", "--group", "first=layers\\.0\\.", "--format", "json").out
    )
    assert {row["module_type"] for row in result["tensors"]} == {"q_proj"}
    assert [row["group"] for row in result["groups"]] == ["first"]


def test_dry_run_reads_nothing(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("diff", *sides("llama"), "--dry-run", "--format", "json", "-o", tmp_path / "run.h5")
    plan = json.loads(out)
    assert code == 0 and plan["tensors"] == len(golden("llama")["bf16"]["tensors"])
    # The default bound gives way to a process as large as that of a test run.
    assert 0 < plan["projected_memory"] <= plan["max_memory"] == max(400 << 20, plan["projected_memory"])
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_before_work(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("diff", *sides("llama"), "--max-memory", "1M", "-o", tmp_path / "run.h5")
    assert (code, out) == (2, "") and err.startswith("ckptdiff: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A pair to break."""
    folder = tmp_path / "pair"
    for side in ("base", "tuned"):
        shutil.copytree(FIXTURES / "llama" / side, folder / side)
    return folder / "base", folder / "tuned"


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def rewrite_header(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = shard.read_bytes()
    stop = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:stop])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[stop:])


def truncated(folder: Path) -> None:
    shard = first_shard(folder)
    os.truncate(shard, shard.stat().st_size - 100)


def empty(folder: Path) -> None:
    first_shard(folder).write_bytes(b"")


def long_header(folder: Path) -> None:
    first_shard(folder).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def not_json(folder: Path) -> None:
    first_shard(folder).write_bytes(struct.pack("<Q", 4) + b"nope")


def change_tensor(folder: Path, **fields: Any) -> None:
    def change(header: dict[str, Any]) -> None:
        next(field for name, field in header.items() if name != "__metadata__").update(fields)

    rewrite_header(first_shard(folder), change)


def unknown_dtype(folder: Path) -> None:
    change_tensor(folder, dtype="BF17")


def wrong_shape(folder: Path) -> None:
    change_tensor(folder, shape=[3, 5])


def missing_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def escaping_index(folder: Path) -> None:
    index = next(folder.glob("*.index.json"))
    weights = json.loads(index.read_text())
    weights["weight_map"][next(iter(weights["weight_map"]))] = "../../etc/passwd.safetensors"
    index.write_text(json.dumps(weights))


def only_pickles(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def fifo(folder: Path) -> None:
    shard = first_shard(folder)
    shard.unlink()
    os.mkfifo(shard)


@pytest.mark.parametrize("damage", [truncated, empty, long_header, not_json, unknown_dtype, wrong_shape, missing_shard,
                                    escaping_index, only_pickles, gone, fifo])  # fmt: skip
@pytest.mark.parametrize("side", [0, 1])
def test_damage_is_found_before_work(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path], None], side: int
) -> None:
    damage(pair[side])
    before = sorted(path for path in tmp_path.rglob("*"))
    for target in ([], ["-o", tmp_path / "run.h5"]):
        code, out, err = cli("diff", *pair, *target)
        assert (code, out) == (2, "")
        assert err.startswith("ckptdiff: error: ") and "unexpected" not in err and str(pair[side]) in err
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["{base}", "{shard}", "nowhere/run.h5", "existing.txt", "-"])
def test_outputs_that_cannot_be(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing.txt").write_text("mine")
    shard = first_shard(pair[0])
    content = shard.read_bytes()
    code, out, err = cli("diff", *pair, "-o", target.format(base=pair[0], shard=shard))
    assert (code, out) == (2, "") and err.startswith("ckptdiff: error: ")
    assert shard.read_bytes() == content and (tmp_path / "existing.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing.txt", "pair"]


@pytest.mark.parametrize("arguments", [["--map", "("], ["--map", "x"], ["--mask", "abs"], ["--include", "none"]])
def test_options_that_cannot_be(cli: Cli, arguments: list[str]) -> None:
    code, out, err = cli("diff", *sides("llama"), *arguments)
    assert (code, out) == (2, "") and err.startswith("ckptdiff: error: ") and "unexpected" not in err


def test_names_of_all_kinds_are_shown_safely(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run.h5"
    for arguments in (["--by", "tensor"], ["--format", "json"], ["--format", "csv"]):
        code, out, err = cli("diff", *sides("odd"), "-o", run, *arguments)
        assert code == 0
        assert out.replace("\n", "").isprintable() and err.replace("\n", "").isprintable()
    exact = {row["name"] for row in json.loads(cli("show", run, "--format", "json").out)["tensors"]}
    assert {"..", "a/b", "", "\x1b[31mred\x1b[0m\x07"} <= exact
    target = tmp_path / "masks.safetensors"
    assert cli("mask", "export", run, "-o", target).code == 0
    assert load_file(target).keys() == exact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks.safetensors", "run.h5"]


def test_the_library_is_light_and_agrees() -> None:
    code = (
        "import sys, ckptdiff\n"
        "assert not {'numpy', 'numba', 'h5py', 'torch', 'rich', 'click'} & set(sys.modules)\n"
        "from ckptdiff.run.engine import run\n"
        "print(repr(run(*sys.argv[1:3]).overall['rel_norm']))\n"
        "assert not {'torch', 'rich', 'click'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *sides("llama")], capture_output=True, text=True, check=True)
    expected = golden("llama")["bf16"]["global"]["rel_norm"]
    assert math.isclose(float(done.stdout), expected, rel_tol=1e-12)


@pytest.fixture(scope="module")
def large_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair whose report and masks are not written at once."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(1)
    weights = {f"layers.{i}.mlp.up_proj.weight": rng.normal(0, 0.02, (1024, 1024)).astype("<f4") for i in range(24)}
    save_file(weights, folder / "base.safetensors")
    save_file({name: values + np.float32(1e-4) for name, values in weights.items()}, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


PAGE = 4096
"""Of a pipe this small a report fills more than one, so that its run cannot end before it is read."""


def start(*arguments: str | Path, pipesize: int = -1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ckptdiff.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pipesize=pipesize)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_interrupted_run_leaves_the_old_file(
    large_pair: tuple[Path, Path], llama_run: Path, tmp_path: Path, signum: int, code: int
) -> None:
    run = tmp_path / "run.h5"
    run.write_bytes(llama_run.read_bytes())
    process = start("diff", *large_pair, "-o", run, "--format", "ndjson", pipesize=PAGE)
    assert process.stdout is not None
    process.stdout.readline()
    assert b'"type": "tensor"' in process.stdout.readline()
    process.send_signal(signum)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert run.read_bytes() == llama_run.read_bytes()
    if signum != signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_report_that_nobody_reads_on(llama_run: Path, signum: int, code: int) -> None:
    show = ["show", llama_run, "--format", "ndjson"]
    whole = subprocess.run([sys.executable, "-m", "ckptdiff.cli", *map(str, show)], capture_output=True, check=True)
    assert len(whole.stdout) > 8 * PAGE
    process = start(*show, pipesize=PAGE)
    assert process.stdout is not None and process.stdout.read(1) == b"{"
    process.send_signal(signum)
    assert process.wait(timeout=PATIENCE) == code


def test_head_ends_a_run_without_a_run_file_quietly(large_pair: tuple[Path, Path]) -> None:
    process = start("diff", *large_pair, "--format", "ndjson", "--no-progress", pipesize=PAGE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=PATIENCE) == 141
    assert process.stderr is not None and process.stderr.read() == b""


def test_head_does_not_keep_a_run_file_from_being_finished(large_pair: tuple[Path, Path], tmp_path: Path) -> None:
    process = start("diff", *large_pair, "-o", tmp_path / "run.h5", "--format", "ndjson")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=PATIENCE) == 0
    with h5py.File(tmp_path / "run.h5") as file:
        assert file.attrs["complete"] == 1 and len(file["masks"]) == 24
