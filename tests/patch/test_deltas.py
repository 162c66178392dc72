"""Exact deltas of whole checkpoints: the result is the tuned side, byte for byte, or there is none."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from stopped_process import ended, go_on, stopped_at
from stored_tensors import BITS, Stored, random_tensor, write
from told_stages import told_stages

from ckptdiff import patch
from ckptdiff.cli import main
from ckptdiff.errors import CkptdiffError, OptionError, PatchError, RunFileError
from ckptdiff.events import Event

ROOT = Path(__file__).parents[2]
CASES = ("addition", "fp8", "llama", "moe", "odd", "tied", "vlm", "wide")
SHAPES = st.sampled_from([(), (0,), (1,), (3, 0, 2), (8,), (2, 12), (64,)])


def pair(case: str) -> tuple[Path, Path]:
    return ROOT / "fixtures" / case / "base", ROOT / "fixtures" / case / "tuned"


def weights_of(folder: Path) -> dict[str, bytes]:
    """The files of weights of a folder, and its index."""
    files = [path for path in folder.rglob("*") if ".safetensors" in path.name and path.name[0] != "."]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stepped(rng: np.random.Generator, tensor: Stored) -> Stored:
    """The same tensor with a tenth of its bytes changed."""
    data = np.frombuffer(tensor.data, np.uint8).copy()
    moved = rng.random(data.size) < 0.1
    data[moved] += rng.integers(1, 255, np.count_nonzero(moved)).astype(np.uint8)
    return tensor._replace(data=data.tobytes())


def versions(folder: Path, count: int, seed: int = 0, tensors: int = 4) -> list[Path]:
    """One checkpoint and others, each a step from the one before."""
    rng = np.random.default_rng(seed)
    held = {f"layers.{i}.weight": random_tensor(rng, "BF16", (40, 30)) for i in range(tensors)}
    held["ids"] = random_tensor(rng, "I64", (9,))
    made = []
    for version in range(count):
        target = folder / f"version-{version}.safetensors"
        made.append(write(target, held))
        held = {name: stepped(rng, tensor) for name, tensor in held.items()}
    return made


@pytest.mark.parametrize("case", CASES)
def test_the_fixtures(case: str, tmp_path: Path) -> None:
    base, tuned = pair(case)
    made = patch.make(base, tuned, tmp_path / "d")
    done = patch.apply(base, [tmp_path / "d"], tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tuned)
    assert done.tensors == sum(one.state != "lost" for one in made.delta.tensors.values())
    assert patch.verify(base, [tmp_path / "d"], tuned) == patch.verify(base, [tmp_path / "d"])
    again = patch.make(base, tuned, tmp_path / "again", threads=1)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "d").read_bytes() and again.size == made.size


@given(
    dtypes=st.lists(st.sampled_from(sorted(BITS)), min_size=1, max_size=4),
    shape=SHAPES,
    fate=st.sampled_from(["same", "stepped", "other", "lost", "new", "retyped", "reshaped"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_dtype_and_any_fate(
    dtypes: list[str], shape: tuple[int, ...], fate: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, rng = tmp_path_factory.mktemp("any"), np.random.default_rng(seed)
    shape = (2 * shape[0], *shape[1:]) if shape else (2,)  # whole bytes of 4-bit codes
    base = {f"t{place}": random_tensor(rng, dtype, shape) for place, dtype in enumerate(dtypes)}
    tuned = dict(base)
    first = base["t0"]
    tuned["t0"] = {
        "stepped": stepped(rng, first),
        "other": random_tensor(rng, first.dtype, shape),
        "retyped": random_tensor(rng, "F32" if first.dtype != "F32" else "I32", shape),
        "reshaped": random_tensor(rng, first.dtype, (*shape, 2)),
    }.get(fate, first)
    if fate == "lost":
        tuned = {"other": random_tensor(rng, "U8" if "U8" in BITS else "BOOL", (3,))}
    if fate == "new":
        tuned["new"] = random_tensor(rng, "BF16", (5,))
    sides = write(folder / "base.safetensors", base), write(folder / "tuned.safetensors", tuned)
    patch.make(*sides, folder / "d")
    patch.apply(sides[0], [folder / "d"], folder / "out.safetensors")
    assert (folder / "out.safetensors").read_bytes() == sides[1].read_bytes()


def test_a_tensor_of_several_blocks(tmp_path: Path) -> None:
    """Its blocks are coded, digested and applied by several threads; what the index says is what xxhash says."""
    rng = np.random.default_rng(5)
    base = rng.integers(0, 1 << 16, 5 * (1 << 19) + 7, dtype=np.uint16)
    tuned = np.where(rng.random(base.size) < 0.05, base + np.uint16(1), base)
    for name, values in (("base", base), ("tuned", tuned)):
        write(tmp_path / f"{name}.safetensors", {"w": Stored("BF16", values.shape, values.tobytes())})
    made = patch.make(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", threads=3)
    tensor = made.delta.tensors["w"]
    assert (tensor.before, tensor.after) == tuple(xxhash.xxh3_128_hexdigest(one.tobytes()) for one in (base, tuned))
    assert tensor.changed == np.count_nonzero(base != tuned) and len(tensor.sizes) == 3
    patch.apply(tmp_path / "base.safetensors", [tmp_path / "d"], tmp_path / "out.safetensors", threads=3)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "tuned.safetensors").read_bytes()


def test_an_independent_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference reader of the examples, which knows only what the documentation says."""
    source = (ROOT / "examples/read_patch.py").read_text()
    assert "ckptdiff" not in [line.split()[1].split(".")[0] for line in source.splitlines() if " import " in line]
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 60, "short enough to be read at a sitting"
    names: dict[str, object] = {}
    exec(compile(source, "read_patch.py", "exec"), names)
    read_patch: Callable[[str, str, str], None] = names["main"]  # type: ignore[assignment]
    rng = np.random.default_rng(6)
    for share, jump in ((0.001, 3), (0.1, 3), (0.1, 1 << 14), (0.5, 300), (1.0, 2)):
        sides: list[dict[str, Stored]] = [{}, {}]
        for dtype, width in (("BF16", 2), ("F32", 4), ("I64", 8), ("F8_E4M3", 1)):
            base = np.frombuffer(rng.bytes(4000 * width), f"<u{width}")
            moved = rng.random(base.size) < share
            tuned = np.where(moved, base + rng.integers(-jump, jump, base.size).astype(base.dtype), base)
            for side, values in zip(sides, (base, tuned), strict=True):
                side[dtype] = Stored(dtype, (4000,), values.tobytes())
        sides[1]["new"] = random_tensor(rng, "F16", (6,))
        files = [write(tmp_path / f"{k}.safetensors", side) for k, side in enumerate(sides)]
        patch.make(*files, tmp_path / "d")
        read_patch(str(files[0]), str(tmp_path / "d"), str(tmp_path / "out.safetensors"))
        assert (tmp_path / "out.safetensors").read_bytes() == files[1].read_bytes()
        (tmp_path / "d").unlink()


def test_a_chain_and_one_patch_of_it(tmp_path: Path) -> None:
    files = versions(tmp_path, 4)
    links = [tmp_path / f"{k}.d" for k in range(3)]
    for before, after, link in zip(files, files[1:], links, strict=False):
        patch.make(before, after, link)
    patch.apply(files[0], links, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == files[3].read_bytes()
    patch.squash(links, tmp_path / "all.d")
    patch.make(files[0], files[3], tmp_path / "direct.d")
    joined, direct = (patch.contents_of(tmp_path / name) for name in ("all.d", "direct.d"))
    assert (joined.size, joined.changed, joined.tensors) == (direct.size, direct.changed, direct.tensors)
    patch.apply(files[0], [tmp_path / "all.d"], tmp_path / "squashed.safetensors")
    assert (tmp_path / "squashed.safetensors").read_bytes() == files[3].read_bytes()


def test_a_chain_with_tensors_that_come_and_go(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    a, b, c, d = (random_tensor(rng, "BF16", (30, 4)) for _ in range(4))
    states = [
        {"a": a, "b": b},
        {"a": stepped(rng, a), "c": c, "b": random_tensor(rng, "F32", (7,))},
        {"a": a, "c": stepped(rng, c), "d": d},
        {"a": random_tensor(rng, "F16", (2,)), "c": c, "b": b, "d": stepped(rng, d)},
    ]
    files = [write(tmp_path / f"{k}.safetensors", tensors) for k, tensors in enumerate(states)]
    links = [tmp_path / f"{k}.d" for k in range(3)]
    for before, after, link in zip(files, files[1:], links, strict=False):
        patch.make(before, after, link)
    for stop in (2, 3):
        patch.apply(files[0], links[:stop], tmp_path / f"out{stop}.safetensors")
        assert (tmp_path / f"out{stop}.safetensors").read_bytes() == files[stop].read_bytes()
        squashed = tmp_path / f"all{stop}.d"
        patch.squash(links[:stop], squashed)
        patch.apply(files[0], [squashed], tmp_path / f"squashed{stop}.safetensors")
        assert (tmp_path / f"squashed{stop}.safetensors").read_bytes() == files[stop].read_bytes()


def test_the_same_bytes_of_another_shape_do_not_follow(tmp_path: Path) -> None:
    """Their blocks are others: steps would be made beside them."""
    rng = np.random.default_rng(2)
    held = [random_tensor(rng, "BF16", (40, 30))]
    held += [stepped(rng, held[0])]
    held += [held[1]._replace(shape=(30, 40)), stepped(rng, held[1])._replace(shape=(30, 40))]
    files = [write(tmp_path / f"{place}.safetensors", {"weight": one}) for place, one in enumerate(held)]
    patch.make(*files[:2], tmp_path / "0.d")
    patch.make(*files[2:], tmp_path / "1.d")
    links = [tmp_path / "0.d", tmp_path / "1.d"]
    refused(lambda: patch.apply(files[0], links, tmp_path / "out.safetensors"), "does not follow", "weight")
    refused(lambda: patch.squash(links, tmp_path / "all.d"), "does not follow", "weight")


def refused(call: Callable[[], object], *words: str, kind: type[CkptdiffError] = PatchError) -> None:
    with pytest.raises(kind) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bases_and_chains_that_do_not_fit(tmp_path: Path) -> None:
    files = versions(tmp_path, 3)
    other = versions(tmp_path / "other" if (tmp_path / "other").mkdir() is None else tmp_path, 1, seed=9)[0]
    links = [tmp_path / "0.d", tmp_path / "1.d"]
    for before, after, link in zip(files, files[1:], links, strict=False):
        patch.make(before, after, link)
    out = tmp_path / "out.safetensors"
    refused(lambda: patch.apply(other, links[:1], out), "not the one that the patch was made for", "layers.0.weight")
    refused(lambda: patch.apply(files[1], links[:1], out), "has been applied already")
    refused(lambda: patch.apply(files[0], links[1:], out), "not the one that the patch was made for")
    refused(lambda: patch.apply(files[0], links[::-1], out), "does not follow", "in the order")
    refused(lambda: patch.apply(files[0], [links[0], links[0]], out), "does not follow")
    refused(lambda: patch.squash(links[::-1], tmp_path / "s.d"), "does not follow")
    refused(lambda: patch.squash(links[:1], tmp_path / "s.d"), "nothing to squash", kind=OptionError)
    refused(lambda: patch.verify(files[0], links, files[1]), "not what the patches make")
    refused(lambda: patch.apply(files[0], [], out), "no patch", kind=OptionError)
    refused(lambda: patch.apply(files[0], [files[1]], out), "not a patch")
    refused(lambda: patch.apply(files[0], links, tmp_path / "folder"), "a single file", kind=OptionError)
    refused(lambda: patch.apply(files[0], links, files[0]), "exists", kind=RunFileError)
    fewer = write(tmp_path / "fewer.safetensors", {"ids": random_tensor(np.random.default_rng(0), "I64", (9,))})
    refused(lambda: patch.apply(fewer, links, out), "no such tensor")
    assert not out.exists() and not (tmp_path / "s.d").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_every_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    base, tuned = versions(tmp_path, 2, tensors=2)
    patch.make(base, tuned, tmp_path / "d")
    whole, rng = (tmp_path / "d").read_bytes(), np.random.default_rng(1)
    refusals = 0
    for bit in rng.permutation(8 * len(whole))[:150].tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped").write_bytes(flipped)
        out = tmp_path / "out.safetensors"
        try:
            patch.apply(base, [tmp_path / "flipped"], out)
        except PatchError as error:
            refusals += 1
            assert error.file == str(tmp_path / "flipped") and not out.exists()
        else:
            assert out.read_bytes() == tuned.read_bytes()
            out.unlink()
    assert refusals > 140
    for stop in (0, 3, 8, 70, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:stop])
        refused(lambda: patch.apply(base, [tmp_path / "cut"], tmp_path / "out.safetensors"))


def resealed(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Write another index into a delta, with a right footer: what only a liar does."""
    import hashlib
    import struct
    import zlib

    footer, raw = struct.Struct("<8sQQQ32s"), path.read_bytes()
    signature, offset, stored, _, _ = footer.unpack(raw[-footer.size :])
    index = json.loads(zlib.decompress(raw[offset : offset + stored]))
    change(index)
    text = json.dumps(index).encode()
    data = zlib.compress(text)
    end = footer.pack(signature, offset, len(data), len(text), hashlib.sha256(data).digest())
    path.write_bytes(raw[:offset] + data + end)


LIES: Mapping[str, Callable[[dict], None]] = {
    "a file outside": lambda index: index["tuned"]["files"][0].__setitem__(0, "../out.safetensors"),
    "an absolute file": lambda index: index["tuned"]["files"][0].__setitem__(0, "/tmp/out.safetensors"),
    "another size": lambda index: index["tuned"]["files"][0].__setitem__(1, 1 << 40),
    "a header of a gigabyte": lambda index: index["tuned"]["files"][0].__setitem__(4, 1 << 30),
    "another shape": lambda index: index["tensors"][0].__setitem__("shape", [1 << 40]),
    "a negative size": lambda index: index["tensors"][0].__setitem__("shape", [-1, -1200]),
    "an unknown dtype": lambda index: index["tensors"][0].__setitem__("dtype", "BF17"),
    "a block beyond": lambda index: index["tensors"][0].__setitem__("offset", 1 << 50),
    "a large block": lambda index: index["tensors"][0].__setitem__("sizes", [1 << 40]),
    "too many blocks": lambda index: index["tensors"][0].__setitem__("sizes", [1, 1, 1]),
    "a tensor twice": lambda index: index["tensors"].append(index["tensors"][0]),
    "no digest": lambda index: index["tensors"][0].__setitem__("after", None),
    "another digest": lambda index: index["tensors"][0].__setitem__("after", 32 * "0"),
    "no tensor": lambda index: index["tensors"].pop(),
    "other blocks": lambda index: index.__setitem__("block", 7),
    "nothing": lambda index: index.clear(),
    "another name": lambda index: index["tensors"][0].__setitem__("name", "ids2"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies(lie: str, tmp_path: Path) -> None:
    base, tuned = versions(tmp_path, 2)
    patch.make(base, tuned, tmp_path / "d")
    resealed(tmp_path / "d", LIES[lie])
    before = set(tmp_path.iterdir())
    refused(lambda: patch.apply(base, [tmp_path / "d"], tmp_path / "new.safetensors"))
    assert set(tmp_path.iterdir()) == before


def sharded(folder: Path, seed: int) -> Path:
    """A checkpoint of three shards, with an index and a configuration beside it."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    weight_map = {}
    for shard in range(3):
        tensors = {}
        for place in range(2):
            name = f"layers.{shard}.{place}.weight"
            tensors[name] = rng.integers(0, 100, (20, 30)).astype(np.float32)
            weight_map[name] = f"model-{shard}.safetensors"
            tensors[name][np.random.default_rng(seed).random((20, 30)) < 0.1] += seed
        save_file(tensors, folder / f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "words").write_text("a b c")
    return folder


def test_other_files_of_the_base(tmp_path: Path) -> None:
    base, tuned = sharded(tmp_path / "base", 0), sharded(tmp_path / "tuned", 1)
    patch.make(base, tuned, tmp_path / "d")
    made = patch.apply(base, [tmp_path / "d"], tmp_path / "out")
    assert made.left_out == ("config.json", "tokenizer") and not (tmp_path / "out/config.json").exists()
    made = patch.apply(base, [tmp_path / "d"], tmp_path / "whole", with_files=True)
    assert made.left_out == () and (tmp_path / "whole/tokenizer/words").read_text() == "a b c"
    assert (tmp_path / "whole/config.json").stat().st_ino == (base / "config.json").stat().st_ino
    assert weights_of(tmp_path / "whole") == weights_of(tuned)


def test_in_place(tmp_path: Path) -> None:
    base, middle, tuned = (sharded(tmp_path / name, seed) for seed, name in enumerate(("base", "middle", "tuned")))
    patch.make(base, middle, tmp_path / "0.d")
    patch.make(middle, tuned, tmp_path / "1.d")
    assert main(["patch", "apply", str(base), str(tmp_path / "0.d"), str(tmp_path / "1.d"), "--in-place"]) == 0
    assert weights_of(base) == weights_of(tuned)
    assert sorted(path.name for path in base.iterdir()) == sorted(path.name for path in tuned.iterdir())
    refused(lambda: patch.apply_in_place(base, [tmp_path / "0.d"]), "not the one")
    refused(lambda: patch.apply_in_place(base, [tmp_path / "1.d"]), "applied already")


def test_in_place_changes_nothing_of_a_base_that_is_wrong_at_its_end(tmp_path: Path) -> None:
    base, tuned = sharded(tmp_path / "base", 0), sharded(tmp_path / "tuned", 1)
    patch.make(base, tuned, tmp_path / "d")
    (base / "model-2.safetensors").write_bytes((tuned / "model-2.safetensors").read_bytes())
    before = weights_of(base)
    refused(lambda: patch.apply_in_place(base, [tmp_path / "d"]), "applied already", "layers.2.0.weight")
    assert weights_of(base) == before and not (base / ".ckptdiff-patch.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("moment", ["ckptdiff.files.hidden:Hidden.take_name", "ckptdiff.files.staged:sync_folder"])
def test_in_place_goes_on_after_a_kill(call: int, moment: str, tmp_path: Path) -> None:
    """Killed before or after any of its files takes its name: the same command makes the rest, and nothing is left."""
    base, tuned = sharded(tmp_path / "base", 0), sharded(tmp_path / "tuned", 1)
    patch.make(base, tuned, tmp_path / "d")
    words, before = ["patch", "apply", str(base), str(tmp_path / "d"), "--in-place"], weights_of(base)
    process = stopped_at(moment, call, *words)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    patch.make(base, base, tmp_path / "other")
    if weights_of(base) not in (weights_of(tuned), before):
        refused(lambda: patch.apply_in_place(base, [tmp_path / "other"]), "other patches")
    assert main(words) == 0
    assert weights_of(base) == weights_of(tuned)
    assert {path.name for path in base.iterdir()} == {path.name for path in tuned.iterdir()}


def test_in_place_takes_no_other_files(tmp_path: Path) -> None:
    base, tuned = pair("llama")  # two shards against three
    patch.make(base, tuned, tmp_path / "d")
    before = weights_of(base)
    refused(lambda: patch.apply_in_place(base, [tmp_path / "d"]), "-o OUT", "other tensors or files")
    assert weights_of(base) == before and not (base / ".ckptdiff-patch.json").exists()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = map(str, pair("addition"))
    made, out = str(tmp_path / "step.ckptdelta"), str(tmp_path / "out")
    assert main(["patch", "make", base, tuned, "-o", made]) == 0
    assert "values changed (73." in capsys.readouterr().err
    assert main(["patch", "info", made, "--format", "json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["tensors"] == {"same": 7, "changed": 24, "whole": 0, "lost": 0}
    assert sum(row["changed"] for row in info["modules"]) == info["changed"] and info["warnings"] == []
    assert main(["patch", "info", made]) == 0
    assert f"identity    {info['identity']}" in capsys.readouterr().out
    assert main(["patch", "verify", base, made, "--tuned", tuned]) == 0
    assert main(["patch", "apply", base, made, "-o", out]) == 0
    assert main(["diff", "-q", out, tuned]) == 0
    capsys.readouterr()
    for words in (["-o", out], ["-o", out + "2", "--in-place"], [], ["-o", out + "2", "--force"]):
        assert main(["patch", "apply", base, made, *words]) == 2
    assert main(["patch", "verify", tuned, made]) == 2
    assert "applied already" in capsys.readouterr().err
    assert not Path(out + "2").exists()


def test_a_patch_that_does_not_pay_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    for name in ("base", "tuned"):
        write(tmp_path / f"{name}.safetensors", {"w": random_tensor(rng, "F32", (50, 50))})
    words = [str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors"), "-o", str(tmp_path / "d")]
    assert main(["patch", "make", *words]) == 0
    assert "not smaller" in capsys.readouterr().err
    assert main(["patch", "info", words[-1]]) == 0
    assert "not smaller" in capsys.readouterr().err
    assert (tmp_path / "d").stat().st_size < 1.2 * (tmp_path / "tuned.safetensors").stat().st_size


def test_stages(tmp_path: Path) -> None:
    base, tuned = pair("llama")
    told: list[Event] = []
    patch.make(base, tuned, tmp_path / "d", listener=told.append)
    assert list(told_stages(told)) == ["making the patch"]
    told.clear()
    patch.apply(base, [tmp_path / "d"], tmp_path / "out", listener=told.append)
    assert list(told_stages(told)) == ["patching"]


def test_without_xxhash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    refused(lambda: patch.make(*pair("tied"), tmp_path / "d"), "pip install 'ckptdiff[patch]'", kind=OptionError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["make", "apply"])
def test_a_signal_leaves_nothing(command: str, tmp_path: Path) -> None:
    base, tuned = map(str, pair("llama"))
    patch.make(base, tuned, tmp_path / "d")
    before = set(tmp_path.iterdir())
    words = [base, tuned] if command == "make" else [base, str(tmp_path / "d")]
    process = stopped_at("ckptdiff.files.hidden:Hidden.take_name", 1, "patch", command, *words, "-o", tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    go_on(process)
    assert ended(process)[0] == 143
    assert set(tmp_path.iterdir()) == before
