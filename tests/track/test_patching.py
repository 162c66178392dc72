"""Patches that are made while checkpoints are followed: those of `patch make`, of one read of each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stopped_process import ended, go_on, stopped_at
from stored_tensors import BITS, Stored, random_tensor, read, write
from told_stages import told_stages
from trajectories import Trajectory

from ckptdiff import patch
from ckptdiff.cli import main
from ckptdiff.errors import CkptdiffError, OptionError, PatchError, RunFileError
from ckptdiff.events import Event, StageBegun, ignore
from ckptdiff.patch.delta_file import open_delta
from ckptdiff.patch.make_directory import make_directory
from ckptdiff.track import Track, track
from ckptdiff.track.follow import follow_all
from ckptdiff.track.patching import Patches, follow_and_patch
from ckptdiff.track.plan import plan_track

BLOCK = 1 << 20
FIXTURES = Path(__file__).parents[2] / "fixtures"
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("ckptdelta", {}),
    ("delta-dir", {"encoding": "xor", "checksum": "adler32"}),
    ("delta-dir", {"encoding": "overwrite", "level": 3, "version": 5}),
    ("flat", {"dense_rest": True}),
]


def moved(rng: np.random.Generator, tensor: Stored, share: float = 0.05) -> Stored:
    data = np.frombuffer(tensor.data, np.uint8).copy()
    data[np.flatnonzero(rng.random(data.size) < share)] ^= 0x21
    return tensor._replace(data=data.tobytes())


def checkpoint(folder: Path, held: Mapping[str, Stored], files: int = 2) -> Path:
    """A folder of several files, with an index."""
    folder.mkdir(parents=True)
    weight_map = {}
    for place in range(files):
        names = list(held)[place::files]
        weight_map |= dict.fromkeys(names, f"model-{place}.safetensors")
        write(folder / f"model-{place}.safetensors", {name: held[name] for name in names})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint and four later ones: tensors of several blocks and small ones, whole numbers, packed codes, an empty
    one, and one that does not change."""
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("run")
    held = {f"layers.{k}.weight": random_tensor(rng, "BF16", (30, 20)) for k in range(12)}
    held |= {"ids": random_tensor(rng, "I64", (9,)), "packed": random_tensor(rng, "F4", (6, 4))}
    held |= {"scale": random_tensor(rng, "F32", (40,)), "half": random_tensor(rng, "F16", (BLOCK + 3,))}
    held |= {"none": Stored("F32", (0, 3), b""), "wide": random_tensor(rng, "BF16", (2 * BLOCK + 77,))}
    made = [checkpoint(folder / "step-0", held)]
    for step in range(1, 5):
        held = {name: one if name == "scale" else moved(rng, one, 0.01) for name, one in held.items()}
        made.append(checkpoint(folder / f"step-{step}", held))
    return made


def made_one_by_one(steps: Sequence[Path], folder: Path, format: str, options: Mapping[str, Any]) -> None:
    folder.mkdir()
    for number, (base, tuned) in enumerate(pairwise(steps), 1):
        if format == "ckptdelta":
            patch.make(base, tuned, folder / f"patch_{number:06d}.ckptdelta")
        elif format == "flat":
            patch.make_flat(base, tuned, folder / f"patch_{number:06d}.safetensors", **options)
        else:
            version = options.get("version", 1) + number - 1
            make_directory(base, tuned, folder / f"weight_v{version:06d}", **{**options, "version": version})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def size_of(folder: Path) -> int:
    return sum(map(len, files_of(folder).values()))


def weights_of(side: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(side).items() if "safetensors" in name}


def assert_same(one: Track, other: Track) -> None:
    """To the last digit."""
    assert one.names == other.names and one.warnings == other.warnings
    assert all(np.array_equal(one.counts[key], other.counts[key]) for key in other.counts)
    for key in ("base_norms", "delta_norms", "products"):
        assert np.array_equal(getattr(one, key), getattr(other, key), equal_nan=True)


def bytes_read() -> int:
    """What this process has asked the system to read."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_each_patch_is_that_of_its_pair_and_each_checkpoint_is_read_once(
    format: str, options: dict[str, Any], run: list[Path], tmp_path: Path
) -> None:
    made_one_by_one(run, tmp_path / "expected", format, options)
    told: list[Event] = []
    how: dict[str, Any] = {"gram": True, "patch_format": format, "patch_options": options}
    track(run[0], run[1:2], patches=tmp_path / "first", **how)  # what is imported and compiled is read here
    before = bytes_read() if Path("/proc/self/io").exists() else 0
    found = track(run[0], run[1:], patches=tmp_path / "all", threads=3, listener=told.append, **how)
    if before:
        more = bytes_read() - before - sum(map(size_of, run))
        # Engines' formats are copied behind their headers, and flat ones read small tensors again that go whole.
        copied = 0 if format == "ckptdelta" else size_of(tmp_path / "all")
        assert 0 <= more < copied + size_of(run[0]) / 2  # headers and the like
    assert files_of(tmp_path / "all") == files_of(tmp_path / "expected")
    assert list(told_stages(told)) == ["following and patching", "completing patches"]
    assert_same(found, track(run[0], run[1:], gram=True))
    links = sorted((tmp_path / "all").iterdir())
    patch.apply(run[0], links, tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(run[-1])


FATES = ("same", "moved", "other", "gone", "retyped", "reshaped")


@given(
    fates=st.lists(st.lists(st.sampled_from(FATES), min_size=3, max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(sorted(BITS)), min_size=5, max_size=5),
    late=st.booleans(),
    held=st.sampled_from([0, 1 << 20]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_tensors_that_come_and_go(
    fates: list[list[str]],
    dtypes: list[str],
    late: bool,
    held: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whatever becomes of tensors that are not followed, each patch is that of its pair; also if what was read of all
    checkpoints goes through a file."""
    folder, rng = tmp_path_factory.mktemp("fates"), np.random.default_rng(seed)
    always = random_tensor(rng, "BF16", (7, 5))
    states = [{f"t{place}": random_tensor(rng, dtypes[place], (4, 2)) for place in range(len(fates))}]
    if late:
        states[0].pop("t0")
    for step in range(3):
        now = {}
        for place, fate in enumerate(fates):
            name, dtype = f"t{place}", dtypes[place]
            old = states[-1].get(name, random_tensor(rng, dtype, (4, 2)))
            match fate[step]:
                case "moved":
                    now[name] = moved(rng, old, 0.3)
                case "other":
                    now[name] = random_tensor(rng, old.dtype, old.shape)
                case "retyped":
                    now[name] = random_tensor(rng, "F16" if old.dtype == "F32" else "F32", (4, 2))
                case "reshaped":
                    now[name] = random_tensor(rng, old.dtype, (2, 4) if old.shape == (4, 2) else (4, 2))
                case "same":
                    now[name] = old
        states.append(now)
    steps = [
        write(folder / f"{step}.safetensors", {**state, "always": moved(rng, always)})
        for step, state in enumerate(states)
    ]
    plan = plan_track(steps[0], steps[1:])
    patches = Patches(folder / "all", held=held)
    found = follow_and_patch(plan, patches, 2, ignore, kinds=1, every=1, room=1 << 20, most=3)
    made_one_by_one(steps, folder / "expected", "ckptdelta", {})
    for link in sorted((folder / "expected").iterdir()):
        assert (folder / "all" / link.name).read_bytes() == link.read_bytes()
    plain = follow_all(plan.tensors, 2, ignore, kinds=1)
    for key in ("counts", "squares", "products"):
        assert np.array_equal(getattr(found, key), getattr(plain, key), equal_nan=True)


def test_dtypes_that_change_and_figures_to_the_last_digit(any_trajectory: Trajectory, tmp_path: Path) -> None:
    paths = any_trajectory.paths
    found = track(paths[0], paths[1:], patches=tmp_path / "all", gram=True)
    made_one_by_one(paths, tmp_path / "expected", "ckptdelta", {})
    assert files_of(tmp_path / "all") == files_of(tmp_path / "expected")
    assert_same(found, track(paths[0], paths[1:], gram=True))


@pytest.mark.parametrize("case", ["tied", "vlm", "fp8", "odd", "wide"])
def test_what_is_followed_under_another_name_is_patched_by_its_own(case: str, tmp_path: Path) -> None:
    """A head that is tied, other names, and whatever dtype: the chain leads to the last checkpoint."""
    base, tuned = (FIXTURES / case / side for side in ("base", "tuned"))
    found = track(base, [tuned, base, tuned], patches=tmp_path / "all")
    assert_same_counts(found, track(base, [tuned, base, tuned]))
    links = sorted((tmp_path / "all").iterdir())
    patch.apply(base, links, tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tuned)
    made_one_by_one([base, tuned, base, tuned], tmp_path / "expected", "ckptdelta", {})
    for one, other in zip(links, sorted((tmp_path / "expected").iterdir()), strict=True):
        assert_same_contents(one, other)


def assert_same_counts(one: Track, other: Track) -> None:
    assert one.names == other.names
    assert all(np.array_equal(one.counts[key], other.counts[key]) for key in other.counts)


def test_steps_with_their_tensors_in_other_orders(tmp_path: Path) -> None:
    """Blocks lie where they came then: the patches say the same, and are as large."""
    rng = np.random.default_rng(0)
    held = {f"t{k}": random_tensor(rng, "BF16", (9, 9)) for k in range(6)}
    steps = [write(tmp_path / "0.safetensors", held)]
    for step in (1, 2):
        held = {name: moved(rng, held[name]) for name in rng.permutation(list(held)).tolist()}
        steps.append(write(tmp_path / f"{step}.safetensors", held))
    track(steps[0], steps[1:], patches=tmp_path / "all")
    links = sorted((tmp_path / "all").iterdir())
    patch.apply(steps[0], links, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == steps[2].read_bytes()
    made_one_by_one(steps, tmp_path / "expected", "ckptdelta", {})
    for one, other in zip(links, sorted((tmp_path / "expected").iterdir()), strict=True):
        assert_same_contents(one, other)


def assert_same_contents(one: Path, other: Path) -> None:
    """But for where blocks lie."""
    with open_delta(one) as first, open_delta(other) as second:
        sides = [[tensor._replace(offset=0) for tensor in link.delta.tensors.values()] for link in (first, second)]
        assert sides[0] == sides[1]


def test_what_cannot_be_made_is_refused_before_anything_is_written(run: list[Path], tmp_path: Path) -> None:
    fewer = write(tmp_path / "fewer.safetensors", {"scale": random_tensor(np.random.default_rng(0), "F32", (40,))})
    target = tmp_path / "all"
    refusals: list[tuple[list[Path], dict[str, Any], type[CkptdiffError], str]] = [
        ([run[1], fewer], {"patch_format": "delta-dir"}, PatchError, "no such tensor"),
        (run[1:], {"patch_format": "flat"}, PatchError, "dense-rest"),
        (run[1:], {"patch_format": "zip"}, OptionError, "no such format"),
        (run[1:], {"patch_format": "delta-dir", "patch_options": {"level": 99}}, OptionError, "level"),
        (run[1:], {"patch_format": "delta-dir", "patch_options": {"version": 0}}, OptionError, "version"),
    ]
    for steps, options, kind, words in refusals:
        with pytest.raises(kind, match=words):
            track(run[0], steps, patches=target, **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fewer.safetensors"]
    target.mkdir()
    with pytest.raises(RunFileError, match="exists"):
        track(run[0], run[1:], patches=target)
    assert list(target.iterdir()) == []


def test_a_step_that_is_damaged_on_the_way_leaves_nothing(run: list[Path], tmp_path: Path) -> None:
    last = tmp_path / "last.safetensors"
    held = {name: tensor for side in [run[1]] for name, tensor in read(side).items()}
    write(last, held)

    def shorten(event: Event) -> None:
        if isinstance(event, StageBegun) and event.stage == "following and patching":
            os.truncate(last, last.stat().st_size - 100)

    with pytest.raises(CkptdiffError, match=r"shrank|changed"):
        track(run[0], [run[1], last], patches=tmp_path / "all", listener=shorten)
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


def test_the_command(run: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, *steps = map(str, run[:3])
    words = ["track", base, *steps, "--no-progress"]
    assert main([*words, "--patches", str(tmp_path / "all"), "-o", str(tmp_path / "t.h5"), "--gram"]) == 0
    said = capsys.readouterr()
    assert "2 patches written to" in said.err and "support" in said.out
    links = [str(link) for link in sorted((tmp_path / "all").iterdir())]
    assert [Path(link).name for link in links] == ["patch_000001.ckptdelta", "patch_000002.ckptdelta"]
    assert main(["patch", "apply", base, *links, "-o", str(tmp_path / "out")]) == 0
    assert weights_of(tmp_path / "out") == weights_of(run[2])
    folders = ["--patches", str(tmp_path / "dirs"), "--patch-format", "delta-dir", "--version", "7", "--level", "3"]
    assert main([*words, *folders, "-q"]) == 0
    assert sorted(path.name for path in (tmp_path / "dirs").iterdir()) == ["weight_v000007", "weight_v000008"]
    capsys.readouterr()
    for wrong, why in (
        (["--patches", str(tmp_path / "all")], "exists"),
        (["--level", "3"], "--patch-format delta-dir"),
        (["--patch-format", "flat"], "--patches DIR"),
        (["--patches", str(tmp_path / "new"), "--dense-rest"], "--patch-format flat"),
    ):
        assert main([*words, *wrong]) == 2
        assert why in capsys.readouterr().err
    assert main(["track", str(tmp_path / "t.h5"), "--patches", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(
    ("moment", "call"),
    [
        ("ckptdiff.track.patching:_Work._job", 2),
        ("ckptdiff.files.hidden:Hidden.take_name", 2),
        ("ckptdiff.files.hidden:Hidden.take_name", 5),
    ],
)
def test_all_patches_or_none(end: signal.Signals, moment: str, call: int, run: list[Path], tmp_path: Path) -> None:
    """Stopped in the middle, or before any of them, or the folder, takes its name."""
    words = ["track", *run, "--patches", tmp_path / "all", "--no-progress"]
    process = stopped_at(moment, call, *words)
    process.send_signal(end)
    if end != signal.SIGKILL:
        go_on(process)
    assert ended(process)[0] == (-end if end == signal.SIGKILL else 128 + end)
    assert not (tmp_path / "all").exists()
    assert end == signal.SIGKILL or list(tmp_path.iterdir()) == []
    assert main([*map(str, words), "-q"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["all"] and len(files_of(tmp_path / "all")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("format", ["ckptdelta", "delta-dir"])
def test_a_full_disk_leaves_nothing(format: str, run: list[Path], tmp_path: Path) -> None:
    track(run[0], run[1:], patches=tmp_path / "all", patch_format=format)  # type: ignore[arg-type]
    largest = max(map(len, files_of(tmp_path / "all").values()))
    code = (
        "import resource, sys\n"
        "from ckptdiff.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, resource.RLIM_INFINITY))\n"
        "sys.exit(main())"
    )
    words = ["track", *map(str, run), "--patches", str(tmp_path / "full"), "--patch-format", format]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot write the output: File too large" in done.stderr, done.stderr
    assert str(tmp_path / "full") in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["all"]
