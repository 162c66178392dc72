"""Peak memory of whole runs, each in a process of its own, below the projection and the bound; and what there is."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from patience import PATIENCE

from ckptdiff.memory import machine_memory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]

MIB = 2**20
# The peak is asked of the process itself: what wait4 tells may be that of the process it was forked from.
_RUN = """
import sys
from ckptdiff.cli import main
code = main()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print("peak", peak << 10, file=sys.stderr)
sys.exit(code)
"""


class Ran(NamedTuple):
    code: int
    peak: int
    projected: int
    """In bytes, rounded up to whole MiB."""
    threads: int
    err: str


def diff(*arguments: str | Path) -> Ran:
    command = [sys.executable, "-c", _RUN, "diff", *map(str, arguments), "-v", "--no-progress", "-O", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    def number(pattern: str) -> int:
        match = re.search(pattern, done.stderr)
        return int(match[1]) if match else 0

    projected = (number(r"projected memory (\d+) MiB") + 1) * MIB
    return Ran(done.returncode, number(r"peak (\d+)"), projected, number(r"(\d+) threads"), done.stderr)


def write(path: Path, tensors: dict[str, tuple[str, NDArray[Any], int]]) -> None:
    """A safetensors file of {name: (dtype, some elements, how often they are repeated)}."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, part, times) in tensors.items():
        start, end = end, end + part.nbytes * times
        header[name] = {"dtype": dtype, "shape": [times, part.size], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, part, times in tensors.values():
            for _ in range(times):
                file.write(part.data)


def bf16(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    base = (rng.normal(0, 0.02, size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return base, base + (rng.random(size) < 0.1)


def write_pair(folder: Path, base: dict[str, Any], tuned: dict[str, Any]) -> tuple[Path, Path]:
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        write(path, tensors)
    return paths


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """About 200 MB a side: two bf16 tensors of many blocks."""
    parts = bf16(np.random.default_rng(3), 2_500_000)
    sides = [dict.fromkeys(("up_proj", "down_proj"), ("BF16", part, 20)) for part in parts]
    paths = write_pair(tmp_path_factory.mktemp("large"), sides[0], sides[1])
    yield paths
    for path in paths:
        path.unlink()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Widths that need work space to decode, and cuts that need further passes."""
    rng = np.random.default_rng(4)
    parts = rng.normal(0, 0.02, 1_300_000), rng.normal(0, 0.02, 1_300_000)
    single, double, half = np.dtype(np.float32), np.dtype(np.float64), bf16(rng, 1_300_000)
    base = {"a": ("F32", parts[0].astype(single), 8), "b": ("F64", parts[0].astype(double), 3)}
    tuned = {"a": ("F32", parts[1].astype(single), 8), "b": ("F64", parts[1].astype(double), 3)}
    paths = write_pair(
        tmp_path_factory.mktemp("mixed"),
        {**base, "c": ("F32", parts[0].astype(single), 4)},
        {**tuned, "c": ("BF16", half[1], 4)},
    )
    yield paths
    for path in paths:
        path.unlink()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    parts = bf16(np.random.default_rng(5), 200)
    sides = [{f"model.layers.{i}.mlp.experts.7.up_proj.weight": ("BF16", p, 5) for i in range(3000)} for p in parts]
    return write_pair(tmp_path_factory.mktemp("many"), sides[0], sides[1])


def assert_within(ran: Ran, bound: int) -> None:
    assert ran.code == 0, ran.err
    assert 50 * MIB < ran.peak <= ran.projected <= bound + MIB


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_large_pair(large: tuple[Path, Path], tmp_path: Path, io: str) -> None:
    assert_within(diff(*large, "-o", tmp_path / "run.h5", "--io", io), 400 * MIB)


def test_further_passes_and_work_space(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    how = ("--threads", "4", "--compare", "stored", "--mask", "top:5")
    assert_within(diff(*mixed, "-o", tmp_path / "run.h5", *how), 400 * MIB)


def test_many_tensors(many: tuple[Path, Path], tmp_path: Path) -> None:
    assert_within(diff(*many, "-o", tmp_path / "run.h5"), 400 * MIB)


def test_the_least_memory(large: tuple[Path, Path], tmp_path: Path) -> None:
    """Too little is refused with numbers and before any work; what the message asks for is enough, and is kept to."""
    out = tmp_path / "run.h5"
    refused = diff(*large, "-o", out, "--threads", "5", "--max-memory", "20M")
    assert refused.code == 2 and list(tmp_path.iterdir()) == []
    lines = dict(line.strip().split(": ", 1) for line in refused.err.splitlines()[1:] if ": " in line)
    least = int(re.fullmatch(r" *at least (\d+) MiB", lines["expected"])[1])  # type: ignore[index]
    assert lines["found"].strip() == "20 MiB" and least > 50
    hint = re.fullmatch(r" *--max-memory (\d+)M", lines["try"])
    assert hint is not None and least + 10 <= int(hint[1]) <= least + 20
    assert "device" not in refused.err  # the first line of a run that has begun

    tight = diff(*large, "-o", out, "--threads", "5", "--max-memory", f"{hint[1]}M")
    assert_within(tight, int(hint[1]) * MIB)
    assert 1 <= tight.threads < 5


@pytest.mark.parametrize("mode", ["randomized", "exact"])
@pytest.mark.slow
def test_spectra_are_in_the_projection(tmp_path: Path, mode: str) -> None:
    """Of the plan that is printed before as well as of the run."""
    rng = np.random.default_rng(6)
    parts = [(rng.standard_normal((1200, 900)) * 0.02).astype(np.float32) for _ in range(2)]
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    sides = [dict.fromkeys(names, ("F32", part, 1)) for part in parts]
    paths = write_pair(tmp_path, sides[0], sides[1])
    for path in paths:  # as matrices
        path.write_bytes(path.read_bytes().replace(b"[1, 1080000]", b"[1200, 900] "))
    ran = diff(*paths, "--spectra", mode, "--threads", "3")
    bound = {"randomized": 1_875_000_000, "exact": 6_000_000_000}[mode]
    assert_within(ran, bound)
    command = [sys.executable, "-m", "ckptdiff", "diff", *map(str, paths), "--dry-run", "--format", "json"]
    done = subprocess.run([*command, "--spectra", mode, "--threads", "3"], capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert plan["spectra"]["matrices"] == 3 and plan["spectra"]["mode"] == mode and plan["spectra"]["too_large"] == 0
    assert ran.peak <= plan["projected_memory"] + 16 * MIB and plan["projected_memory"] <= plan["max_memory"] <= bound
    bare = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(bare.stdout)["spectra"] is None
    assert json.loads(bare.stdout)["projected_memory"] < plan["projected_memory"]


def test_the_machine_has_as_much_memory_as_it_says() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < machine_memory() <= int(total.split()[1]) << 10


@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        ("0::/a/b\n", {"a/memory.max": "7000\n", "a/b/memory.max": "max\n"}, 7000),
        ("0::/of/the/host\n", {"memory.max": "5000\n"}, 5000),
        ("4:memory:/a\n3:cpu:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "9000\n"}, 9000),
        ("0::/\n", {}, None),
    ],
)
def test_a_control_group_may_have_less(tmp_path: Path, lines: str, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(lines)
    whole = machine_memory()
    found = machine_memory(tmp_path, tmp_path / "own")
    assert found == limit if limit else found >= whole
