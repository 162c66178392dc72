"""Machine code on disk: kept where that is safe, survived where it is damaged, and never a reason to fail.

Most tests use a kernel of one line, which goes through the same cache and compiles in no time.
"""

from __future__ import annotations

import ast
import errno
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numba.core.caching import FunctionCache, IndexDataCacheFile
from packaging.requirements import Requirement
from patience import PATIENCE

import ckptdiff
from ckptdiff import kernel_cache, kernel_library

TINY = """
from ckptdiff.jit import helper, kernel

@helper
def step(x):
    return 3 * x

@kernel
def triple(values):
    total = 0.0
    for i in range(values.size):
        total += step(values[i])
    return total
"""


class Called(NamedTuple):
    result: float
    hits: int
    warnings: list[str]


Call = Callable[[], Called]


@pytest.fixture
def call(tmp_path: Path, empty_cache: Path, caplog: pytest.LogCaptureFixture) -> Call:
    """Import the tiny kernel afresh, as a new process would, and call it."""
    source = tmp_path / "tiny.py"
    source.write_text(TINY)

    def fresh() -> Called:
        kernel_cache.cache_folder.cache_clear()
        caplog.clear()
        spec = importlib.util.spec_from_file_location("tiny", source)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        with caplog.at_level(logging.INFO, "ckptdiff"):
            spec.loader.exec_module(module)
            result = module.triple(np.arange(10.0))
        return Called(result, sum(module.triple.dispatcher.stats.cache_hits.values()), list(caplog.messages))

    return fresh


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_kernel_is_compiled_once(call: Call, empty_cache: Path) -> None:
    assert call() == (135.0, 0, [])
    (entry,) = entries(empty_cache)
    assert "triple" in entry.name and entry.suffix == ".nbc"
    assert call() == (135.0, 1, [])
    assert entries(empty_cache) == [entry]


def test_the_folder_belongs_to_the_user_alone(call: Call, empty_cache: Path) -> None:
    before = os.umask(0)
    try:
        call()
    finally:
        os.umask(before)
    (folder,) = empty_cache.iterdir()
    assert folder == kernel_cache.cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700


def truncate(entry: Path) -> None:
    os.truncate(entry, entry.stat().st_size // 2)


def empty(entry: Path) -> None:
    os.truncate(entry, 0)


def overwrite(entry: Path) -> None:
    entry.write_bytes(os.urandom(entry.stat().st_size))


def zero(entry: Path) -> None:
    entry.write_bytes(bytes(entry.stat().st_size))


def flip(place: float) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        content = bytearray(entry.read_bytes())
        content[int(place * (len(content) - 1))] ^= 0x55
        entry.write_bytes(content)

    return damage


@pytest.mark.parametrize("damage", [truncate, empty, overwrite, zero, *map(flip, (0, 0.005, 0.5, 1))])
def test_damage_is_said_and_mended(call: Call, empty_cache: Path, damage: Callable[[Path], None]) -> None:
    call()
    (entry,) = entries(empty_cache)
    damage(entry)
    result, hits, warnings = call()
    assert (result, hits) == (135.0, 0)
    assert len(warnings) == 1 and warnings[0].startswith("dropped a damaged kernel from ")
    assert call() == (135.0, 1, [])


def test_an_entry_that_cannot_be_read_or_replaced(call: Call, empty_cache: Path) -> None:
    call()
    (entry,) = entries(empty_cache)
    entry.unlink()
    entry.mkdir()
    (entry / "occupied").touch()
    result, hits, warnings = call()
    assert (result, hits) == (135.0, 0)
    assert [warning.split(" in ")[0].split(" from ")[0] for warning in warnings] == [
        "dropped a damaged kernel",
        "could not keep a compiled kernel",
    ]
    assert [path.name for path in entries(empty_cache)] == ["occupied"]


def test_a_full_disk(call: Call, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    result, hits, warnings = call()
    assert (result, hits) == (135.0, 0)
    assert len(warnings) == 1 and "could not keep" in warnings[0] and "No space left" in warnings[0]
    assert entries(empty_cache) == []
    monkeypatch.setattr(os, "replace", real)
    assert call() == (135.0, 0, []) and call() == (135.0, 1, [])


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(call: Call, empty_cache: Path, mode: int) -> None:
    call()
    folder = kernel_cache.cache_folder()
    assert folder is not None
    folder.chmod(mode)
    result, hits, warnings = call()
    assert (result, hits) == (135.0, 0) and kernel_cache.cache_folder() is None
    assert len(warnings) == 1 and "can be written by others" in warnings[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_someone_else_is_not_used(call: Call, empty_cache: Path) -> None:
    call()
    folder = kernel_cache.cache_folder()
    assert folder is not None
    os.chown(folder, 12345, 12345)
    assert call()[:2] == (135.0, 0) and kernel_cache.cache_folder() is None


def test_no_place_to_write_to(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for variables in (
        {"CKPTDIFF_CACHE_DIR": str(tmp_path / "file" / "cache")},
        {"CKPTDIFF_CACHE_DIR": "/proc/nowhere"},
        {"CKPTDIFF_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "file")},
        {"CKPTDIFF_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/proc"},
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        result, hits, warnings = call()
        assert (result, hits) == (135.0, 0)
        assert len(warnings) == 1 and "no cache folder can be used" in warnings[0]


def test_a_user_without_a_home(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that /etc/passwd does not know."""
    import pwd

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("CKPTDIFF_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    result, hits, warnings = call()
    assert (result, hits, len(warnings)) == (135.0, 0, 1)


def test_numbas_other_folders_are_never_used(
    call: Call, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba would go on to ``__pycache__`` beside the source, where no hash of the sources guards what is kept."""
    call()
    (folder,) = next(empty_cache.iterdir()).iterdir()
    shutil.rmtree(folder)
    folder.touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    result, hits, warnings = call()
    assert (result, hits) == (135.0, 0)
    assert len(warnings) == 1 and "triple is not cached" in warnings[0]
    assert not list(tmp_path.rglob("*.nbc")) and not list(tmp_path.rglob("*.nbi"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package whose fingerprint is taken instead."""
    copy = tmp_path / "ckptdiff"
    shutil.copytree(Path(ckptdiff.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(kernel_library, "__file__", str(copy / "kernel_library.py"))
    return copy


def imported_by(source: Path, package: Path) -> set[Path]:
    """Modules of the package that a module names in its imports."""
    found = set[Path]()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ckptdiff":
            place = package.joinpath(*node.module.split(".")[1:])
            found |= {place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)}
    return {path for path in found if path.exists()}


def makes_code(source: Path) -> bool:
    """Whether a module declares something that Numba compiles: kernels, steps, intrinsics, overloads."""
    text = source.read_text()
    names = "kernel|helper|intrinsic|overload"
    declared = re.search(rf"^from ckptdiff\.jit import .*\b({names})\b", text, re.MULTILINE)
    return bool(
        declared or re.search(r"^\s*(from|import) (numba|llvmlite\.ir|llvmlite import ir)\b", text, re.MULTILINE)
    )


def test_the_fingerprint_covers_what_machine_code_is_made_of_and_no_more() -> None:
    package = Path(ckptdiff.__file__).parent
    # They call the compiler, keep what it makes, print its version, or say what is wrong.
    apart = {package / name for name in ("kernel_compiler.py", "kernel_cache.py", "doctor.py", "errors.py")}
    needed = {path for path in package.rglob("*.py") if makes_code(path)} - apart
    assert len(needed) > 20
    unseen = list(needed)
    while unseen:
        more = imported_by(unseen.pop(), package) - needed - apart
        needed |= more
        unseen += more
    covered = set(kernel_library.kernel_sources())
    assert needed <= covered
    assert {path.name for path in covered - needed} <= {"__init__.py"}


def test_an_edit_of_any_of_them_counts_and_of_others_none(package: Path) -> None:
    fingerprints = {kernel_cache.fingerprint()}
    for number, source in enumerate(kernel_library.kernel_sources(), 2):
        source.write_text(source.read_text() + "\n# edited\n")
        fingerprints.add(kernel_cache.fingerprint())
        assert len(fingerprints) == number, source
    for other in ("cli/diff.py", "runfile/reader.py", "measure/passes.py", "run/engine.py"):
        (package / other).write_text("# has no kernels")
    assert kernel_cache.fingerprint() in fingerprints


def test_the_installed_numba_is_one_that_was_tried() -> None:
    """Its private parts are used; a release that is not among them is refused by pip."""
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    (numba,) = [Requirement(text) for text in wanted if text.startswith("numba")]
    assert any(clause.operator == "<" for clause in numba.specifier)
    assert numba.specifier.contains(kernel_cache.numba.__version__)
    for name in ("_save_data", "_load_data", "_data_name", "_dump"):
        assert callable(getattr(IndexDataCacheFile, name))
    assert issubclass(FunctionCache, object) and hasattr(kernel_cache.numba.config, "CACHE_DIR")


def test_the_compiler_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernel_cache.fingerprint()
    assert before == kernel_cache.fingerprint()
    monkeypatch.setattr(kernel_cache.numba, "__version__", "99")
    assert kernel_cache.fingerprint() != before


@pytest.mark.parametrize("setting", ["CPU_NAME", "CPU_FEATURES", "ENABLE_PROFILING", "BOUNDSCHECK"])
def test_the_target_counts(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    before = kernel_cache.fingerprint()
    monkeypatch.setattr(kernel_cache.numba.config, setting, "generic")
    assert kernel_cache.fingerprint() != before


def start(code: str, cache: Path, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "CKPTDIFF_CACHE_DIR": str(cache), "CKPTDIFF_KERNELS": "jit"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_processes_that_start_at_once(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    code = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np, ckptdiff.kernel_cache
Path(sys.argv[1], f"ready-{__import__('os').getpid()}").touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 3:
    time.sleep(0.001)
import tiny
print(tiny.triple(np.arange(10.0)), tiny.triple(np.arange(10, dtype=np.float32)), tiny.triple(np.arange(10)))
"""
    cache = tmp_path / "cache"
    processes = [start(code, cache, tmp_path) for _ in range(3)]
    assert [process.communicate(timeout=PATIENCE) for process in processes] == [("135.0 135.0 135.0\n", "")] * 3
    assert len(entries(cache)) == 3 and {entry.suffix for entry in entries(cache)} == {".nbc"}


@pytest.mark.slow
def test_the_kernels_themselves(tmp_path: Path) -> None:
    """An empty cache, a warm one, and one with damaged entries: the same bytes, and it is said."""
    code = """
import numpy as np
from ckptdiff.measure.kernels.cuts import cut_from_bottom, cut_from_top
from ckptdiff.measure.kernels.null import Gaps, fit_null
counts, gap = np.arange(100), np.linspace(1, 2, 100)
gaps = Gaps(gap, gap, np.arange(101))
print(cut_from_top(counts, 0, 99, 500), cut_from_bottom(counts, 0, 99, 500), fit_null(counts, gaps, 0, 99, 2000, 0.0))
"""
    cache = tmp_path / "cache"

    def run() -> tuple[str, str]:
        process = start(code, cache, tmp_path)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        return out, err

    expected, err = run()
    assert err == "" and len(entries(cache)) >= 3
    assert run() == (expected, "")
    smallest = sorted(entries(cache), key=lambda entry: entry.stat().st_size)[:2]
    truncate(smallest[0])
    flip(0.5)(smallest[1])
    out, err = run()
    assert out == expected and err.count("dropped a damaged kernel") == 2


LOADS = """
import sys
from ckptdiff import own_process
{take}
import numpy as np
sys.path.insert(0, sys.argv[1])
import tiny
tiny.triple(np.arange(10.0))
print("scipy.linalg" in sys.modules, "numba.np.arraymath" in sys.modules)
import scipy.linalg.cython_blas  # can be imported all the same
"""


def test_a_command_loads_kernels_without_scipy(tmp_path: Path) -> None:
    """Numba would import scipy.linalg; what a program of someone else gets from Numba stays as it is."""
    (tmp_path / "tiny.py").write_text(TINY)
    cache, library, command = tmp_path / "cache", LOADS.format(take=""), LOADS.format(take="own_process.take_over()")
    for code, loaded in ((library, "True"), (command, "False"), (library, "True")):
        process = start(code, cache, tmp_path)
        assert process.communicate(timeout=PATIENCE) == (f"{loaded} True\n", "")


def test_nothing_is_cached_in_the_package() -> None:
    assert not list(Path(ckptdiff.__file__).parent.rglob("*.nb[ci]"))
