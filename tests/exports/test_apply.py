"""Patched checkpoints, byte by byte: against an oracle of NumPy, and against the tuned side of the fixtures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_tensors import BITS, Stored, header_of, patched, random_tensor, read, write, write_patch
from told_stages import told_stages

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.errors import CheckpointError, OptionError, PatchError, RunFileError
from ckptdiff.events import Event, StageBegun
from ckptdiff.exports.apply import apply_patch
from ckptdiff.exports.patch import export_patch, missing_from_patch

FIXTURES = Path(__file__).parents[2] / "fixtures"
SHAPES = st.sampled_from([(), (0,), (1,), (3, 0, 2), (7,), (8,), (2, 12), (5, 13), (64,)])


def make_patch(case: str, folder: Path) -> tuple[Path, set[str]]:
    """The patch of everything in a fixture that a patch can hold, and which tensors that is."""
    base, tuned = FIXTURES / case / "base", FIXTURES / case / "tuned"
    diff = ckptdiff.diff(base, tuned, out=folder / "run.h5", compare="stored", values="codes", mask="bitwise")
    same = {facts.name for facts in diff.tensors if facts.dtype_base == facts.dtype_tuned}
    with ckptdiff.RunFile(folder / "run.h5") as run:
        retyped = sum(run.masks[name].count > 0 for name in set(run.masks) - same)
        assert missing_from_patch(run)[2] == retyped
        export_patch(run, folder / "patch.safetensors", names=sorted(same))
    return folder / "patch.safetensors", same


def without_negative_zeros(tensor: Stored) -> Stored:
    """Zeros of either sign are equal to a comparison."""
    if tensor.dtype not in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"):
        return tensor
    codes = np.frombuffer(tensor.data, f"<u{BITS[tensor.dtype] // 8}")
    sign = np.array(1 << (BITS[tensor.dtype] - 1), codes.dtype)
    return tensor._replace(data=np.where(codes == sign, 0, codes).astype(codes.dtype).tobytes())


@pytest.mark.parametrize("case", ["addition", "llama", "moe", "vlm", "tied", "odd", "fp8", "wide"])
def test_a_patch_of_all_changes_makes_the_tuned_checkpoint(case: str, tmp_path: Path) -> None:
    base, tuned = FIXTURES / case / "base", FIXTURES / case / "tuned"
    patch, same = make_patch(case, tmp_path)
    out = tmp_path / "out"
    made = apply_patch(base, patch, out)
    diff = ckptdiff.diff(out, tuned, compare="stored", values="codes", mask="none")
    rows = [row for row, facts in enumerate(diff.tensors) if facts.name in same]
    assert len(rows) == len(same)
    assert (diff.columns["unchanged_bitwise"][rows] == diff.columns["numel"][rows]).all()
    found, before, after = read(out), read(base), read(tuned)
    tuned_names = {facts.name: facts.tuned_name or facts.name for facts in diff.tensors}
    for name, tensor in found.items():
        if name in same:
            assert without_negative_zeros(tensor) == without_negative_zeros(after[tuned_names[name]]), name
        else:
            assert tensor == before[name], name
    assert made.tensors == sum(found[name] != before[name] for name in before)
    copied = {path.name for path in base.iterdir()} - set(made.left_out)
    assert {path.name for path in out.iterdir()} == copied
    for name in copied:
        if name.endswith(".safetensors"):
            assert header_of(out / name) == header_of(base / name)
        else:
            assert (out / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(("case", "name"), [("wide", "q_proj"), ("fp8", "f8_e4m3_to_f8_e5m2"), ("odd", "f16_to_bf16")])
def test_a_tensor_of_another_dtype_is_refused(
    case: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = FIXTURES / case / "base", FIXTURES / case / "tuned"
    ckptdiff.diff(*sides, out=tmp_path / "run.h5", compare="stored", values="codes")
    export = ["mask", "export", str(tmp_path / "run.h5"), f"*{name}*", "--layout", "patch", "-o"]
    assert main([*export, str(tmp_path / "patch.safetensors")]) == 0
    assert "1 tensor in another dtype than the base's: ckptdiff patch apply refuses" in capsys.readouterr().err
    with pytest.raises(PatchError, match="another dtype in the base") as caught:
        apply_patch(FIXTURES / case / "base", tmp_path / "patch.safetensors", tmp_path / "out")
    assert name in caught.value.tensor and caught.value.hint
    assert not (tmp_path / "out").exists()


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, Stored], dict[str, tuple[np.ndarray, bytes]]]:
    """Tensors, and changes of some of them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensors, changes = {}, {}
    names = st.sampled_from(["", "w", "w.indices", "w.values", "a/b", "ünï\n.weight", "norm"])
    for name in draw(st.lists(names, unique=True, max_size=6)):
        dtype, shape = draw(st.sampled_from(sorted(BITS))), draw(SHAPES)
        numel = math.prod(shape)
        if BITS[dtype] * numel % 8:
            shape, numel = (64,), 64
        tensors[name] = random_tensor(rng, dtype, shape)
        if BITS[dtype] >= 8 and draw(st.booleans()):
            moved = np.flatnonzero(rng.random(numel) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
            indices = moved.astype(draw(st.sampled_from([np.int32, np.int64])))
            changes[name] = indices, rng.bytes(len(indices) * BITS[dtype] // 8)
    return tensors, changes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(given=checkpoints(), shards=st.integers(0, 3), block=st.sampled_from([8, 16, 1 << 20]))
def test_every_byte_is_that_of_the_base_or_of_the_patch(
    given: tuple[dict, dict], shards: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors, changes = given
    folder = tmp_path_factory.mktemp("apply")
    if shards:
        base, out = folder / "base", folder / "out"
        base.mkdir()
        files = [base / f"model-{i}.safetensors" for i in range(shards)]
        for i, file in enumerate(files):
            write(file, dict(list(tensors.items())[i::shards]), {"format": "pt", "shard": str(i)})
    else:
        base, out = folder / "base.safetensors", folder / "out.safetensors"
        files = [write(base, tensors)]
    patch = write_patch(folder / "patch.safetensors", base, changes)
    made = apply_patch(base, patch, out, block=block)
    expected = {name: patched(t, *changes[name]) if name in changes else t for name, t in tensors.items()}
    assert read(out) == expected
    for file in files:
        assert header_of(out / file.name if shards else out) == header_of(file)
    assert made.coordinates == sum(len(indices) for indices, _ in changes.values())
    assert sorted(path.name for path in folder.iterdir()) == sorted([base.name, out.name, patch.name])


def test_tensors_of_several_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numel, block = (3 << 20) + 5, 1 << 20
    base = write(tmp_path / "base.safetensors", {"w": random_tensor(rng, "BF16", (numel,))})
    # None in the second block, more than a block of them in all.
    chosen = rng.random(numel) < 0.6
    chosen[[0, block - 1, 2 * block, numel - 1]] = True
    chosen[block : 2 * block] = False
    indices = np.flatnonzero(chosen).astype(np.int32)
    assert indices.size > block
    change = indices, rng.bytes(2 * indices.size)
    apply_patch(base, write_patch(tmp_path / "p.safetensors", base, {"w": change}), tmp_path / "out.safetensors")
    assert read(tmp_path / "out.safetensors")["w"] == patched(read(base)["w"], *change)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    return write(tmp_path / "base.safetensors", {n: random_tensor(rng, "F32", (4, 3)) for n in "ab"}, {"format": "pt"})


@pytest.fixture
def patch(base: Path, tmp_path: Path) -> Path:
    change = np.array([1, 5], np.int32), bytes(8)
    return write_patch(tmp_path / "patch.safetensors", base, {"a": change})


def sharded(folder: Path, weights: dict[str, str], index: str = "model.safetensors.index.json") -> Path:
    """A base of two shards with an index and what else lies in such a folder."""
    rng = np.random.default_rng(2)
    folder.mkdir()
    for shard in set(weights.values()):
        (folder / shard).parent.mkdir(exist_ok=True)
        write(folder / shard, {n: random_tensor(rng, "F32", (4, 3)) for n, s in weights.items() if s == shard})
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weights}, indent=7))
    for other in ("config.json", "tokenizer.json", "unlisted.safetensors", ".hidden"):
        (folder / other).write_text("other")
    return folder


def test_shards_in_folders_and_an_index_of_any_name(tmp_path: Path) -> None:
    weights = {"a": "one/x.safetensors", "b": "two.safetensors"}
    folder = sharded(tmp_path / "base", weights, "diffusion.safetensors.index.json")
    out, entry = tmp_path / "out", {"a": random_tensor(np.random.default_rng(3), "F32", (4, 3))}
    change = np.array([0, 11]), bytes(8)
    flat = tmp_path / "flat.safetensors"
    write(flat, entry)
    patch = write_patch(tmp_path / "patch.safetensors", flat, {"a": change})
    for named in (folder, folder / "diffusion.safetensors.index.json"):
        made = apply_patch(named, patch, out, force=True)
        found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert set(found) == {*weights.values(), "diffusion.safetensors.index.json"}
        index = "diffusion.safetensors.index.json"
        assert found[index] == (folder / index).read_bytes()
        assert found["two.safetensors"] == (folder / "two.safetensors").read_bytes()
        assert read(out / "one/x.safetensors")["a"] == patched(read(folder / "one/x.safetensors")["a"], *change)
        assert made.left_out == ("config.json", "tokenizer.json", "unlisted.safetensors")
        assert list(ckptdiff.open_checkpoint(out).tensors) == ["a", "b"]
        out = tmp_path / "again"


def test_every_byte_is_told(base: Path, patch: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    apply_patch(base, patch, tmp_path / "out.safetensors", listener=events.append)
    assert events[0] == StageBegun("patching", base.stat().st_size, "bytes")
    assert told_stages(events)["patching"][-1].what == "b"


def test_another_base_is_refused_unless_forced(base: Path, patch: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", read(base), {"format": "other"})
    out = tmp_path / "out.safetensors"
    with pytest.raises(PatchError, match="not the base that the patch was made for") as caught:
        apply_patch(other, patch, out)
    assert caught.value.file == str(other) and "--force" in caught.value.hint
    assert not out.exists()
    made = apply_patch(other, patch, out, force=True)
    assert "not the one" in made.warnings[0]
    assert read(out)["a"] == patched(read(base)["a"], np.array([1, 5]), bytes(8))
    # Moved and renamed it is the same base.
    moved = base.rename(tmp_path / "moved.safetensors")
    assert apply_patch(moved, patch, tmp_path / "third.safetensors").warnings == ()


@pytest.mark.parametrize(
    ("other", "message", "expected", "found"),
    [
        ({"b": Stored("F32", (4, 3), bytes(48))}, "lacks a tensor", "the tensor in", "it is in no shard"),
        ({"a": Stored("F32", (3, 4), bytes(48))}, "another shape", "[4, 3]", "[3, 4]"),
        ({"a": Stored("I32", (4, 3), bytes(48))}, "another dtype", "I32", "F32"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_even_if_forced(
    other: dict[str, Stored], message: str, expected: str, found: str, patch: Path, tmp_path: Path
) -> None:
    with pytest.raises(PatchError, match=message) as caught:
        apply_patch(write(tmp_path / "o.safetensors", other), patch, tmp_path / "out.safetensors", force=True)
    error = caught.value
    assert (error.file, error.tensor) == (str(patch), "a")
    assert expected in error.expected and found in error.found
    assert not (tmp_path / "out.safetensors").exists()


def test_an_output_that_exists_is_refused(base: Path, patch: Path, tmp_path: Path) -> None:
    older = tmp_path / "older.safetensors"
    older.write_text("precious")
    link = tmp_path / "link.safetensors"
    link.symlink_to("nowhere")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    before = {path: path.read_bytes() for path in (base, patch, older)}
    for target in (base, patch, older, link, folder):
        with pytest.raises(RunFileError, match="the output exists"):
            apply_patch(base, patch, target)
    assert {path: path.read_bytes() for path in before} == before
    weights = {"a": "x.safetensors", "b": "y.safetensors"}
    shards = sharded(tmp_path / "shards", weights)
    with pytest.raises(RunFileError, match="the output exists"):
        apply_patch(shards, patch, shards)
    with pytest.raises(RunFileError, match="folder does not exist"):
        apply_patch(base, patch, tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(RunFileError, match="cannot look at the output: File name too long"):
        apply_patch(base, patch, tmp_path / ("n" * 250 + ".safetensors"))
    with pytest.raises(OptionError, match="a single file"):
        apply_patch(base, patch, tmp_path / "out")
    with pytest.raises(OptionError, match="a folder of shards"):
        apply_patch(shards, patch, tmp_path / "out.safetensors")


def test_a_patch_beside_shards_without_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    base = write(folder / "model.safetensors", {"a": Stored("F32", (3,), bytes(12))})
    patch = write_patch(folder / "patch.safetensors", base, {"a": (np.array([1]), bytes(4))})
    with pytest.raises(PatchError, match="lies among the shards"):
        apply_patch(folder, patch, tmp_path / "out")
    assert apply_patch(base, patch, tmp_path / "out.safetensors").coordinates == 1


def test_an_index_that_names_a_file_twice(patch: Path, tmp_path: Path) -> None:
    weights = {"a": "x.safetensors", "b": "y.safetensors"}
    folder = sharded(tmp_path / "base", weights)
    write(folder / "x.safetensors", {n: Stored("F32", (3,), bytes(12)) for n in "ab"})
    (folder / "y.safetensors").unlink()
    (folder / "y.safetensors").symlink_to("x.safetensors")
    assert len(ckptdiff.open_checkpoint(folder).shards) == 1
    with pytest.raises(CheckpointError, match="two names"):
        apply_patch(folder, patch, tmp_path / "out", force=True)
