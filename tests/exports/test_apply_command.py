"""``ckptdiff patch apply``: what it says, and what is left when it is stopped or fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE
from stopped_process import ended, go_on, stopped_at
from stored_tensors import Stored, metadata_of, random_tensor, read, write, write_patch

from ckptdiff.cli import main

MIB = 1 << 20


@pytest.fixture(params=["file", "folder"])
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, patch and where the output is to go, alone in a folder."""
    rng = np.random.default_rng(0)
    tensors = {name: random_tensor(rng, "BF16", (1500, 1000)) for name in "abc"}
    if request.param == "file":
        base, out = write(tmp_path / "base.safetensors", tensors), "out.safetensors"
    else:
        base, out = tmp_path / "base", "out"
        base.mkdir()
        weights = {name: f"{name}.safetensors" for name in tensors}
        for name, tensor in tensors.items():
            write(base / weights[name], {name: tensor})
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    change = np.arange(0, 1_500_000, 3), rng.bytes(1_000_000)
    patch = write_patch(tmp_path / "patch.safetensors", base, {"b": change})
    (tmp_path / "here").mkdir()
    return base, patch, tmp_path / "here" / out


def arguments(inputs: tuple[Path, Path, Path]) -> list[str]:
    base, patch, out = inputs
    return ["patch", "apply", str(base), str(patch), "-o", str(out), "--no-progress"]


def test_it_says_what_it_did(inputs: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, _, out = inputs
    if base.is_dir():
        (base / "config.json").write_text("{}")
    assert main(arguments(inputs)) == 0
    lines = [f"ckptdiff: 500 k values of 1 tensor set (rule bitwise, as stored), written to {out}\n"]
    lines += [f"ckptdiff: not copied from {base}: 1 other file: config.json\n"] if base.is_dir() else []
    assert capsys.readouterr() == ("", "".join(lines))
    assert set(read(out)) == set("abc")
    # A second time there is something in its place.
    assert main(arguments(inputs)) == 2
    assert "the output exists" in capsys.readouterr().err


def test_bad_input_is_told_in_full(
    inputs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _, out = inputs
    entries = {"b.indices": Stored("I32", (2,), struct.pack("<2i", 7, 7)), "b.values": Stored("BF16", (2,), bytes(4))}
    patch = write(tmp_path / "bad.safetensors", entries, metadata_of(base, {"b": (1500, 1000)}))
    assert main(arguments((base, patch, out))) == 2
    facts = (
        "indices do not ascend",
        "file:",
        str(patch),
        "tensor:   b",
        "expected: more than 7",
        "found:    7",
        "try:",
    )
    err = capsys.readouterr().err
    assert all(fact in err for fact in facts), err
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("stop", [1, 2, 5, 9])
def test_an_interrupted_write_leaves_nothing(
    inputs: tuple[Path, Path, Path],
    stop: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = os.pwrite, 0

    def interrupted(*given: object) -> int:
        nonlocal calls
        calls += 1
        if calls == stop:
            signal.raise_signal(signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(os, "pwrite", interrupted)
    before = sorted(inputs[0].parent.rglob("*"))
    code = main(arguments(inputs))
    if calls < stop:  # a single file is written in fewer calls
        assert code == 0
        return
    assert (code, capsys.readouterr()) == (130, ("", "ckptdiff: interrupted\n"))
    assert sorted(inputs[0].parent.rglob("*")) == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_full_disk(inputs: tuple[Path, Path, Path], share: float) -> None:
    base, _, out = inputs
    largest = base.stat().st_size if base.is_file() else (base / "a.safetensors").stat().st_size
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({int(share * largest)}, resource.RLIM_INFINITY))\n"
        "from ckptdiff.cli import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(inputs)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("ckptdiff: error: cannot write the output: File too large\n")
    named = out / "a.safetensors" if base.is_dir() else out
    assert f"file:     {named}\n" in done.stderr and "make room" in done.stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("changed", ["base", "patch"])
def test_an_input_that_changes_meanwhile(
    inputs: tuple[Path, Path, Path], changed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, patch, out = inputs
    file = patch if changed == "patch" else base if base.is_file() else base / "b.safetensors"
    real, calls = os.pwrite, 0

    def touched(*given: object) -> int:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.utime(file, ns=(1, 1))
        return real(*given)

    monkeypatch.setattr(os, "pwrite", touched)
    assert main(arguments(inputs)) == 2
    err = capsys.readouterr().err
    assert "the shard changed while it was read" in err and str(file) in err
    assert list(out.parent.iterdir()) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A tensor of 200 MB, all of it a hole in the file, and a patch of 5 million of its values."""
    folder = tmp_path_factory.mktemp("large")
    base, numel = folder / "base.safetensors", 50_000_000
    text = json.dumps({"w": {"dtype": "F32", "shape": [numel], "data_offsets": [0, 4 * numel]}}).encode()
    base.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(base, 8 + len(text) + 4 * numel)
    indices = np.arange(0, numel, 10, dtype="<i4")
    entries = {
        "w.indices": Stored("I32", indices.shape, indices.tobytes()),
        "w.values": Stored("F32", indices.shape, np.ones(indices.size, "<f4").tobytes()),
    }
    yield base, write(folder / "patch.safetensors", entries, metadata_of(base, {"w": (numel,)}))
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_tensor(large: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from ckptdiff.cli import main\n"
        "def peak(key):\n"
        "    return next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if line.startswith(key))\n"
        "import ckptdiff.exports.apply\n"
        "before = peak('VmRSS')\n"
        "code = main()\n"
        "print('grown', peak('VmHWM') - before)\n"
        "sys.exit(code)"
    )
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", code, *arguments((*large, out))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    grown = re.search(r"grown (\d+)", done.stdout)
    assert grown is not None and int(grown[1]) < 60 * MIB, done.stdout
    values = np.memmap(out, "<f4", "r", offset=out.stat().st_size - 200_000_000)
    assert values.sum(dtype=np.int64) == 5_000_000 and (values[::10] == 1).all()
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_leaves_nothing(large: tuple[Path, Path], tmp_path: Path, signum: int) -> None:
    process = stopped_at("os:pwrite", 30, *arguments((*large, tmp_path / "out.safetensors")))
    (staged,) = tmp_path.iterdir()
    assert staged.stat().st_size > MIB
    process.send_signal(signum)
    go_on(process)
    code, word = (130, "interrupted") if signum == signal.SIGINT else (143, "terminated")
    assert ended(process) == (code, f"ckptdiff: {word}\n")
    assert list(tmp_path.iterdir()) == []
