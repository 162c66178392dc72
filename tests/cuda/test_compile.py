"""The kernels for real architectures: by nvcc without a warning, spill or stack, by NVRTC as users compile them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from host_kernels import HERE, KERNELS

from ckptdiff.backends.cuda.source import NAMES, compile_kernels, kernel_folder, kernel_source

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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing: spills and registers are not checked")
@pytest.mark.parametrize("names", [("bf16", "bf16", "bf16"), ("f64", "f32", "bf16")], ids="-".join)
def test_kernels_fit_their_registers(names):
    uses = nvcc(names)
    assert len(uses) == 5 * len(ARCHITECTURES)
    for use in uses:
        print(*names, *(f"{key} {value}" for key, value in use.items()))
        assert int(use["registers"]) <= MOST_REGISTERS
        assert use["stack"] == use["stores"] == use["loads"] == "0"


@pytest.mark.nvrtc
@pytest.mark.parametrize("names", [("bf16", "bf16", "bf16"), ("f8_e4m3", "f64", "f64")], ids="-".join)
def test_nvrtc_compiles_the_source_without_a_gpu(names):
    try:
        cubin = compile_kernels("sm_90", names)
    except ImportError as error:
        pytest.skip(f"CuPy is missing: {error}")
    except RuntimeError as error:
        pytest.skip(f"NVRTC is missing: {error}")
    for kernel in (b"scan", b"refine", b"harvest", b"place_ties", b"take_ties"):
        assert b"\0" + kernel + b"\0" in cubin


@pytest.mark.nvrtc
def test_cupy_has_what_the_backend_calls():
    cupy = pytest.importorskip("cupy", reason="CuPy is missing")
    called = {
        cupy: ("RawModule", "empty", "uint8"),
        cupy.RawModule: ("get_function",),
        cupy.cuda: ("Device", "Event", "MemoryPointer", "Stream", "alloc_pinned_memory", "compiler", "runtime"),
        cupy.cuda.MemoryPointer: ("copy_from_host_async", "copy_to_host_async", "memset_async"),
        cupy.cuda.Stream: ("wait_event", "__enter__"),
        cupy.cuda.Event: ("record", "synchronize"),
        cupy.cuda.Device: ("use",),
        cupy.cuda.compiler: ("CompileException",),
        cupy.cuda.runtime: ("getDeviceCount", "getDeviceProperties", "memGetInfo", "driverGetVersion"),
    }
    for owner, names in called.items():
        assert [name for name in names if not hasattr(owner, name)] == [], owner


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
