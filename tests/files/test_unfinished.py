"""What is kept beside an output is found again as it was, or not at all; and the folder is nobody else's."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays, scalar_dtypes

from ckptdiff.errors import ChangedFileError, RunFileError
from ckptdiff.files.packed_entry import pack, unpack
from ckptdiff.files.unfinished import Saving, Unfinished, is_unfinished

BELONGS = {"version": "1", "--mask": "bitwise"}
AT_ONCE = Saving(0, 0)
LATER = Saving(1 << 30, math.inf)
Entries = dict[str, bytes]


def opened(folder: Path, *, saving: Saving = AT_ONCE, said: list[str] | None = None, **other: str) -> Unfinished:
    return Unfinished(folder / "run.h5", BELONGS | other, (said if said is not None else []).append, saving)


@contextmanager
def abandoned(folder: Path, saving: Saving = AT_ONCE) -> Iterator[Unfinished]:
    """A run that fails after the block."""
    with pytest.raises(LookupError), opened(folder, saving=saving) as unfinished:
        yield unfinished
        raise LookupError


def put(folder: Path, entries: Entries, saving: Saving = AT_ONCE) -> None:
    with abandoned(folder, saving) as unfinished:
        for key, value in entries.items():
            unfinished.keep(key, [value[:3], value[3:]])


def files(folder: Path) -> list[Path]:
    return sorted((folder / "run.h5.part").glob("*.done"))


@pytest.mark.parametrize(("saving", "count"), [(AT_ONCE, 3), (Saving(6, math.inf), 2), (LATER, 1)])
def test_what_was_kept_is_found_again(saving: Saving, count: int, tmp_path: Path) -> None:
    entries = {"a": b"abcdef", "b": b"", "c": bytes(range(256))}
    put(tmp_path, entries, saving)
    assert len(files(tmp_path)) == count and is_unfinished(tmp_path / "run.h5")
    put(tmp_path, {"d": b"later"})
    with opened(tmp_path) as unfinished:
        found = {key: unfinished.find(key) for key in (*entries, "d", "e")}
        assert found == entries | {"d": b"later", "e": None}
        assert [key in unfinished for key in ("a", "e")] == [True, False]
        unfinished.remove()
    assert list(tmp_path.iterdir()) == [] and not is_unfinished(tmp_path / "run.h5")


def test_what_waits_too_long_is_written_while_nothing_comes(tmp_path: Path) -> None:
    with opened(tmp_path, saving=Saving(1 << 30, 0.05)) as unfinished:
        unfinished.keep("a", [b"a"])
        while not files(tmp_path):
            unfinished.tick()
        unfinished.remove()


def test_all_threads_may_keep(tmp_path: Path) -> None:
    with abandoned(tmp_path, Saving(50, math.inf)) as unfinished:
        threads = [
            threading.Thread(target=lambda i=i: [unfinished.keep(f"{i} {j}", [bytes([i, j])]) for j in range(40)])
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with opened(tmp_path) as unfinished:
        assert all(unfinished.find(f"{i} {j}") == bytes([i, j]) for i in range(8) for j in range(40))


def test_a_folder_without_an_entry_does_not_stay(tmp_path: Path) -> None:
    with abandoned(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["run.h5.part"]
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=150)
@given(st.dictionaries(st.text(max_size=5), st.binary(max_size=60), min_size=1), st.booleans(), st.data())
def test_a_damaged_file_gives_what_was_written_or_nothing(entries: Entries, whole: bool, data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        put(folder, entries, LATER)
        (file,) = files(folder)
        stored = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(stored) - 1))
        if whole:
            stored[at] ^= data.draw(st.integers(1, 255))
            file.write_bytes(stored)
        else:
            os.truncate(file, at)
        said: list[str] = []
        with opened(folder, said=said) as unfinished:
            lost = [key for key, value in entries.items() if unfinished.find(key) != value]
            assert [unfinished.find(key) for key in lost] == [None] * len(lost)
            unfinished.tick()
            assert len(said) == (1 if lost else 0)
            for key in lost:
                unfinished.keep(key, [entries[key]])
        with opened(folder) as unfinished:
            assert all(unfinished.find(key) == value for key, value in entries.items())


def test_work_of_another_run_is_refused_and_stays(tmp_path: Path) -> None:
    put(tmp_path, {"a": b"a"})
    before = sorted(path.name for path in (tmp_path / "run.h5.part").iterdir())
    with pytest.raises(RunFileError, match="belongs to another run") as caught:
        opened(tmp_path, **{"--mask": "abs:1e-05", "--spectra": "exact"}).__enter__()
    error = caught.value
    assert error.file == str(tmp_path / "run.h5.part") and "remove" in str(error.hint)
    assert (error.expected, error.found) == ("--mask bitwise; --spectra none", "--mask abs:1e-05; --spectra exact")
    assert sorted(path.name for path in (tmp_path / "run.h5.part").iterdir()) == before
    with opened(tmp_path) as unfinished:
        assert unfinished.find("a") == b"a"


def test_a_file_of_another_run_is_not_taken(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    put(ours, {"a": b"a"})
    with pytest.raises(LookupError), opened(theirs, version="2") as unfinished:
        unfinished.keep("a", [b"b"])
        raise LookupError
    shutil.copy(files(theirs)[0], ours / "run.h5.part" / "00000009-01234567.done")
    said: list[str] = []
    with opened(ours, said=said) as unfinished:
        assert unfinished.find("a") == b"a"
    assert len(said) == 1 and "of another run" in said[0]


@pytest.mark.parametrize("name", ["notes.txt", "0.done", "my.tmp", "belongs"])
def test_a_folder_of_someone_else_is_left_alone(name: str, tmp_path: Path) -> None:
    strange = tmp_path / "run.h5.part" / name
    strange.parent.mkdir()
    strange.write_text("mine")
    with pytest.raises(RunFileError, match="not one that an unfinished run left") as caught:
        opened(tmp_path).__enter__()
    assert caught.value.found == name and list(strange.parent.iterdir()) == [strange]


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_folder_that_does_not_say_whose_it_is(text: str, tmp_path: Path) -> None:
    put(tmp_path, {"a": b"a"})
    (tmp_path / "run.h5.part" / "belongs.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunFileError, match="not one that an unfinished run left"):
        opened(tmp_path).__enter__()
    (tmp_path / "run.h5.part" / "belongs.json").unlink()
    with pytest.raises(RunFileError, match=r"(?s)not one that .* no belongs\.json"):
        opened(tmp_path).__enter__()
    assert len(files(tmp_path)) == 1


def test_work_of_another_run_that_kept_nothing_is_no_hindrance(tmp_path: Path) -> None:
    put(tmp_path, {"a": b"a"})
    files(tmp_path)[0].unlink()  # as if it had been killed before
    with opened(tmp_path, version="2") as unfinished:
        unfinished.keep("b", [b"b"])
    with opened(tmp_path, version="2") as unfinished:
        assert (unfinished.find("a"), unfinished.find("b")) == (None, b"b")


def test_what_others_put_there_meanwhile_stays(tmp_path: Path) -> None:
    said: list[str] = []
    put(tmp_path, {"a": b"a"})
    (tmp_path / "run.h5.part" / ".DS_Store").touch()
    with opened(tmp_path, said=said) as unfinished:
        assert unfinished.find("a") == b"a"
    (tmp_path / "run.h5.part" / ".DS_Store").unlink()
    with opened(tmp_path, said=said) as unfinished:
        unfinished.keep("a", [b"a"])
        strange = unfinished.folder / "notes.txt"
        strange.write_text("mine")
        unfinished.remove()
    assert list(strange.parent.iterdir()) == [strange] and len(said) == 1 and "stays" in said[0]


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "belongs.tmp"], ["lock", "00000000-0123abcd.tmp"]])
def test_what_a_process_leaves_that_is_killed_at_once(left: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run.h5.part"
    folder.mkdir()
    for name in left:
        (folder / name).write_bytes(b"half")
    put(tmp_path, {"a": b"a"})
    assert not list(folder.glob("*.tmp"))
    assert json.loads((folder / "belongs.json").read_text()) == BELONGS


def test_two_at_once(tmp_path: Path) -> None:
    with opened(tmp_path) as unfinished:
        unfinished.keep("a", [b"a"])
        with pytest.raises(RunFileError, match="another run with --resume is at work"):
            opened(tmp_path).__enter__()
    with opened(tmp_path) as unfinished:
        assert unfinished.find("a") == b"a"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_has_the_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run.h5.part"
    path.write_text("mine") if kind == "file" else path.symlink_to("nowhere")
    with pytest.raises(RunFileError, match=r"cannot use the folder of --resume: File exists"):
        opened(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_lies_beside_the_file_that_a_link_names(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run.h5").symlink_to("disk/run.h5")
    with opened(tmp_path) as unfinished:
        assert unfinished.folder == tmp_path / "disk" / "run.h5.part"


@pytest.mark.skipif(sys.platform != "linux", reason="what a full disk looks like from inside, on Linux")
def test_a_full_disk_keeps_what_was_written(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said: list[str] = []
    with pytest.raises(RunFileError) as caught, opened(tmp_path, said=said) as unfinished:
        unfinished.keep("a", [b"a"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            unfinished.keep("b", [bytes(5000)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = caught.value
    assert error.problem == "cannot keep what is done: File too large" and error.file == str(tmp_path / "run.h5.part")
    assert "bytes free" in str(error.found) and "make room" in str(error.hint)
    assert said == [f"what is done is kept in {tmp_path / 'run.h5.part'}: the same command goes on from there"]
    with opened(tmp_path) as unfinished:
        assert (unfinished.find("a"), unfinished.find("b")) == (b"a", None)


@pytest.mark.skipif(sys.platform != "linux", reason="what a full disk looks like from inside, on Linux")
def test_a_disk_that_is_full_from_the_first(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(RunFileError, match="cannot use the folder of --resume: File too large"):
            opened(tmp_path).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_was_read_of_a_changed_input_is_dropped(tmp_path: Path) -> None:
    changed: list[str] = []

    def check() -> None:
        if changed:
            raise ChangedFileError("changed", file=changed[0])

    unfinished = Unfinished(tmp_path / "run.h5", BELONGS, [].append, Saving(2, math.inf), check)
    with pytest.raises(ChangedFileError), unfinished:
        unfinished.keep("a", [b"aa"])
        unfinished.keep("b", [b"b"])
        changed.append("shard")
        unfinished.keep("c", [b"c"])
    with opened(tmp_path) as unfinished:
        assert [unfinished.find(key) for key in "abc"] == [b"aa", None, None]


def test_nothing_is_written_once_it_is_left(tmp_path: Path) -> None:
    with opened(tmp_path) as unfinished:
        unfinished.keep("a", [b"a"])
        unfinished.remove()
    unfinished.keep("b", [b"b"])
    assert list(tmp_path.iterdir()) == []


facts = st.dictionaries(
    st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.text())
)


@settings(max_examples=100)
@given(facts, st.dictionaries(st.text(), arrays(scalar_dtypes(), (3, 2)), max_size=4), st.lists(st.binary()))
def test_entries_come_out_as_they_went_in(
    facts: dict[str, object], values: dict[str, np.ndarray], payloads: list[bytes]
) -> None:
    found = unpack(b"".join(pack(facts, values, payloads)))
    assert found.facts == facts and found.payloads == payloads
    assert list(found.arrays) == list(values)
    for name, array in found.arrays.items():
        assert (array.dtype, array.shape) == (values[name].dtype, values[name].shape)
        assert array.tobytes() == values[name].tobytes() and array.flags.writeable and array.flags.aligned


@pytest.mark.parametrize("values", [np.zeros((0, 4), np.int64), np.array(2**63, np.uint64), np.array([-1, 2**62])])
def test_counts_of_any_size(values: np.ndarray) -> None:
    (found,) = unpack(b"".join(pack({}, {"counts": values}))).arrays.values()
    assert found.dtype == values.dtype and np.array_equal(found, values)


def test_integers_of_numpy_are_facts_too() -> None:
    facts = {"values": np.int64(2**40), "codes": [np.uint8(3), None]}
    assert unpack(b"".join(pack(facts, {}))).facts == {"values": 2**40, "codes": [3, None]}


def test_small_counts_take_few_bytes() -> None:
    counts = np.arange(200).reshape(2, 100)
    assert sum(map(len, pack({}, {"counts": counts}))) < 400
