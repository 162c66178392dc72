"""Kernels that were built with the package: called as Numba would call them, without it, and checked before use."""

from __future__ import annotations

import logging
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE

import ckptdiff
from ckptdiff import kernel_compiler, kernel_library
from ckptdiff.errors import OptionError
from ckptdiff.kernel_library import (
    LEVELS,
    UnlistedTypeError,
    flatten,
    has_level,
    marked,
    open_library,
    path_of,
    processor_level,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "addition"
HAS = [level for level in LEVELS if has_level(level)]


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


COMMANDS = "run.engine cli.diff spectra.stage lora.extract track.follow overlap.combine patch.make exports.apply"


@pytest.mark.parametrize("modules", [COMMANDS, "retrain.optimizer retrain.freezing"], ids=["commands", "retrain"])
def test_nothing_imports_numba(modules: str) -> None:
    """It takes half a second and 70 MB, and what is built does without."""
    done = python(
        f"import sys; import {', '.join(f'ckptdiff.{name}' for name in modules.split())}; print(*sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert "ckptdiff.jit" in done.stdout.split()
    assert {"numba", "llvmlite", "scipy"}.isdisjoint(done.stdout.split())


class Two(NamedTuple):
    left: Any
    right: Any


SCALARS = [True, 1, -1, 1.5, None, np.bool_(True), *(np.dtype(char).type(1) for char in "bBhHiIlLfd"), 2**63]
DTYPES = [*(np.dtype(char) for char in "?bBhHiIlLfd"), np.dtype([("a", "i8"), ("b", "i4")]), np.dtype([("b", "i8")])]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Of any layout: whole, transposed, sliced, read-only, with rows of one or none."""
    array = np.zeros(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)), draw(st.sampled_from(DTYPES)))
    array = array.T if draw(st.booleans()) else array
    array = array[:: draw(st.sampled_from([1, 2]))]
    array.flags.writeable = draw(st.booleans())
    return array


ARGUMENTS = st.recursive(
    st.sampled_from(SCALARS) | arrays(),
    lambda inner: st.tuples(inner) | st.tuples(inner, inner) | st.builds(Two, inner, inner),
)


def key_of(value: Any) -> list[Any]:
    key: list[Any] = []
    flatten((value,), key, [])
    return key


def without_names(kind: Any) -> Any:
    """A type of Numba's in which a tuple is one, whatever its fields are called: their memory is the same."""
    if isinstance(kind, numba.types.BaseTuple):
        return tuple(map(without_names, kind))
    return kind


@given(ARGUMENTS, ARGUMENTS)
def test_types_are_told_apart_as_numba_does(left: Any, right: Any) -> None:
    same = without_names(numba.typeof(left)) == without_names(numba.typeof(right))
    assert (key_of(left) == key_of(right)) == same
    assert key_of(left) == key_of(left)


@pytest.mark.parametrize("value", ["text", 1j, np.float16(1), [1], {}, np.ma.masked_array([1])])
def test_what_no_kernel_takes_is_left_to_numba(value: Any) -> None:
    with pytest.raises(UnlistedTypeError):
        key_of(value)


Open = Callable[[bytes], str]


@pytest.fixture
def opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Open:
    """Open a library of some bytes, which is not used; what is said then."""

    def refused(data: bytes) -> str:
        path = tmp_path / path_of(processor_level()).name
        path.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.INFO, "ckptdiff"):
            assert open_library(tmp_path, "") is None
        (said,) = caplog.messages
        assert said.startswith(f"kernels are compiled on the spot, {path} cannot be used: ")
        return said

    return refused


def test_a_library_that_does_not_fit_is_said(opened: Open) -> None:
    other = 183 if platform.machine() == "x86_64" else 62  # ARM's, and that of x86-64
    whole = marked(b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHI", 3, other, 1) + bytes(99))
    assert "cannot open shared object file" in opened(whole)
    for cut in (b"", whole[:10], whole[:-1], whole[:-90]):
        assert "its end was cut off" in opened(cut)
    for place in (0, 10, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        assert "it is damaged" in opened(bytes(flipped))


def test_a_library_of_other_sources_is_said(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptdiff import kernel_library

    with monkeypatch.context() as patch:
        patch.setattr(kernel_library, "sources_hash", lambda: bytes(32))
        stale = marked(b"code")
    assert "built of other sources" in opened(stale)


def test_what_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_library(tmp_path, "") is None and open_library(tmp_path, "jit") is None
    assert caplog.messages == []
    assert open_library(tmp_path, "v2") is None
    assert len(caplog.messages) == 1
    caplog.clear()
    other = tmp_path / f"{platform.machine()}-v9.so"
    other.touch()
    assert open_library(tmp_path, "") is None
    assert "is for another processor" in caplog.text
    with pytest.raises(SystemExit, match="no level v9"):
        kernel_compiler.main("v2,v9", str(tmp_path))
    monkeypatch.setattr(kernel_library, "processor_flags", frozenset)
    with pytest.raises(SystemExit, match="none of v4 runs"):
        kernel_compiler.main("v4", str(tmp_path))
    with pytest.raises(OptionError, match="v5"):
        open_library(tmp_path, "v5")


def test_a_level_that_is_none_ends_a_command(tmp_path: Path) -> None:
    code = "import sys; from ckptdiff.cli import main; sys.exit(main())"
    sides = [str(FIXTURE / side) for side in ("base", "tuned")]
    done = python(code, "diff", *sides, "-o", str(tmp_path / "run.h5"), CKPTDIFF_KERNELS="v5")
    assert done.returncode == 2 and "CKPTDIFF_KERNELS is 'v5', not one of v4, v3, v2 and jit" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_libraries_of_another_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTDIFF_KERNELS", str(tmp_path))
    opened = kernel_library.library.__wrapped__
    assert opened() is None and caplog.messages == []
    path = tmp_path / path_of(processor_level()).name
    path.touch()
    assert opened() is None and f"{path} cannot be used" in caplog.text
    monkeypatch.setenv("CKPTDIFF_KERNELS", str(path / "nowhere"))
    with pytest.raises(OptionError, match=r"nowhere', and there is no such folder"):
        opened()


@pytest.mark.slow
def test_without_a_compiler_a_wheel_is_pure_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=FIXTURE.parents[1],
        env={name: value for name, value in os.environ.items() if name != "CC"} | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == [f"ckptdiff-{ckptdiff.__version__}-py3-none-any.whl"]
    assert "there is no C compiler to link kernels with" in done.stderr
    assert "no kernels were compiled: each run compiles those it needs, and keeps them" in done.stderr


@pytest.mark.slow
def test_what_is_built_takes_no_more_than_a_build_has() -> None:
    """The calls that are made for it, where nothing is installed but what hatch_build.py asks for."""
    code = """
import sys
for name in ("torch", "scipy", "rich", "click", "safetensors", "xxhash", "zstandard", "threadpoolctl"):
    sys.modules[name] = None
from ckptdiff.kernel_compiler import RARE, USES
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.run.warm_up import make_call
for use in (*USES, *RARE):
    make_call(CpuBackend(), use)
import numba
assert numba.njit(lambda x: 3 * x)(2) == 6
print("made", len(USES))
"""
    done = python(code)
    assert done.returncode == 0 and done.stdout.startswith("made"), done.stderr


BUILD = """
import sys
from pathlib import Path
from ckptdiff.kernel_compiler import compile_library
from ckptdiff.kernel_library import path_of

level, folder, *uses = sys.argv[1:]
found = compile_library(level, Path(folder, path_of(level).name), uses=[tuple(use.split()) for use in uses])
print(*sorted({one.name for one in found}))
"""
OPENED = """
import sys
from pathlib import Path
from ckptdiff import kernel_library

level, folder = sys.argv[1:3]
opened = kernel_library.open_library(Path(folder), level)
assert opened is not None
kernel_library.library = lambda: opened
"""
CALL = f"""{OPENED}
import numpy as np
from ckptdiff.formats import round_to_bf16
from ckptdiff.spectra.kernels.panels import cast_to_bf16

codes = np.random.default_rng(0).integers(0, 1 << 32, 70_001, np.uint32)
codes.flags.writeable = False
out = np.zeros_like(codes)
assert cast_to_bf16(codes, out) is None
assert (out == round_to_bf16(codes).astype(np.uint32) << 16).all()
print("numba" in sys.modules)
"""
DIFF = f"""{OPENED}
from ckptdiff.cli import main

sys.argv[1:3] = []
code = main()
print("numba" in sys.modules)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS, reason="levels are those of x86-64")
def test_a_built_kernel_is_called_without_numba(tmp_path: Path, opened: Open) -> None:
    for level in HAS:
        done = python(BUILD, level, str(tmp_path), "panel f32 bf16")
        assert done.stdout == "cast_to_bf16\n", done.stderr
        done = python(CALL, level, str(tmp_path))
        assert done.stdout == "False\n", done.stderr
    whole = (tmp_path / path_of(HAS[0]).name).read_bytes()
    assert "its end was cut off" in opened(whole[:-1000])


@pytest.mark.slow
@pytest.mark.skipif(not HAS, reason="levels are those of x86-64")
def test_a_command_runs_without_numba(tmp_path: Path) -> None:
    """And prints what it prints with kernels that were compiled on the spot."""
    done = python(BUILD, HAS[0], str(tmp_path), "alone bf16 bf16 bf16", "refine bf16 bf16 bf16", "mask 4096", "row")
    assert "scan_span" in done.stdout.split(), done.stderr
    words = ["diff", *(str(FIXTURE / side) for side in ("base", "tuned")), "-o", str(tmp_path / "run.h5")]
    built = python(DIFF, HAS[0], str(tmp_path), *words)
    assert built.returncode == 0, built.stderr
    report, _, last = built.stdout.rstrip().rpartition("\n")
    assert last == "False"
    main = "import sys; from ckptdiff.cli import main; sys.exit(main())"
    assert report == python(main, *words, CKPTDIFF_KERNELS="jit").stdout.rstrip()


EVERY = """
import hashlib, sys
import numpy as np
from ckptdiff import jit
from ckptdiff.kernel_compiler import Recorder, set_target

set_target(sys.argv[1])
from ckptdiff.formats import FORMATS, round_to_bf16
from ckptdiff.measure.cpu import CpuBackend
from ckptdiff.measure.partial import Partial, Rule, Scan
from ckptdiff.measure.source import InMemory
from ckptdiff.measure.thresholds import EPS, ETA
from ckptdiff.retrain.kernels.masked_steps import ADAMW, MASKED, masked_steps, sum_masked_squares

jit.recorder.set(Recorder(sys.argv[1]))
rng, numel = np.random.default_rng(0), 200_003
base = 0.05 * rng.standard_normal(numel)
tuned = base + 1e-4 * rng.standard_normal(numel) * (rng.random(numel) < 0.3)


def told(name, array):
    print(name, hashlib.sha256(np.ascontiguousarray(array)).hexdigest())


def stored(side, name):
    single = side.astype(np.float32)
    return round_to_bf16(single.view(np.uint32)) if name == "bf16" else side.astype(f"f{int(name[1:]) // 8}")


# As bfloat16, then as stored; all but the first of the former are one kernel.
for name, compare in (*((name, "bf16") for name in ("bf16", "f16", "f32", "f64")), ("f32", "f32"), ("f64", "f64")):
    scan = Scan(FORMATS[name], FORMATS[name], FORMATS[compare], EPS, ETA, Rule.BITWISE, want_mask=True)
    partial, sides = Partial(), [stored(side, name).view(np.uint8) for side in (base, tuned)]
    mask = CpuBackend().scan(scan, InMemory(*sides, numel), partial)
    for part in ("counts", "within", "weights", "deltas", "ulp", "max_abs", "sums"):
        told(part, getattr(partial, part))
    told("mask", mask)
values, gradients, state = base.astype(np.float32), tuned.astype(np.float32), np.zeros((2, numel), np.float32)
masked = np.flatnonzero(base != tuned)
positions, starts = (masked & 0xFFFF).astype(np.uint16), np.searchsorted(masked, np.arange(5) << 16)
row = np.zeros(1, MASKED)
row["values"], row["gradients"], row["positions"], row["starts"], row["first"], row["second"] = (
    array.ctypes.data for array in (values, gradients, positions, starts, *state)
)
row["numel"], row["masked"], row["rule"], row["end"] = numel, masked.size, ADAMW, 1
constants, sums = np.array([[0.999, 0.1, 0.999, 0.001, 1e-8, 1e-3]], np.float32), np.zeros(1)
masked_steps(row, constants, np.zeros(1, np.int64))
sum_masked_squares(row, sums, np.zeros(1, np.int64))
for part in (values, state, sums):
    told("step", part)
"""


@pytest.mark.slow
@pytest.mark.skipif(len(HAS) < 2, reason="this processor has no two levels of x86-64")
def test_every_level_finds_the_same() -> None:
    """Bit by bit: counts, masks, histograms, and sums, whose order is in ``codes/ordered_sums.py``."""
    found = []
    for level in HAS:
        done = python(EVERY, level)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.splitlines())
    assert len(found[0]) == 6 * 8 + 3 and all(one == found[0] for one in found)
