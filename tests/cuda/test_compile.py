"""The kernels for real architectures: by nvcc without a warning, spill or stack, by NVRTC as users compile them."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host_kernels import HERE, KERNELS

from ckptdiff.formats import FORMATS, compare_format
from ckptdiff.measure.cuda import compiled
from ckptdiff.measure.cuda.compiled import (
    KERNEL_NAMES,
    NAMES,
    architecture_for,
    compile_kernels,
    kernel_folder,
    kernel_options,
    kernel_source,
)

ARCHITECTURES = (75, 80, 90, 100)
MOST_REGISTERS = 64
USE = re.compile(
    r"entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def nvcc(names: tuple[str, ...]) -> list[dict[str, str]]:
    """Compile for every architecture; returns what each kernel uses."""
    formats = zip(("BASE", "TUNED", "COMPARE"), names, strict=True)
    defines = [f"-D{side}={NAMES[name]}" for side, name in formats]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    strict = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    command = ["nvcc", "-std=c++17", "-fatbin", "--threads=2", *targets, *strict, f"-I{KERNELS}", *defines]
    built = subprocess.run(
        [*command, "-o", "/dev/null", HERE / "host" / "every_kernel.cu"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return [found.groupdict() for found in USE.finditer(built.stderr)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing: spills and registers are not checked")
@pytest.mark.parametrize(
    "names", [("bf16", "bf16", "bf16"), ("f32", "f32", "bf16"), ("f64", "f32", "bf16")], ids="-".join
)
def test_kernels_fit_their_registers(names):
    uses = nvcc(names)
    assert len(uses) == len(KERNEL_NAMES) * len(ARCHITECTURES)
    for use in uses:
        print(*names, *(f"{key} {value}" for key, value in use.items()))
        assert int(use["registers"]) <= MOST_REGISTERS
        assert use["stack"] == use["stores"] == use["loads"] == "0"


@pytest.fixture(scope="module")
def nvrtc():
    """The compiler that users have, which needs no GPU."""
    try:
        library = compiled._nvrtc()
        library.getVersion()
    except ImportError as error:
        pytest.skip(f"CuPy is missing: {error}")
    except RuntimeError as error:
        pytest.skip(f"NVRTC is missing: {error}")
    return library


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    ("architecture", "names"),
    [("sm_90", ("bf16", "bf16", "bf16")), ("sm_75", ("f8_e4m3", "f64", "f64")), ("sm_100", ("f16", "f16", "bf16"))],
)
def test_nvrtc_compiles_the_source_without_a_gpu(nvrtc, architecture, names):
    assert architecture_for(*divmod(int(architecture[3:]), 10)) == architecture
    cubin = compile_kernels(architecture, names)
    for kernel in KERNEL_NAMES:
        assert b"\0" + kernel.encode() + b"\0" in cubin


def every_pair_of_formats():
    """All that a run can ask for: each two stored formats, compared in each way."""
    pairs = [(base, tuned, way) for base in FORMATS for tuned in FORMATS for way in ("bf16", "stored")]
    named = [(base, tuned, compare_format(FORMATS[base], FORMATS[tuned], way).name) for base, tuned, way in pairs]
    return sorted(set(named))


INEXACT = re.compile(r"\b\w+(?:\.\w+)*\.(?:ftz|approx|full)(?:\.\w+)*")
"""An instruction that flushes subnormal numbers, or comes near a quotient or root only."""


@pytest.mark.slow
@pytest.mark.nvrtc
def test_every_pair_is_compiled_to_exact_arithmetic(nvrtc):
    names = every_pair_of_formats()
    assert len(names) == 63
    with ThreadPoolExecutor(2) as pool:
        for pair, ptx in zip(names, pool.map(lambda pair: compile_kernels("compute_90", pair), names), strict=True):
            text = ptx.decode()
            assert "cvt.f64.f32" in text or pair == ("f64", "f64", "f64"), pair
            assert INEXACT.findall(text) == [], pair


@pytest.mark.nvrtc
def test_arithmetic_that_is_not_exact_would_be_seen(nvrtc, monkeypatch):
    monkeypatch.setattr(compiled, "kernel_options", lambda *formats: (*kernel_options(*formats), "-ftz=true"))
    found = set(INEXACT.findall(compile_kernels("compute_90", ("f16", "f16", "f16")).decode()))
    assert {"mul.ftz.f32", "sub.ftz.f32", "cvt.ftz.f64.f32"} <= found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing: what it makes of our options is not checked")
@pytest.mark.parametrize("name", ["f16", "f8_e4m3"])
def test_nvcc_makes_exact_arithmetic_of_the_same_source_and_options(tmp_path, name):
    (tmp_path / "kernels.cu").write_text(kernel_source())
    options = kernel_options(*[FORMATS[name]] * 3)
    command = ["nvcc", "-ptx", "-arch=compute_90", *options, "-o", "kernels.ptx", "kernels.cu"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    ptx = (tmp_path / "kernels.ptx").read_text()
    assert "sub.f32" in ptx and "cvt.f64.f32" in ptx
    assert INEXACT.findall(ptx) == []


def test_the_source_is_whole():
    source = kernel_source()
    assert kernel_folder() == KERNELS.resolve()
    assert "#include" not in source
    for path in KERNELS.glob("*.cu*"):
        body = [
            line for line in path.read_text().splitlines() if line and not line.startswith(("#include", "#pragma o"))
        ]
        assert source.count("\n".join(body[-3:])) == 1, path


if __name__ == "__main__":  # a table of all that is built anywhere: python tests/cuda/test_compile.py
    sys.path.insert(0, str(Path(__file__).parent))
    from host_kernels import TESTED

    for every in TESTED:
        for one in nvcc(every):
            print("-".join(every).ljust(24), *(f"{key} {value}".ljust(18) for key, value in one.items()))
