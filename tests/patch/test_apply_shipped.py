"""Directories of deltas and flat patches as input: applied, verified, refused when they do not fit or are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_tensors import BITS, Stored, random_tensor, read, write
from test_delta_directory import ROOT, bytes_of, refused, run_of

from ckptdiff import patch
from ckptdiff.cli import main
from ckptdiff.errors import CkptdiffError, OptionError

KINDS = ("xor", "overwrite", "flat")
OWN = "own"


def make(kind: str, base: Path, tuned: Path, target: Path, version: int = 1) -> Path:
    if kind == "flat":
        target = target.with_suffix(".safetensors")
        patch.make_flat(base, tuned, target, dense_rest=True)
    elif kind == OWN:
        patch.make(base, tuned, target)
    else:
        checksum = {2: "adler32", 3: "blake3"}.get(version, "xxh3-128")
        patch.make_directory(base, tuned, target, encoding=kind, version=version, checksum=checksum)
    return target


def same_files(one: Path, other: Path) -> bool:
    files = [
        {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" in path.name}
        for folder in (one, other)
    ]
    return files[0] == files[1]


@pytest.mark.parametrize("kind", [*KINDS, OWN])
def test_a_chain(kind: str, tmp_path: Path) -> None:
    steps = run_of(tmp_path, 3)
    links = [make(kind, steps[k], steps[k + 1], tmp_path / f"patch-{k}", k + 1) for k in range(3)]
    done = patch.apply(steps[0], links[:1], tmp_path / "one", threads=3)
    assert same_files(tmp_path / "one", steps[1]) and done.left_out == ("config.json",) and done.warnings == ()
    done = patch.apply(steps[0], links, tmp_path / "all", threads=3, with_files=True)
    assert same_files(tmp_path / "all", steps[3]) and (tmp_path / "all" / "config.json").exists()
    assert done.changed == sum(read(steps[0])[name] != one for name, one in read(steps[3]).items())
    assert patch.verify(steps[0], links, steps[3]).changed == done.changed
    refused(lambda: patch.verify(steps[0], links, steps[2]), "not what the patches make")
    refused(lambda: patch.apply(steps[0], links[::-1], tmp_path / "no"), "does not follow")
    refused(lambda: patch.apply(steps[0], [links[0], links[2]], tmp_path / "no"), "does not follow")
    if kind != OWN:
        refused(lambda: patch.squash(links[:2], tmp_path / "no"), "own format", kind=OptionError)
        own = make(OWN, steps[1], steps[2], tmp_path / "own")
        refused(lambda: patch.apply(steps[0], [links[0], own], tmp_path / "no"), "different formats", kind=OptionError)
        refused(lambda: patch.verify(steps[0], [own, steps[2]]), "a folder", "--tuned", kind=OptionError)
    assert not (tmp_path / "no").exists()
    patch.apply_in_place(steps[0], links)
    assert same_files(steps[0], steps[3])


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_and_a_patch_that_was_applied_already(kind: str, tmp_path: Path) -> None:
    steps = run_of(tmp_path, 2)
    link = make(kind, steps[0], steps[1], tmp_path / "patch")
    out = tmp_path / "out"
    refused(lambda: patch.apply(steps[2], [link], out), "for another base" if kind == "xor" else "")
    if kind == "overwrite":
        done = patch.apply(steps[1], [link], out)
        assert same_files(out, steps[1]) and "had been applied already" in done.warnings[0]
        shutil.copy(steps[0] / "model-0.safetensors", steps[1])
        assert "in part" in patch.verify(steps[1], [link]).warnings[0]
    else:
        refused(lambda: patch.apply(steps[1], [link], out), "has been applied already")
        refused(lambda: patch.apply_in_place(steps[1], [link]), "has been applied already")
        assert not out.exists()
    other = write(tmp_path / "other.safetensors", {"a": random_tensor(np.random.default_rng(0), "BF16", (3,))})
    refused(lambda: patch.apply(other, [link], tmp_path / "out.safetensors"), "not the one that the patch was made for")


def test_unnamed_tensors_are_compared_with_the_base(tmp_path: Path) -> None:
    steps = run_of(tmp_path, 1)
    link = make("xor", *steps, tmp_path / "patch")
    held = read(steps[1])
    (tmp_path / "other").mkdir()
    for file in steps[1].glob("*.safetensors"):
        tensors = read(file)
        if "frozen" in tensors:
            tensors["frozen"] = Stored("F32", (11,), bytes(44))
        write(tmp_path / "other" / file.name, tensors)
    shutil.copy(steps[1] / "model.safetensors.index.json", tmp_path / "other")
    assert patch.verify(steps[0], [link], steps[1]).tensors == len(held)
    refused(lambda: patch.verify(steps[0], [link], tmp_path / "other"), "not what the patches make", "frozen")


@given(
    kind=st.sampled_from([*KINDS, OWN]),
    tensors=st.lists(st.tuples(st.sampled_from(sorted(BITS)), st.integers(0, 40)), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_any_dtype(
    kind: str, tensors: list[tuple[str, int]], share: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, rng = tmp_path_factory.mktemp("any"), np.random.default_rng(seed)
    sides: list[dict[str, Stored]] = [{}, {}]
    for place, (dtype, size) in enumerate(tensors):
        one = random_tensor(rng, dtype, (size, 2))
        data = np.frombuffer(one.data, np.uint8).copy()
        data[rng.random(data.size) < share] ^= 0x81
        sides[0][f"t{place}"], sides[1][f"t{place}"] = one, one._replace(data=data.tobytes())
    base, tuned = (write(folder / f"{k}.safetensors", side) for k, side in enumerate(sides))
    link = make(kind, base, tuned, folder / "patch")
    patch.apply(base, [link], folder / "out.safetensors")
    assert (folder / "out.safetensors").read_bytes() == tuned.read_bytes()


def small(folder: Path, kind: str) -> tuple[Path, Path, Path]:
    rng = np.random.default_rng(3)
    held = {"a": random_tensor(rng, "BF16", (30, 4)), "b": Stored("F32", (40,), bytes(160))}
    base = write(folder / "base.safetensors", held)
    for name in held:
        data = np.frombuffer(held[name].data, np.uint8).copy()
        data[::12] ^= 1
        held[name] = held[name]._replace(data=data.tobytes())
    tuned = write(folder / "tuned.safetensors", held)
    return base, tuned, make(kind, base, tuned, folder / "patch")


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_refused_or_harmless(kind: str, tmp_path: Path) -> None:
    base, tuned, link = small(tmp_path, kind)
    files = sorted(link.iterdir()) if link.is_dir() else [link]
    before, rng, refusals = set(tmp_path.iterdir()), np.random.default_rng(1), 0
    out = tmp_path / "out.safetensors"
    for file in files:
        whole = file.read_bytes()
        for bit in rng.permutation(8 * len(whole))[:100].tolist():
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            try:
                patch.apply(base, [link], out)
            except CkptdiffError:
                refusals += 1
                assert set(tmp_path.iterdir()) == before
            else:
                assert out.read_bytes() == tuned.read_bytes()
                out.unlink()
        for stop in (0, 5, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:stop])
            with pytest.raises(CkptdiffError):
                patch.apply(base, [link], out)
        file.write_bytes(whole)
    assert refusals > 60 and set(tmp_path.iterdir()) == before


def frame(data: bytes, size: int | None = None) -> bytes:
    """A zstd frame that says it holds `size` bytes."""
    stream = zstandard.ZstdCompressor().compressobj(size=len(data) if size is None else -1)
    made = stream.compress(data) + stream.flush()
    if size is None:
        return made
    assert made[4] & 0xE0 == 0  # no size, and a byte that says how large the window is
    return made[:4] + bytes([made[4] | 0x80 | 0x40]) + made[5:6] + size.to_bytes(4, "little") + made[6:]


def overwritten(positions: list[int], values: bytes, count: int | None = None) -> bytes:
    count = len(positions) if count is None else count
    return count.to_bytes(4, "little") + np.array(positions, "<u4").tobytes() + values


LIES: dict[str, tuple[str, bytes]] = {
    "a bomb": ("xor", frame(bytes(1 << 24))),
    "a bomb without its size": ("xor", frame(bytes(1 << 24), 240)),
    "less": ("xor", frame(bytes(239))),
    "no frame": ("xor", b"nothing at all"),
    "a bomb of positions": ("overwrite", frame(overwritten([], bytes(1 << 24), 3))),
    "more than there are": ("overwrite", frame(overwritten([*range(240)], bytes(240), 1 << 31))),
    "outside": ("overwrite", frame(overwritten([3, 240], b"ab"))),
    "descending": ("overwrite", frame(overwritten([4, 3], b"ab"))),
    "twice": ("overwrite", frame(overwritten([4, 4], b"ab"))),
    "too few values": ("overwrite", frame(overwritten([4, 5], b"a"))),
    "too many values": ("overwrite", frame(overwritten([4, 5], b"abc"))),
    "nothing": ("overwrite", frame(b"")),
}


@pytest.mark.parametrize("lie", LIES)
def test_frames_that_lie(lie: str, tmp_path: Path) -> None:
    kind, data = LIES[lie]
    base, tuned, link = small(tmp_path, kind)
    file = link / "model-00000-of-00001.safetensors"
    held, digests = read(file), {name: xxhash.xxh3_128_hexdigest(one.data) for name, one in read(tuned).items()}
    held["a"] = Stored("U8", (len(data),), data)
    header = {}
    stop = 0
    for name, one in held.items():
        header[name] = {"dtype": "U8", "shape": list(one.shape), "data_offsets": [stop, stop + len(one.data)]}
        stop += len(one.data)
    text = json.dumps({"__metadata__": digests, **header}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(one.data for one in held.values()))
    before = set(tmp_path.iterdir())
    refused(lambda: patch.apply(base, [link], tmp_path / "out.safetensors"), "tensor:   a")
    assert set(tmp_path.iterdir()) == before


def _set(key: str, value: object) -> Callable[[dict], None]:
    return lambda index: index["metadata"].__setitem__(key, value)


INDEX_LIES: dict[str, Callable[[dict], None]] = {
    "another encoding": _set("delta_encoding", "sum"),
    "another checksum": _set("checksum_format", "md5"),
    "another compression": _set("compression_format", "lz4"),
    "no version": _set("version", "one"),
    "a file outside": lambda index: index["weight_map"].__setitem__("a", "../base.safetensors"),
    "a file that is not there": lambda index: index["weight_map"].__setitem__("a", "other.safetensors"),
    "a name too many": lambda index: index["weight_map"].__setitem__("c", "model-00000-of-00001.safetensors"),
    "a name too few": lambda index: index["weight_map"].pop("a"),
    "no metadata": lambda index: index.pop("metadata"),
    "a map that is none": lambda index: index.__setitem__("weight_map", 3),
}


@pytest.mark.parametrize("lie", INDEX_LIES)
def test_an_index_that_lies(lie: str, tmp_path: Path) -> None:
    base, _, link = small(tmp_path, "xor")
    path = link / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    INDEX_LIES[lie](index)
    path.write_text(json.dumps(index))
    with pytest.raises(CkptdiffError):
        patch.apply(base, [link], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_frame_without_its_size_and_of_another_level(tmp_path: Path) -> None:
    """What other writers may do: a stream's frame does not say how much it holds."""
    base, tuned, link = small(tmp_path, "xor")
    file = link / "model-00000-of-00001.safetensors"
    held, old, new = read(file), read(base), read(tuned)
    for name in held:
        apart = np.frombuffer(old[name].data, np.uint8) ^ np.frombuffer(new[name].data, np.uint8)
        stream = zstandard.ZstdCompressor(level=19).compressobj()
        data = stream.compress(apart.tobytes()) + stream.flush()
        held[name] = Stored("U8", (len(data),), data)
    write(file, held, {name: xxhash.xxh3_128_hexdigest(one.data) for name, one in new.items()})
    patch.apply(base, [link], tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == tuned.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_pay_says_so(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An `overwrite` directory does not say how large its tensors are."""
    rng = np.random.default_rng(3)
    sides = []
    for name in ("base", "tuned"):
        codes = np.frombuffer(rng.bytes(5000), np.uint16) & np.uint16(0x3FFF)
        sides.append(write(tmp_path / f"{name}.safetensors", {"w": Stored("BF16", (2500,), codes.tobytes())}))
    link = make(kind, *sides, tmp_path / "patch")
    assert main(["patch", "info", str(link)]) == 0
    assert ("not smaller" in capsys.readouterr().err) == (kind != "overwrite")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = (str(ROOT / "fixtures" / "llama" / name) for name in ("base", "tuned"))
    for kind in KINDS:
        link = str(make(kind, Path(base), Path(tuned), tmp_path / kind))
        assert main(["patch", "verify", base, link, "--tuned", tuned]) == 0
        assert main(["patch", "apply", base, link, "-o", str(tmp_path / f"{kind}-out")]) == 0
        assert bytes_of(tmp_path / f"{kind}-out") == bytes_of(Path(tuned))
        capsys.readouterr()
        assert main(["patch", "info", link]) == 0
        assert ("39.5 k values of 30" if kind == "flat" else "of 30 tensors") in capsys.readouterr().out
        assert main(["patch", "info", link, "--format", "json"]) == 0
        info = json.loads(capsys.readouterr().out)
        old, new = bytes_of(Path(base)), bytes_of(Path(tuned))
        apart = [np.frombuffer(old[name], np.uint8) != np.frombuffer(new[name], np.uint8) for name in old]
        changed = sum(map(np.count_nonzero, apart))
        assert info["changed"] == changed if kind != "flat" else info["format"] == "flat"
        assert sum(row["changed"] for row in info["modules"]) == info["changed"]
        assert info["digests"]["lm_head.weight"]["after"] == xxhash.xxh3_128_hexdigest(new["lm_head.weight"])
        same = [name for name in old if old[name] == new[name]]
        dense = sum(len(data) for name, data in new.items() if name not in same)
        assert info["dense"] == (None if kind == "overwrite" else dense)
        capsys.readouterr()
        assert main(["patch", "apply", tuned, link, "-o", str(tmp_path / f"{kind}-twice")]) == 2 * (kind != "overwrite")
        assert "applied already" in capsys.readouterr().err
