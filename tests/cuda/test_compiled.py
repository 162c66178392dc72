"""Compiled kernels on disk: made once, named by all they depend on, not trusted when damaged, never a reason to fail.

NVRTC is played by something that only notes what it is asked; `test_compile.py` asks the real one.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptdiff.errors import DeviceError
from ckptdiff.measure.cuda import compiled

BF16, F16 = ("bf16",) * 3, ("f16",) * 3


class FakeNvrtc:
    class NVRTCError(RuntimeError):
        pass

    version = (13, 0)
    archs = (75, 80, 90, 100)
    broken = False

    def __init__(self):
        self.asked = []
        self.alive = 0

    def getVersion(self):  # noqa: N802
        return self.version

    def getSupportedArchs(self):  # noqa: N802
        return self.archs

    def createProgram(self, text, name, headers, include_names):  # noqa: N802
        assert (headers, include_names) == ((), ())
        self.alive += 1
        return text

    def compileProgram(self, program, options):  # noqa: N802
        self.asked.append(options)
        if self.broken:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def getProgramLog(self, program):  # noqa: N802
        return "kernels.cu(1): error: no\n"

    def getCUBIN(self, program):  # noqa: N802
        return b"cubin " + str(self.asked[-1]).encode() + program.encode()

    def getPTX(self, program):  # noqa: N802
        return b"ptx " + str(self.asked[-1]).encode() + program.encode()

    def destroyProgram(self, program):  # noqa: N802
        self.alive -= 1


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    fake = FakeNvrtc()
    monkeypatch.setattr(compiled, "_nvrtc", lambda: fake)
    return fake


@pytest.fixture
def folder(empty_cache: Path) -> Path:
    compiled.compiled_folder.cache_clear()
    yield empty_cache / "cuda"
    compiled.compiled_folder.cache_clear()


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_kernels_are_compiled_once(nvrtc, folder):
    first = compiled.compiled_kernels("sm_90", BF16)
    assert first.startswith(b"cubin ") and compiled.compiled_kernels("sm_90", BF16) == first
    assert len(nvrtc.asked) == 1 and nvrtc.alive == 0
    (kept,) = files(folder)
    assert kept.name.startswith("bf16-bf16-bf16.sm_90.") and kept.suffix == ".cubin"
    assert (folder.stat().st_mode & 0o777, folder) == (0o700, compiled.compiled_folder())


def test_what_they_are_compiled_with(nvrtc, folder):
    compiled.compiled_kernels("sm_90", ("bf16", "f8_e4m3", "f32"))
    (options,) = nvrtc.asked
    assert {"-DBASE=Bf16", "-DTUNED=E4m3", "-DCOMPARE=F32", "-DTHREADS=512", "-arch=sm_90", "-ftz=false"} <= set(
        options
    )
    assert not [option for option in options if option.startswith(("-I", "--include")) or "fast" in option]


def test_an_architecture_that_nvrtc_knows_gets_machine_code_and_a_newer_one_ptx(nvrtc, folder):
    assert compiled.architecture_for(9, 0) == "sm_90"
    assert compiled.architecture_for(10, 0) == "sm_100"
    assert compiled.architecture_for(8, 9) == "compute_80"
    newer = compiled.architecture_for(13, 0)
    assert newer == "compute_100"
    assert compiled.compiled_kernels(newer, BF16).startswith(b"ptx ")
    assert [path.suffix for path in files(folder)] == [".ptx"]


def test_a_gpu_that_nvrtc_no_longer_knows_is_an_error(nvrtc):
    with pytest.raises(DeviceError, match=r"NVRTC 13\.0") as caught:
        compiled.architecture_for(7, 0)
    assert (caught.value.expected, caught.value.found) == ("sm_75 or newer", "sm_70")
    assert "ckptdiff[cuda12]" in caught.value.hint


def test_a_file_is_named_by_all_that_its_code_depends_on(nvrtc, folder, monkeypatch):
    def again(*arguments):
        count = len(files(folder)) if folder.exists() else 0
        compiled.compiled_kernels(*arguments)
        assert len(files(folder)) == len(nvrtc.asked) == count + 1

    again("sm_90", BF16)
    again("sm_90", F16)
    again("sm_80", BF16)
    nvrtc.version = (13, 5)
    again("sm_90", BF16)
    monkeypatch.setattr(compiled, "kernel_source", lambda: "edited")
    again("sm_90", BF16)
    monkeypatch.setattr(compiled, "THREADS", 256)
    again("sm_90", BF16)
    monkeypatch.setattr(compiled, "_EXACT", ("-ftz=true",))
    again("sm_90", BF16)


def truncate(entry: Path) -> None:
    os.truncate(entry, entry.stat().st_size // 2)


def empty(entry: Path) -> None:
    os.truncate(entry, 0)


def overwrite(entry: Path) -> None:
    entry.write_bytes(os.urandom(entry.stat().st_size))


def flip(place: float) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        content = bytearray(entry.read_bytes())
        content[int(place * (len(content) - 1))] ^= 0x55
        entry.write_bytes(content)

    return damage


@pytest.mark.parametrize("damage", [truncate, empty, overwrite, *map(flip, (0, 0.5, 1))])
def test_damaged_code_is_said_and_compiled_anew(nvrtc, folder, caplog, damage):
    right = compiled.compiled_kernels("sm_90", BF16)
    (entry,) = files(folder)
    damage(entry)
    with caplog.at_level(logging.WARNING):
        assert compiled.compiled_kernels("sm_90", BF16) == right
    assert caplog.messages == [f"dropped a damaged kernel from {entry}"]
    assert compiled.compiled_kernels("sm_90", BF16) == right
    assert len(nvrtc.asked) == 2 and files(folder) == [entry]


def test_a_file_that_cannot_be_read_or_replaced(nvrtc, folder, caplog):
    compiled.compiled_kernels("sm_90", BF16)
    (entry,) = files(folder)
    entry.unlink()
    entry.mkdir()
    (entry / "occupied").touch()
    assert compiled.compiled_kernels("sm_90", BF16).startswith(b"cubin ")
    assert [message.split(": ")[0].split(" in ")[0] for message in caplog.messages] == [
        "cannot read a compiled kernel",
        "could not keep a compiled kernel",
    ]
    assert files(folder) == [entry]


def test_a_full_disk_leaves_nothing_behind(nvrtc, folder, caplog, monkeypatch):
    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert compiled.compiled_kernels("sm_90", BF16).startswith(b"cubin ")
    assert "No space left" in caplog.text and files(folder) == []


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(nvrtc, folder, caplog, mode):
    folder.mkdir(parents=True)
    folder.chmod(mode)
    for _ in range(2):
        assert compiled.compiled_kernels("sm_90", BF16).startswith(b"cubin ")
    assert len(nvrtc.asked) == 2 and files(folder) == []
    assert len(caplog.messages) == 1 and "can be written by others" in caplog.text


def test_without_a_folder_kernels_are_compiled_every_time(nvrtc, folder, monkeypatch):
    monkeypatch.setenv("CKPTDIFF_CACHE_DIR", "/proc/nowhere")
    for _ in range(2):
        assert compiled.compiled_kernels("sm_90", BF16).startswith(b"cubin ")
    assert len(nvrtc.asked) == 2 and compiled.compiled_folder() is None


def test_kernels_that_do_not_compile_are_an_error_and_not_kept(nvrtc, folder):
    nvrtc.broken = True
    with pytest.raises(DeviceError, match=r"do not compile for sm_90: NVRTC_ERROR_COMPILATION") as caught:
        compiled.compiled_kernels("sm_90", BF16)
    assert caught.value.found == "kernels.cu(1): error: no"
    assert "NVRTC" in caught.value.hint
    assert nvrtc.alive == 0 and files(folder) == []
