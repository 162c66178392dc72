"""Directories of deltas, read by a reader written from the convention alone: JSON, safetensors, zstandard, NumPy."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import blake3
import numpy as np
import pytest
import xxhash
import zstandard
from safetensors import safe_open
from stopped_process import ended, go_on, stopped_at
from stored_tensors import Stored, random_tensor, read, write

from ckptdiff import patch
from ckptdiff.cli import main
from ckptdiff.errors import CkptdiffError, OptionError, PatchError, RunFileError

ROOT = Path(__file__).parents[2]
DIGESTS: dict[str, Callable[[bytes], str]] = {
    "xxh3-128": lambda data: xxhash.xxh3_128_hexdigest(data),
    "blake3": lambda data: blake3.blake3(data).hexdigest(),
    "adler32": lambda data: f"{zlib.adler32(data, 1):08x}",
}
BLOCK = 1 << 20


def refused(call: Callable[[], object], *words: str, kind: type[CkptdiffError] = PatchError) -> None:
    with pytest.raises(kind) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def pulled(weights: dict[str, bytes], folder: Path, applied: int) -> int:
    """What a receiver does: bring weights up to the version of a directory, and say which one that is."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    facts, files = index["metadata"], sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    assert int(facts["base_version"]) == applied and facts["compression_format"] == "zstd"
    assert all(facts[key] == f"{int(facts[key]):06d}" for key in ("version", "base_version"))
    assert files == [f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(len(files))]
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        with safe_open(folder / file, framework="np") as held:
            names, digests = set(held.keys()), held.metadata()
            assert names == {name for name, where in index["weight_map"].items() if where == file}
            for name in names:
                frame = held.get_tensor(name)
                assert frame.dtype == np.uint8 and frame.ndim == 1
                facts_of_frame = zstandard.get_frame_parameters(frame.tobytes()[:18])
                delta = zstandard.ZstdDecompressor().decompress(frame.tobytes())
                assert facts_of_frame.content_size == len(delta)
                old = np.frombuffer(weights[name], np.uint8)
                if facts["delta_encoding"] == "xor":
                    new = old ^ np.frombuffer(delta, np.uint8)
                else:
                    count = int.from_bytes(delta[:4], "little")
                    new = old.copy()
                    new[np.frombuffer(delta, "<u4", count, 4)] = np.frombuffer(delta, np.uint8, count, 4 + 4 * count)
                assert digests[name] == DIGESTS[facts["checksum_format"]](new.tobytes())
                assert not np.array_equal(old, new)
                weights[name] = new.tobytes()
    return int(facts["version"])


def bytes_of(checkpoint: Path) -> dict[str, bytes]:
    return {name: tensor.data for name, tensor in read(checkpoint).items()}


def side(folder: Path, values: dict[str, Stored]) -> Path:
    """A checkpoint of two files, with an index."""
    folder.mkdir()
    names = sorted(values)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for place, half in enumerate(halves):
        write(folder / f"model-{place}.safetensors", {name: values[name] for name in half})
        weight_map |= dict.fromkeys(half, f"model-{place}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def run_of(folder: Path, steps: int = 2) -> list[Path]:
    """A checkpoint and those after it: small and empty tensors, one that never changes, and two of several blocks, of
    which some do not change at first."""
    rng = np.random.default_rng(2)
    held = {f"layers.{k}.weight": random_tensor(rng, "BF16", (30, 40)) for k in range(5)}
    held |= {"ids": random_tensor(rng, "I64", (9,)), "none": Stored("F32", (0, 3), b"")}
    held["frozen"] = random_tensor(rng, "F32", (11,))
    held["still"] = random_tensor(rng, "F8_E4M3", (2 * BLOCK + 5,))
    held["wide"] = random_tensor(rng, "BF16", (4 * BLOCK + 77,))
    for name, one in held.items():
        if one.dtype == "BF16":  # no NaN, now and later
            codes = np.frombuffer(one.data, np.uint16) & np.uint16(0x3FFF)
            held[name] = one._replace(data=codes.tobytes())
    made = [side(folder / "step-0", held)]
    for step in range(1, steps + 1):
        for name in held:
            data = np.frombuffer(held[name].data, np.uint8).copy()
            if name in ("frozen", "still"):
                continue
            start = 3 * BLOCK if name == "wide" else 0  # its first block, and others, stay what they are
            moved = np.flatnonzero(rng.random(data.size) < 0.02)
            moved = moved[(moved >= start) & (moved < 5 * BLOCK)]
            data[moved] ^= rng.integers(1, 16, moved.size).astype(np.uint8)
            held[name] = held[name]._replace(data=data.tobytes())
        made.append(side(folder / f"step-{step}", held))
    return made


@pytest.mark.parametrize(("encoding", "checksum"), [("xor", "xxh3-128"), ("overwrite", "blake3"), ("xor", "adler32")])
def test_a_receiver_pulls_two_versions(encoding: str, checksum: str, tmp_path: Path) -> None:
    steps = run_of(tmp_path)
    weights, version = bytes_of(steps[0]), 0
    for k in (1, 2):
        target = tmp_path / f"weight_v{k:06d}"
        made = patch.make_directory(steps[k - 1], steps[k], target, encoding=encoding, checksum=checksum)
        before = dict(weights)
        version = pulled(weights, target, version)
        assert (version, weights) == (k, bytes_of(steps[k]))
        changed = {name for name in weights if weights[name] != before[name]}
        assert made.changed_tensors == len(changed) and not {"frozen", "still", "none"} & changed
        assert made.size == sum(path.stat().st_size for path in target.iterdir())
        apart = [np.frombuffer(a, np.uint8) != np.frombuffer(before[n], np.uint8) for n, a in weights.items()]
        assert made.changed_bytes == sum(map(np.count_nonzero, apart)) and made.files == 2


def test_the_same_with_any_number_of_threads(tmp_path: Path) -> None:
    steps = run_of(tmp_path, 1)
    for encoding in ("xor", "overwrite"):
        targets = [tmp_path / f"{encoding}-{threads}" for threads in (1, 2, 3)]
        for threads, target in zip((1, 2, 3), targets, strict=True):
            patch.make_directory(*steps, target, encoding=encoding, threads=threads, level=3)
        held = [{path.name: path.read_bytes() for path in target.iterdir()} for target in targets]
        assert held[0] == held[1] == held[2]


def test_nothing_changed(tmp_path: Path) -> None:
    base = ROOT / "fixtures" / "tied" / "base"
    made = patch.make_directory(base, base, tmp_path / "d", version=12, base_version=10)
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "d" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {} and made.changed == made.changed_tensors == made.files == 0
    assert (index["metadata"]["version"], index["metadata"]["base_version"]) == ("000012", "000010")


@pytest.mark.parametrize("fate", ["new", "lost", "retyped", "reshaped"])
def test_what_it_cannot_say(fate: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {"a": random_tensor(rng, "BF16", (6, 2)), "b": random_tensor(rng, "BF16", (6, 2))}
    other = dict(tensors)
    if fate in ("new", "lost"):
        del other["b"]
    else:
        other["b"] = (
            Stored("F16", (6, 2), other["b"].data) if fate == "retyped" else Stored("BF16", (12,), tensors["b"].data)
        )
    files = [write(tmp_path / "0.safetensors", tensors), write(tmp_path / "1.safetensors", other)]
    base, tuned = files[::-1] if fate == "new" else files
    before = set(tmp_path.iterdir())
    refused(lambda: patch.make_directory(base, tuned, tmp_path / "d"), "tensor:   b", "only say how values change")
    assert set(tmp_path.iterdir()) == before


def test_overwrite_does_not_reach_beyond_4_gib(tmp_path: Path) -> None:
    for name, size in (("base", 1 << 32), ("tuned", 1 << 32), ("less", (1 << 32) - 1)):
        header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)  # holes take no room
    sides = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")]
    refused(lambda: patch.make_directory(*sides, tmp_path / "d", encoding="overwrite"), "tensor:   w", "--encoding xor")
    assert not (tmp_path / "d").exists()


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    base = ROOT / "fixtures" / "tied" / "base"
    (tmp_path / "there").mkdir()
    for given in ({"version": 0}, {"version": 3, "base_version": 3}, {"level": 0}, {"level": 20}, {"encoding": "sum"}):
        refused(lambda given=given: patch.make_directory(base, base, tmp_path / "d", **given), kind=OptionError)
    refused(lambda: patch.make_directory(base, base, tmp_path / "there"), "exists", kind=RunFileError)
    words = ["patch", "make", str(base), str(base), "-o", str(tmp_path / "d")]
    assert main([*words, "--encoding", "xor"]) == 2
    assert main([*words, "--format", "delta-dir", "--version", "3", "--base-version", "4"]) == 2
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("module", ["zstandard", "blake3"])
def test_without_the_extra(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    base = ROOT / "fixtures" / "tied" / "base"
    make = lambda: patch.make_directory(base, base, tmp_path / "d", checksum="blake3")  # noqa: E731
    refused(make, module, "pip install 'ckptdiff[patch]'", kind=OptionError)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = (ROOT / "fixtures" / "llama" / name for name in ("base", "tuned"))
    words = ["patch", "make", str(base), str(tuned), "-o", str(tmp_path / "weight_v000007"), "--format", "delta-dir"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "values changed (21.8 %; of bytes 11.1 %)" in said and "30 tensors in 3 files" in said
    weights = bytes_of(base)
    assert pulled(weights, tmp_path / "weight_v000007", 6) == 7
    assert weights == bytes_of(tuned)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), [("delta-dir", "out"), ("flat", "out.safetensors")])
def test_a_full_disk_and_a_signal_leave_nothing(kind: str, target: str, tmp_path: Path) -> None:
    steps = run_of(tmp_path, 1)
    before = set(tmp_path.iterdir())
    words = ["patch", "make", str(steps[0]), str(steps[1]), "-o", str(tmp_path / target), "--format", kind]
    words += ["--dense-rest"] if kind == "flat" else []
    for size in (500, 20_000):
        limit = (
            "import resource, signal, sys\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))\n"
            "from ckptdiff.cli import main\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        done = subprocess.run([sys.executable, "-c", limit, *words], capture_output=True, text=True, check=False)
        assert (
            done.returncode == 2 and "cannot write the output" in done.stderr and str(tmp_path / target) in done.stderr
        )
        assert set(tmp_path.iterdir()) == before
    process = stopped_at("ckptdiff.files.hidden:Hidden.take_name", 1, *words)
    process.send_signal(signal.SIGTERM)
    go_on(process)
    assert ended(process)[0] == 143
    assert set(tmp_path.iterdir()) == before
