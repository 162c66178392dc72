"""What a machine offers to a first run on a GPU: packages, programs, memory, driver and the GPU itself."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

NEEDED = ("numpy", "numba", "h5py", "rich", "click")
FOR_TESTS = ("pytest", "hypothesis")
ALSO = ("llvmlite", "cupy", "scipy", "torch", "safetensors", "ml_dtypes", "xdist", "pytest_timeout")
Row = dict[str, Any]


def machine_rows() -> Iterator[Row]:
    """Packages, processor, memory, GPU. What is missing is said first, and is an error if ckptdiff needs it."""
    packages = {name: _imported(name) for name in (*NEEDED, *FOR_TESTS, *ALSO)}
    missing = [name for name in NEEDED if packages[name] is None]
    yield {"what": "missing", "found": ", ".join(missing) or "nothing", "wrong": bool(missing)}
    untested = [name for name in FOR_TESTS if packages[name] is None]
    yield {"what": "missing for the tests", "found": ", ".join(untested) or "nothing", "wrong": bool(untested)}
    yield {"what": "packages", "found": ", ".join(f"{name} {found}" for name, found in packages.items() if found)}
    yield {"what": "ckptdiff", "found": str(importlib.util.find_spec("ckptdiff").origin)}  # type: ignore[union-attr]
    for name in ("/dev/shm", tempfile.gettempdir(), str(Path.home())):
        if Path(name).is_dir():
            free, writable = shutil.disk_usage(name).free, os.access(name, os.W_OK)
            yield {"what": name, "found": f"{free >> 30} GiB free{'' if writable else ', cannot be written'}"}
    for program in ("nvidia-smi", "nvcc", "compute-sanitizer", "ncu"):
        yield {"what": program, "found": found_program(program) or "not found"}
    yield from _nvidia_smi()
    if missing:
        return
    from ckptdiff.errors import DeviceError
    from ckptdiff.measure.cuda.choice import find_gpu

    try:
        gpu = find_gpu(0)
        free, total = gpu.free_memory()
    except (DeviceError, MemoryError) as error:
        yield {"what": "GPU", "found": f"none: {error}", "wrong": True}
        return
    facts, runtime = gpu.properties, gpu.cupy.cuda.runtime
    yield {"what": "GPU", "found": facts["name"].decode()}
    yield {"what": "compute capability", "found": f"{facts['major']}.{facts['minor']}"}
    yield {"what": "multiprocessors", "found": gpu.processors}
    yield {"what": "GPU memory", "found": f"{free >> 20} MiB of {total >> 20} free"}
    yield {"what": "CUDA of the driver", "found": runtime.driverGetVersion()}
    yield {"what": "CUDA runtime", "found": runtime.runtimeGetVersion()}


def _imported(name: str) -> str | None:
    """The version of a package that can be imported; large ones are looked at only."""
    try:
        if name not in ("torch", "scipy", "cupy"):
            importlib.import_module(name)
        elif importlib.util.find_spec(name) is None:
            return None
    except ImportError as error:
        return None if isinstance(error, ModuleNotFoundError) and error.name == name else f"BROKEN ({error})"
    owners = metadata.packages_distributions().get(name, ())
    return ", ".join(metadata.version(owner) for owner in sorted(set(owners))) or "of unknown version"


def found_program(name: str) -> str | None:
    """Where a program is, on PATH or where CUDA and its driver are usually installed."""
    usual = ("/usr/local/cuda/bin", "/usr/local/nvidia/bin")
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(usual))


def _nvidia_smi() -> Iterator[Row]:
    """What the driver says of the GPU, without CUDA."""
    program, told = found_program("nvidia-smi"), Path("/proc/driver/nvidia/version")
    names = (
        "driver_version,name,memory.total,memory.used,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,power.limit"
    )
    if program is None:
        yield {"what": "driver", "found": told.read_text().splitlines()[0] if told.exists() else "no nvidia-smi"}
        return
    command = [program, f"--query-gpu={names}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError) as error:
        yield {"what": "driver", "found": f"nvidia-smi failed: {error}"}
        return
    for name, value in zip(names.replace("driver_version", "driver").split(","), found.split(", "), strict=False):
        yield {"what": name, "found": value}
