"""Which device a run takes, and what a user reads where there is none."""

import errno
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
from host_gpu import HostGpu

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.errors import DeviceError, OptionError, PlanError
from ckptdiff.measure.cuda import choice
from ckptdiff.measure.cuda.gpu import failure
from ckptdiff.measure.cuda.slots import Room
from ckptdiff.options import Options
from ckptdiff.run.devices import open_device

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def cupy_installed(monkeypatch):
    """Let a package of CuPy be there, and a driver; returns the module to fill in."""
    module = types.ModuleType("cupy")
    module.__spec__ = types.SimpleNamespace(name="cupy")
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(choice, "cupy_packages", lambda: ["cupy-cuda13x 14.2.0"])
    driver_is(monkeypatch, lambda: None)
    return module


def driver_is(monkeypatch, answer):
    """What loading the driver gives; other libraries are loaded."""
    real = choice.ctypes.CDLL
    monkeypatch.setattr(
        choice.ctypes,
        "CDLL",
        lambda name, *how, **more: answer() if name == "libcuda.so.1" else real(name, *how, **more),
    )


def refused(device="cuda"):
    with pytest.raises(DeviceError) as caught:
        open_device(Options(device=device))
    return caught.value


def test_without_cupy_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    error = refused()
    assert "CuPy is not installed" in error.problem
    assert "ckptdiff[cuda13]" in error.hint and "ckptdiff[cuda12]" in error.hint


def test_two_cupy_packages_are_refused(cupy_installed, monkeypatch):
    monkeypatch.setattr(choice, "cupy_packages", lambda: ["cupy-cuda12x 14.2.0", "cupy-cuda13x 14.2.0"])
    error = refused()
    assert "several CuPy packages" in error.problem
    assert "cupy-cuda12x" in error.found and "cupy-cuda13x" in error.found


def test_without_a_driver_nothing_is_imported(cupy_installed, monkeypatch):
    no_driver(cupy_installed, monkeypatch)
    assert "no NVIDIA driver" in refused().problem


def test_an_old_driver_is_named(cupy_installed):
    def count():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")

    cupy_installed.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=count))
    error = refused()
    assert "cudaErrorInsufficientDriver" in error.problem
    assert "update the NVIDIA driver" in error.hint


def test_a_gpu_that_is_not_there_is_named(cupy_installed):
    cupy_installed.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=lambda: 2))
    error = refused("cuda:2")
    assert (error.expected, error.found) == ("cuda:0 to cuda:1", "cuda:2")
    assert "CUDA_VISIBLE_DEVICES" in error.hint


def no_package(module, monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)


def no_driver(module, monkeypatch):
    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    driver_is(monkeypatch, missing)


def answers(count):
    """CuPy is there, and its runtime says how many GPUs there are, or what is wrong."""

    def prepare(module, monkeypatch):
        def devices():
            if isinstance(count, str):
                raise RuntimeError(count)
            return count

        module.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=devices))

    return prepare


@pytest.mark.parametrize(
    ("prepare", "problem", "hint", "found"),
    [
        (no_package, "CuPy is not installed", "pip install 'ckptdiff[cuda13]'", False),
        (no_driver, "there is no NVIDIA driver on this machine", "install the driver", False),
        (
            answers("cudaErrorInsufficientDriver: CUDA driver version is"),
            "InsufficientDriver",
            "update the NVIDIA",
            False,
        ),
        (
            answers("cudaErrorNoDevice: no CUDA-capable device is detected"),
            "NoDevice",
            "whether nvidia-smi lists a GPU",
            False,
        ),
        (answers(0), "there is no such GPU", "what nvidia-smi lists", False),
        (answers(3), "there is no such GPU", "what nvidia-smi lists", True),
    ],
    ids=["no CuPy", "no driver", "old driver", "no device", "none visible", "no device of that number"],
)
def test_what_a_user_reads_without_a_gpu(cupy_installed, monkeypatch, capsys, tmp_path, prepare, problem, hint, found):
    """Asked for, it is an error that says what to do; on its own accord the processor measures, and a note says so."""
    prepare(cupy_installed, monkeypatch)
    sides, out = [str(FIXTURES / "tied" / side) for side in ("base", "tuned")], tmp_path / "run.h5"
    command = ["diff", *sides, "-o", str(out), "--no-progress"]
    assert main([*command, "--device", "cuda:3"]) == 2
    printed, told = capsys.readouterr()
    assert printed == "" and told.startswith("ckptdiff: error: ") and problem in told and hint in told
    assert list(tmp_path.iterdir()) == []
    if found:  # another one
        return
    assert main([*command, "-v", "-O", os.devnull]) == 0
    told = capsys.readouterr().err
    assert "device cpu (no GPU: " in told and problem in told and out.exists()


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A run file, and the sides that it compared."""
    sides = [str(FIXTURES / "llama" / side) for side in ("base", "tuned")]
    path = tmp_path_factory.mktemp("run") / "run.h5"
    ckptdiff.diff(*sides, out=path, device="cpu")
    return path, sides


COMMANDS = {
    "spectra add": ["spectra", "add", "{run}"],
    "claims": ["claims", "{base}", "{tuned}"],
    "lora": ["lora", "{base}", "{tuned}", "-o", "{out}", "--rank", "4"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("prepare", [no_package, no_driver, answers("cudaErrorInsufficientDriver"), answers(3)])
def test_every_other_command_says_it_too(cupy_installed, monkeypatch, capsys, tmp_path, run_file, prepare, command):
    run, (base, tuned) = run_file
    asked = [word.format(run=run, base=base, tuned=tuned, out=tmp_path / "adapter") for word in command]
    prepare(cupy_installed, monkeypatch)
    before = run.read_bytes()
    assert main([*asked, "--no-progress", "--device", "cuda:3"]) == 2
    printed, told = capsys.readouterr()
    assert printed == "" and told.startswith("ckptdiff: error: ") and "  try: " in told
    assert list(tmp_path.iterdir()) == [] and run.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_by_themselves_they_measure_on_the_processor_and_say_so(monkeypatch, capsys, tmp_path, run_file, command):
    run, (base, tuned) = shutil.copy(run_file[0], tmp_path), run_file[1]
    asked = [word.format(run=run, base=base, tuned=tuned, out=tmp_path / "adapter") for word in command]
    no_package(None, monkeypatch)
    assert main([*asked, "--no-progress", "-v"]) in (0, 1)  # 1: the claims do not hold for this pair
    assert "spectra on the processor: CuPy is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("CuPy failed to load libnvrtc.so.13: OSError: libnvrtc.so.13: cannot open", "brings NVRTC"),
        ('Failure finding "libnvrtc.so.13": No such file: libnvrtc.so.13', "brings NVRTC"),
        ('Failure finding "libcublasLt.so.13 or libcublasLt.so.12": No such file: libcublasLt.so.13', "[ctk]"),
        ("Failed to find CUDA headers. Please install it", "[ctk]"),
        ("cudaErrorMemoryAllocation: out of memory", "--gpu-memory"),
        ("CUDA_ERROR_OUT_OF_MEMORY: out of memory", "--gpu-memory"),
        ("cudaErrorInsufficientDriver: CUDA driver version is insufficient", "ckptdiff[cuda12]"),
        ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the provided PTX was compiled with an unsupported toolchain.", "driver"),
        ("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device", "driver"),
        ("cudaErrorInvalidDeviceFunction: invalid device function", "driver"),
        ("cudaErrorNoDevice: no CUDA-capable device is detected", "nvidia-smi"),
        ("cudaErrorInvalidDevice: invalid device ordinal", "CUDA_VISIBLE_DEVICES"),
        ("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable", "another process"),
        ("cudaErrorSystemDriverMismatch: system has unsupported display driver / cuda driver combination", "driver"),
        ("cudaErrorUnknown: unknown error", "dmesg"),
        ("cudaErrorSystemNotReady: system not yet initialized", "fabric manager"),
        ("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure", "run it again"),
        ("cudaErrorIllegalAddress: an illegal memory access was encountered", "run it again"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered", "run it again"),
        ("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many resources requested for launch", "run it again"),
        ("libcudart.so.13: cannot open shared object file: No such file or directory", "install CuPy anew"),
        ("cudaErrorECCUncorrectable: uncorrectable ECC error encountered", "dmesg"),
        ("CUDA_ERROR_UNKNOWN: unknown error", "dmesg"),
        ("", "dmesg"),
    ],
)
def test_failures_of_a_gpu_say_what_helps(text, hint):
    error = failure(RuntimeError(text), "cuda:0")
    assert hint in error.hint
    assert (text or "RuntimeError") in error.problem


def test_a_message_of_several_lines_is_cut_to_the_first_that_says_something():
    error = failure(ImportError("\n=========\nFailed to import CuPy.\n\nOriginal error:\n  ..."), "cupy-cuda13x 14.2.0")
    assert error.problem == "the GPU failed: Failed to import CuPy."
    assert "install CuPy anew" in error.hint


def test_a_home_that_cannot_be_written_to_is_named(cupy_installed, monkeypatch):
    def refuse(name):
        raise PermissionError(errno.EACCES, "Permission denied", "/nonexistent/.cupy")

    monkeypatch.setattr(choice.importlib, "import_module", refuse)
    error = refused()
    assert error.file == "/nonexistent/.cupy"
    assert "CUPY_CACHE_DIR" in error.hint


@pytest.mark.nvrtc
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is missing")
def test_cupy_itself_where_home_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    code = "from ckptdiff.measure.cuda.choice import _import_cupy; _import_cupy([])"
    environment = {**os.environ, "HOME": str(tmp_path / "file")}
    environment.pop("CUPY_CACHE_DIR", None)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 1 and "CUPY_CACHE_DIR=FOLDER" in found.stderr
    environment["CUPY_CACHE_DIR"] = str(tmp_path / "cache")
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_auto_takes_the_processor_and_says_why(monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    device = open_device(Options())
    assert device.name == "cpu"
    assert "CuPy is not installed" in device.note
    assert open_device(Options(device="cpu")).note == ""


class Reachable(HostGpu):
    name = "cuda:0"

    def free_memory(self):
        return 1 << 30, 2 << 30


@pytest.fixture
def gpu_found(libraries, monkeypatch):
    monkeypatch.setattr("ckptdiff.measure.cuda.choice.find_gpu", lambda index: Reachable(libraries))


def test_auto_takes_a_gpu_on_which_a_kernel_ran(gpu_found):
    device = open_device(Options(threads=4))
    assert (device.name, device.threads) == ("cuda:0", 4)
    assert device.scratch(1) > 1 << 20


def test_gpu_memory_bounds_the_threads(gpu_found):
    assert open_device(Options(threads=4, gpu_memory=60 << 20)).threads == 2


def test_what_a_dry_run_projects_is_kept(libraries, monkeypatch, capsys, tmp_path):
    held, peak = [0], [0]

    def freed(size):
        held[0] -= size

    class Counting(Reachable):
        def __init__(self, index):
            super().__init__(libraries, processors=1)

        def empty(self, size):
            memory = super().empty(size)
            weakref.finalize(memory, freed, size)
            held[0] += size
            peak[0] = max(peak[0], held[0])
            return memory

    monkeypatch.setattr("ckptdiff.measure.cuda.choice.find_gpu", Counting)
    monkeypatch.setattr("ckptdiff.measure.cuda.gpu.CupyGpu", Counting)
    sides = [str(FIXTURES / "moe" / side) for side in ("base", "tuned")]
    command = ["diff", *sides, "--no-progress", "--device", "cuda", "--gpu-memory", "150M", "--threads", "2"]
    plans = []
    for how in ("json", "table"):
        assert main([*command, "--dry-run", "--format", how]) == 0
        plans.append(capsys.readouterr().out)
    plan = json.loads(plans[0])
    assert (plan["device"], plan["threads"], plan["gpu_memory"]) == ("cuda:0", 2, 150 << 20)
    assert plan["projected_gpu_memory"] == 2 * Room(2 << 20, 16).gpu_bytes <= plan["gpu_memory"]
    assert "on cuda:0, 109 MiB of its memory at most, of 150 MiB allowed\n" in plans[1]
    peak[0] = held[0]
    assert main([*command, "-o", str(tmp_path / "run.h5"), "-O", os.devnull]) == 0
    assert Room.smallest().gpu_bytes < peak[0] <= plan["projected_gpu_memory"]
    assert main(["diff", *sides, "--device", "cpu", "--dry-run", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["device"], plan["projected_gpu_memory"], plan["gpu_memory"]) == ("cpu", 0, 0)


def test_auto_leaves_a_gpu_that_is_full(gpu_found, monkeypatch):
    monkeypatch.setattr(Reachable, "free_memory", lambda self: (1 << 20, 1 << 30))
    assert "GPU memory" in open_device(Options()).note
    with pytest.raises(PlanError, match="GPU memory"):
        open_device(Options(device="cuda"))


def test_a_gpu_that_computes_wrong_figures_is_refused(gpu_found, monkeypatch):
    monkeypatch.setattr("ckptdiff.measure.self_test.wrong_figures", lambda backend: "mask of bf16-bf16-bf16")
    assert "wrong figures" in refused().problem
    assert "wrong figures" in open_device(Options()).note


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 is told here to flush to zero")
@pytest.mark.parametrize("name", ["f16", "f8_e4m3", "f8_e5m2"])
def test_a_gpu_that_flushes_to_zero_is_refused(libraries, gpu_found, name):
    with libraries(name, name, name).flushing():
        error = refused()
    assert "wrong figures" in error.problem
    assert "deltas" in error.found and error.found.endswith(f" of {name}-{name}-{name}")
    assert error.found.count(" of ") == 1


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "cuda:-1", ""])
def test_unknown_devices_are_refused(name):
    with pytest.raises(OptionError, match="unknown value of device"):
        Options(device=name)


def test_a_run_on_a_missing_gpu_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError):
        ckptdiff.diff(FIXTURES / "tied/base", FIXTURES / "tied/tuned", out=tmp_path / "run.h5", device="cuda:0")
    assert list(tmp_path.iterdir()) == []


def test_a_negative_bound_is_refused():
    with pytest.raises(OptionError, match="negative memory bound"):
        Options(gpu_memory=-1)
    with pytest.raises(OptionError, match="not a size"):
        ckptdiff.diff("a", "b", gpu_memory="much")
