"""What must not happen: whatever is damaged, lies, or ends too early, bases and earlier outputs stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stopped_process import ended, stopped_at
from stored_tensors import Stored, random_tensor, read, write
from test_apply_shipped import KINDS, OWN, make
from test_delta_directory import refused
from test_deltas import resealed, sharded, weights_of

from ckptdiff import patch
from ckptdiff.cli import main
from ckptdiff.errors import CkptdiffError, PatchError


def tiny(folder: Path, kind: str, names: Sequence[str] = ("a", "b")) -> tuple[Path, Path, Path]:
    rng = np.random.default_rng(3)
    codes = np.frombuffer(rng.bytes(80), np.uint16) & np.uint16(0x3FFF)
    held = {"a": Stored("BF16", (20, 2), codes.tobytes()), "b": Stored("F32", (9,), bytes(36))}
    held = {name: held[name] for name in names}
    base = write(folder / "base.safetensors", held)
    for name, one in held.items():
        data = np.frombuffer(one.data, np.uint8).copy()
        data[::8] ^= 1
        held[name] = one._replace(data=data.tobytes())
    if kind == OWN:
        held["new"] = random_tensor(rng, "I64", (1,))
    tuned = write(folder / "tuned.safetensors", held)
    return base, tuned, make(kind, base, tuned, folder / "patch")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, OWN])
def test_each_single_bit(kind: str, tmp_path: Path) -> None:
    base, tuned, link = tiny(tmp_path, kind, "a")
    harmless = total = 0
    for file in sorted(link.iterdir()) if link.is_dir() else [link]:
        whole = file.read_bytes()
        for bit in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            total += 1
            try:
                patch.verify(base, [link], tuned, threads=1)
            except CkptdiffError as error:
                assert "not what the patches make" not in error.problem, f"bit {bit} of {file.name} makes another side"
            else:
                harmless += 1
        file.write_bytes(whole)
    assert total > 2000 and harmless < total / 20


def flat_file(link: Path, tensors: dict[str, Stored], **other: object) -> None:
    """Write a flat patch with other tensors, and the metadata of the one that is there."""
    raw = link.read_bytes()
    facts = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    write(link, tensors, {**facts, **other})  # type: ignore[dict-item]


def _indices(values: list[int], kind: str = "<i4") -> Callable[[dict[str, Stored]], None]:
    def change(held: dict[str, Stored]) -> None:
        data = np.array(values, kind).tobytes()
        held["a.indices"] = Stored("I32" if kind == "<i4" else "I64", (len(values),), data)
        held["a.values"] = Stored("BF16", (len(values),), held["a.values"].data[: 2 * len(values)])

    return change


FLAT_LIES: dict[str, Callable[[dict[str, Stored]], None]] = {
    "outside": _indices([1, 40]),
    "far outside": _indices([1, 1 << 40], "<i8"),
    "negative": _indices([-1, 3]),
    "descending": _indices([4, 3]),
    "twice": _indices([4, 4]),
    "fewer indices than values": lambda held: held.__setitem__(
        "a.indices", Stored("I32", (1,), held["a.indices"].data[:4])
    ),
    "indices of another dtype": lambda held: held.__setitem__("a.indices", held["a.indices"]._replace(dtype="F32")),
    "values of another dtype": lambda held: held.__setitem__("a.values", held["a.values"]._replace(dtype="F16")),
    "a tensor that is not there": lambda held: held.__setitem__("z", held["b.values"]),
    "no values": lambda held: held.__delitem__("a.values"),
}


@pytest.mark.parametrize("lie", FLAT_LIES)
def test_flat_patches_that_lie(lie: str, tmp_path: Path) -> None:
    base, _, link = tiny(tmp_path, "flat")
    held = read(link)
    FLAT_LIES[lie](held)
    flat_file(link, held)
    before = set(tmp_path.iterdir())
    refused(lambda: patch.apply(base, [link], tmp_path / "out.safetensors"))
    if lie != "values of another dtype":  # only the base tells
        with pytest.raises(PatchError):
            list(patch.open(link))
    assert set(tmp_path.iterdir()) == before


def test_formats_that_are_not_known_yet(tmp_path: Path) -> None:
    base, _, link = tiny(tmp_path, "flat")
    flat_file(link, read(link), version="2")
    refused(lambda: patch.apply(base, [link], tmp_path / "out.safetensors"), "version 2")
    (tmp_path / "own").mkdir()
    base, _, link = tiny(tmp_path / "own", OWN)
    raw = link.read_bytes()
    link.write_bytes(raw.replace(b"CKPTDLT1", b"CKPTDLT2"))
    refused(lambda: patch.apply(base, [link], tmp_path / "out.safetensors"), "another version", "upgrade")


def test_no_more_is_made_than_a_patch_can_hold(tmp_path: Path) -> None:
    """An index, a header and a block that inflate to far more than they should."""
    base, _, link = tiny(tmp_path, OWN)
    whole, footer = link.read_bytes(), struct.Struct("<8sQQQ32s")
    signature, offset, *_ = footer.unpack(whole[-footer.size :])
    bomb = zlib.compress(bytes(1 << 28))
    seal = hashlib.sha256(bomb).digest()
    link.write_bytes(whole[:offset] + bomb + footer.pack(signature, offset, len(bomb), 1 << 28, seal))
    refused(lambda: patch.apply(base, [link], tmp_path / "out.safetensors"), "cut short or damaged")
    small = zlib.compress(bytes(1 << 20))
    block = bytes([1, *_leb(len(small))]) + small
    link.write_bytes(whole[:offset] + block + whole[offset:])

    def moved(index: dict[str, Any]) -> None:
        (one,) = (tensor for tensor in index["tensors"] if tensor["name"] == "a")
        one["offset"], one["sizes"] = offset, [len(block)]

    raw = link.read_bytes()
    held = list(footer.unpack(raw[-footer.size :]))
    held[1] += len(block)
    link.write_bytes(raw[: -footer.size] + footer.pack(*held))
    resealed(link, moved)
    refused(lambda: patch.apply(base, [link], tmp_path / "out.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()


def _leb(number: int) -> bytes:
    return bytes([number & 127 | 128]) + _leb(number >> 7) if number > 127 else bytes([number])


@pytest.mark.parametrize("alias", ["itself", "a link", "a hard link", "a link to its folder"])
def test_nothing_is_written_over_a_base(alias: str, tmp_path: Path) -> None:
    base, tuned, link = tiny(tmp_path, OWN)
    folder = sharded(tmp_path / "folder", 0)
    again = sharded(tmp_path / "again", 1)
    patch.make(folder, again, tmp_path / "of-folder")
    target, whole = tmp_path / "alias.safetensors", tmp_path / "alias"
    if alias == "itself":
        target, whole = base, folder
    elif alias == "a link":
        target.symlink_to(base)
        whole.symlink_to(folder)
    elif alias == "a hard link":
        os.link(base, target)
        whole = folder
    else:
        (tmp_path / "way").symlink_to(tmp_path)
        target, whole = tmp_path / "way" / base.name, tmp_path / "way" / "folder"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for call in (
        lambda: patch.apply(base, [link], target),
        lambda: patch.apply(folder, [tmp_path / "of-folder"], whole),
        lambda: patch.make(base, tuned, target),
        lambda: patch.make_flat(base, base, target),
        lambda: patch.make_directory(folder, again, whole),
        lambda: patch.squash([link, link], target),
    ):
        with pytest.raises(CkptdiffError):
            call()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


FULL = """
import resource, sys
from ckptdiff.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["make", "apply", "squash", "in place"])
def test_a_full_disk(command: str, tmp_path: Path) -> None:
    """Of a limit in the middle of what is written, so that some of it is there already."""
    steps = [sharded(tmp_path / f"step-{seed}", seed) for seed in range(3)]
    links = [make(OWN, steps[k], steps[k + 1], tmp_path / f"{k}.d") for k in range(2)]
    words: list[object] = {
        "make": ["make", *steps[:2], "-o", tmp_path / "out"],
        "apply": ["apply", steps[0], *links, "-o", tmp_path / "out"],
        "squash": ["squash", *links, "-o", tmp_path / "out"],
        "in place": ["apply", steps[0], *links, "--in-place"],
    }[command]
    before = sorted(tmp_path.rglob("*"))
    limit = (links[0] if command in ("make", "squash") else steps[0] / "model-0.safetensors").stat().st_size // 2
    whole = [sys.executable, "-c", FULL, str(limit), "patch", *map(str, words), "-q"]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot write the output: File too large" in done.stderr, done.stderr
    assert "make room" in done.stderr
    if command == "in place":
        assert main(["patch", *map(str, words)]) == 0
        assert weights_of(steps[0]) == weights_of(steps[2])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3, 5, 7])
@pytest.mark.parametrize("command", ["make", "apply", "in place"])
def test_a_kill_at_any_write(command: str, call: int, tmp_path: Path) -> None:
    """Nothing has its name, or the journal says how to go on; the next run removes what was left."""
    base, tuned = sharded(tmp_path / "base", 0), sharded(tmp_path / "tuned", 1)
    patch.make(base, tuned, tmp_path / "d")
    words: list[str | Path] = {
        "make": ["make", base, tuned, "-o", tmp_path / "out"],
        "apply": ["apply", base, tmp_path / "d", "-o", tmp_path / "out"],
        "in place": ["apply", base, tmp_path / "d", "--in-place"],
    }[command]
    before = weights_of(base)
    process = stopped_at("os:pwrite", call, "patch", *words)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    if command != "in place":
        assert weights_of(base) == before
    assert main(["patch", *map(str, words)]) == 0
    if command == "make":
        assert (tmp_path / "out").read_bytes() == (tmp_path / "d").read_bytes()
    else:
        assert weights_of(base if command == "in place" else tmp_path / "out") == weights_of(tuned)
    left = [path.name for path in [*tmp_path.iterdir(), *base.iterdir()] if path.name.startswith(".")]
    assert left == []


def test_an_in_place_base_that_someone_else_changed_meanwhile(tmp_path: Path) -> None:
    """A file that is neither old nor new is noticed, and named, before another is touched."""
    base, tuned = sharded(tmp_path / "base", 0), sharded(tmp_path / "tuned", 1)
    patch.make(base, tuned, tmp_path / "d")
    shutil.copy(sharded(tmp_path / "else", 2) / "model-1.safetensors", base / "model-1.safetensors")
    before = weights_of(base)
    refused(lambda: patch.apply_in_place(base, [tmp_path / "d"]), "model-1.safetensors")
    assert weights_of(base) == before
