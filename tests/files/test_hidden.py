"""What a killed process left is removed by the next with the same target, and nothing else is."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from ckptdiff.files import hidden
from ckptdiff.files.hidden import remove_abandoned
from ckptdiff.files.staged import StagedFile, StagedFolder

HOLD = """
import sys
from pathlib import Path
from ckptdiff.files.staged import StagedFile
from ckptdiff.files.staged import StagedFolder

target = Path(sys.argv[2])
if sys.argv[1] == "file":
    with StagedFile(target) as staged:
        staged.write(b"half")
        print("made", flush=True)
        sys.stdin.readline()
        staged.commit()
else:
    with StagedFolder(target) as staged, StagedFile(staged.path / "shard") as shard:
        shard.write(b"half")
        print("made", flush=True)
        sys.stdin.readline()
        shard.commit()
        staged.commit()
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from ckptdiff.files.staged import StagedFile, StagedFolder

last, calls = int(sys.argv[3]), 0


def hear(event, arguments):
    global calls
    if event.startswith(("open", "os.", "fcntl.flock")):
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(hear)
with (StagedFile if sys.argv[1] == "file" else StagedFolder)(Path(sys.argv[2])) as staged:
    if sys.argv[1] == "file":
        staged.write(b"whole")
    staged.commit()
"""
"""Each call to the system is the last one of some process."""
kinds = pytest.mark.parametrize("kind", ["file", "folder"])


@contextmanager
def making(kind: str, target: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which has made something under a hidden name and waits before it commits it."""
    command = [sys.executable, "-c", HOLD, kind, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        try:
            yield process
        finally:
            process.kill()


def abandon(kind: str, target: Path) -> Path:
    """What a process leaves that is killed while it makes the target."""
    before = set(target.parent.iterdir())
    with making(kind, target) as process:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    (left,) = set(target.parent.iterdir()) - before
    return left


def make(kind: str, target: Path) -> None:
    with StagedFile(target) if kind == "file" else StagedFolder(target) as staged:
        staged.commit()


@kinds
@pytest.mark.parametrize("killed", ["file", "folder"])
def test_the_next_with_that_target_removes_what_is_abandoned(kind: str, killed: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    left = [abandon(killed, target) for _ in range(2)]
    assert all(path.name.startswith(".out.") and path.suffix == ".tmp" for path in left)
    other = abandon(killed, tmp_path / "out.h5")
    make(kind, target)
    assert sorted(tmp_path.iterdir()) == sorted([target, other])


@pytest.mark.slow
@kinds
def test_a_process_that_is_killed_at_any_call_leaves_nothing_for_good(kind: str, tmp_path: Path) -> None:
    codes, last = [], 0
    while not codes or codes[-1]:
        last += 1
        folder = tmp_path / str(last)
        folder.mkdir()
        command = [sys.executable, "-c", KILLED, kind, str(folder / "out"), str(last)]
        codes.append(subprocess.run(command, check=False).returncode)
        assert codes[-1] in (0, -signal.SIGKILL)
        if kind == "folder" and (folder / "out").exists():
            (folder / "out").rmdir()
        make(kind, folder / "out")
        assert [path.name for path in folder.iterdir()] == ["out"], last
    assert len(codes) > 8


@kinds
def test_a_folder_that_another_program_has_locked_is_waited_for_and_then_used_all_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = abandon(kind, tmp_path / "out")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("time.sleep", sleep)
    make(kind, tmp_path / "out")
    assert now >= 2 and set(tmp_path.iterdir()) == {tmp_path / "out", left}
    os.close(descriptor)
    remove_abandoned(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("named", ["whole", "from here", "by a link"])
def test_what_is_made_in_a_hidden_folder_waits_for_no_lock_of_its_own(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    target = {"whole": tmp_path / "out", "from here": Path("out"), "by a link": tmp_path / "link/out"}[named]

    def sleep(seconds: float) -> None:
        raise AssertionError("waits for itself")

    monkeypatch.setattr("time.sleep", sleep)
    with StagedFolder(target) as staged:
        (staged.path / "deep").mkdir()
        for place in ("one", "deep/two"):
            with StagedFile(staged.path / place) as file:
                file.write(b"whole")
                file.commit()
        staged.commit()
    assert (tmp_path / "out/one").read_bytes() == (tmp_path / "out/deep/two").read_bytes() == b"whole"


@kinds
def test_what_a_living_process_makes_stays(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with making(kind, target) as process:
        (path,) = tmp_path.iterdir()
        remove_abandoned(target)
        with StagedFile(target) as staged:
            staged.write(b"another")
            assert path.exists()
        assert list(tmp_path.iterdir()) == [path]
        assert process.communicate(b"\n") and process.returncode == 0
    assert (target if kind == "file" else target / "shard").read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [target]


def test_what_looks_alike_stays(tmp_path: Path) -> None:
    target = tmp_path / "run.h5"
    name = abandon("file", target).name
    stems = "run.h5", "other.h5", "run"
    other_digit = "1" if name[-5] == "0" else "0"
    middles = "deadbeef", "0123456789abcdef", name[8:-5] + other_digit, name[8:-5].upper(), "old", ""
    alike = {f".{stem}.{middle}.tmp" for stem in stems for middle in middles} | {name[1:], f"{name}~", f".{name}"}
    for alike_name in alike:
        (tmp_path / alike_name).write_text("precious")
    (tmp_path / ".other.h5.deadbeef01234567.tmp").mkdir()
    before = set(tmp_path.iterdir())
    assert len(before) == len(alike) + 2
    make("file", target)
    assert set(tmp_path.iterdir()) == before - {tmp_path / name} | {target}


@pytest.mark.parametrize("put", [lambda path: path.symlink_to("/etc"), os.mkfifo])
def test_neither_links_nor_pipes_are_followed(put: Callable[[Path], object], tmp_path: Path) -> None:
    """They are not what we make, whatever they are called."""
    left = abandon("file", tmp_path / "out")
    left.unlink()
    put(left)
    remove_abandoned(tmp_path / "out")
    assert os.path.lexists(left)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@kinds
def test_what_belongs_to_another_user_stays(kind: str, tmp_path: Path) -> None:
    left = abandon(kind, tmp_path / "out")
    os.chown(left, 12345, 12345)
    remove_abandoned(tmp_path / "out")
    assert left.exists()
    os.chown(left, os.geteuid(), os.getegid())
    remove_abandoned(tmp_path / "out")
    assert not left.exists()


@kinds
def test_a_machine_leaves_alone_what_another_made_in_a_shared_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks of one machine are not always known to the other. Here the boot is what tells two apart."""
    boot, mounts = tmp_path / "boot", tmp_path / "mounts"
    monkeypatch.setattr(hidden, "_scope", partial(hidden._scope, boot=boot, mounts=mounts))
    device = tmp_path.stat().st_dev
    mounts.write_text(f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw - nfs4 server:/x rw\n")
    boot.write_text("one\n")
    (tmp_path / "shared").mkdir()
    target = tmp_path / "shared/out"
    staged = StagedFile(target) if kind == "file" else StagedFolder(target)
    staged.__enter__()
    (path,) = target.parent.iterdir()
    fcntl.flock(staged._hidden.descriptor, fcntl.LOCK_UN)  # as it looks from where the lock is not known
    boot.write_text("two\n")
    remove_abandoned(target)
    assert path.exists()
    boot.write_text("one\n")
    remove_abandoned(target)
    assert not path.exists()
    staged.__exit__(None, None, None)


def test_what_file_systems_are_shared(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    lines = "22 27 0:210 / /proc rw,relatime - proc proc rw\n27 1 {} / /a\\040b rw shared:1 master:2 - {} {} rw,x=- y\n"
    for kind, local in (("ext4", True), ("xfs", True), ("nfs4", False), ("lustre", False), ("fuse.s3fs", False)):
        mounts.write_text(lines.format(number, kind, "/dev/sda1"))
        scope = hidden._scope(tmp_path, mounts=mounts)
        assert scope is not None and (scope == "one machine") == local
        assert local or scope.endswith(f" {device}")
    mounts.write_text(lines.format("7:7", "ext4", "/dev/sda1"))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert hidden._scope(tmp_path, mounts=mounts) == f"{boot} {device}"
    assert hidden._scope(tmp_path / "gone", mounts=mounts) is None


@kinds
@pytest.mark.parametrize("why", ["no locks", "no /proc"])
def test_where_nothing_tells_who_lives_names_have_no_mark(
    kind: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        if why == "no locks":
            patch.setattr(fcntl, "flock", refused)
        else:
            patch.setattr(hidden, "_scope", partial(hidden._scope, mounts=tmp_path / "gone"))
        with StagedFile(target) if kind == "file" else StagedFolder(target) as staged:
            (path,) = tmp_path.iterdir()
            remove_abandoned(target)
            assert list(tmp_path.iterdir()) == [path]
            patch.undo()
            remove_abandoned(target)
            assert list(tmp_path.iterdir()) == [path]
            staged.commit()
    assert list(tmp_path.iterdir()) == [target]


@kinds
def test_many_at_once_do_not_take_each_others_work_away(kind: str, tmp_path: Path) -> None:
    """Each looks for what is abandoned while the others make theirs, lock it, name it and let go of it."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(60):
                make(kind, tmp_path / "out")  # an empty folder takes the place of another
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_read_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_abandoned(tmp_path / "gone" / "out")

    def refused(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    make("file", tmp_path / "out")
    assert (tmp_path / "out").exists()
