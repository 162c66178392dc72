"""Find out what this machine offers, and whether it computes what it should: the facts behind ``ckptdiff doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import ckptdiff
from ckptdiff.errors import DeviceError, OptionError, PlanError
from ckptdiff.events import ignore
from ckptdiff.options import Options, default_threads
from ckptdiff.report.text import binary_size

_PACKAGES = ("numpy", "numba", "llvmlite", "h5py", "rich", "click", "safetensors", "torch", "pyarrow")


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    value: str
    ok: bool = True
    """Whether it is as it should be; a GPU that is not there is no fault."""


def examine() -> Iterator[Finding]:
    """Look at versions, processor, caches and GPU, and try every backend on a small pair."""
    yield Finding("ckptdiff", ckptdiff.__version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("packages", ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name))))
    yield from _processor()
    yield from _gpu()


def _processor() -> Iterator[Finding]:
    import llvmlite.binding

    from ckptdiff.kernel_cache import cache_folder
    from ckptdiff.kernel_library import kernels_in_use
    from ckptdiff.measure.cpu import CpuBackend

    features = {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}
    vectors = [name for name in ("avx2", "avx512f", "avx512bw", "neon", "sve") if name in features]
    yield Finding("processor", f"{llvmlite.binding.get_host_cpu_name()}, {', '.join(vectors) or 'no wide vectors'}")
    yield Finding("threads", f"{default_threads()} by default, {os.cpu_count()} cores")
    yield Finding("kernels", kernels_in_use())
    folder = cache_folder()
    yield Finding("kernel cache", str(folder or "none: kernels are compiled in every process"), folder is not None)
    yield _tried("self-test, cpu", CpuBackend())


def _gpu() -> Iterator[Finding]:
    from ckptdiff.measure.cuda.backend import CudaBackend
    from ckptdiff.measure.cuda.choice import cupy_packages, find_gpu
    from ckptdiff.measure.cuda.compiled import compiled_folder, kernel_folder
    from ckptdiff.measure.cuda.slots import Room

    packages = cupy_packages()
    yield Finding("CuPy", ", ".join(packages) or "not installed", len(packages) < 2)
    yield Finding("CUDA kernels", str(kernel_folder()), kernel_folder().is_dir())
    if importlib.util.find_spec("cupy") is not None:
        yield _nvrtc()
        kept = compiled_folder()
        yield Finding("compiled for GPUs", str(kept or "none: kernels are compiled in every process"), kept is not None)
    try:
        gpu = find_gpu(0)
        major, minor = gpu.properties["major"], gpu.properties["minor"]
        free, total = gpu.free_memory()
        yield Finding("GPU", f"{gpu.properties['name'].decode()}, sm_{major}{minor}, {gpu.processors} multiprocessors")
        yield Finding("GPU memory", f"{binary_size(free)} of {binary_size(total)} free")
        driver = gpu.cupy.cuda.runtime.driverGetVersion()
        yield Finding("NVIDIA driver", f"for CUDA {driver // 1000}.{driver % 1000 // 10}")
        yield _tried("self-test, cuda", CudaBackend(gpu, Room()))
        yield _spectra()
    except (DeviceError, MemoryError) as error:
        problem = error.problem if isinstance(error, DeviceError) else "too little GPU memory"
        hint = f"; try: {error.hint}" if isinstance(error, DeviceError) and error.hint else ""
        yield Finding("GPU", f"none: {problem}{hint}", ok=len(packages) < 2)


def _spectra() -> Finding:
    """Whether a GPU finds the spectra that the processor finds; without SciPy there are none."""
    from ckptdiff.linalg.blas import require_scipy
    from ckptdiff.spectra.spectra_gpu import open_spectra_gpu

    try:
        require_scipy()
        open_spectra_gpu(Options(device="cuda:0"), "randomized", ignore)
    except (OptionError, PlanError) as error:
        return Finding("spectra, cuda", f"not tried: {error.problem}")
    except DeviceError as error:
        found = f" ({error.found})" if error.found else ""
        return Finding("spectra, cuda", f"no: {error.problem}{found}; try: {error.hint}", ok=False)
    return Finding("spectra, cuda", "as near to the processor's as their error allows")


def _nvrtc() -> Finding:
    """Whether the kernels compile, by what compiles them for a run; no GPU is needed for that."""
    from ckptdiff.measure.cuda.compiled import architecture_for, compile_kernels

    try:
        architecture = architecture_for(9, 0)
        size = len(compile_kernels(architecture))
    except (ImportError, RuntimeError, OSError, DeviceError) as error:
        return Finding("kernels compile", f"no: {str(error).splitlines()[0]}", ok=False)
    return Finding("kernels compile", f"yes, by NVRTC, for {architecture} ({size >> 10} KiB)")


def _tried(name: str, backend: Any) -> Finding:
    from ckptdiff.measure.self_test import wrong_figures

    wrong = wrong_figures(backend)
    return Finding(name, f"WRONG: {wrong}" if wrong else "equal to the reference", not wrong)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
