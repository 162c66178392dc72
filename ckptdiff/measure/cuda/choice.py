"""Tell whether a GPU can be used, and if not, why and what to install."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from typing import Any

from ckptdiff.errors import DeviceError
from ckptdiff.measure.cuda.gpu import CupyGpu, failure

_INSTALL = "pip install 'ckptdiff[cuda13]' (NVIDIA driver 580 or newer) or 'ckptdiff[cuda12]' (525 or newer)"


def cupy_packages() -> list[str]:
    """Installed packages that bring CuPy, with their versions."""
    from importlib.metadata import distributions

    found = {(package.name.lower(), package.version) for package in distributions() if package.name}
    return sorted(f"{name} {version}" for name, version in found if name == "cupy" or name.startswith("cupy-"))


def find_gpu(index: int) -> CupyGpu:
    """Reach a GPU; DeviceError if there is no driver, no CuPy or too many, one that does not load, or no such GPU."""
    if importlib.util.find_spec("cupy") is None:
        raise DeviceError("CuPy is not installed, which the CUDA backend needs", hint=_INSTALL)
    packages = cupy_packages()
    if len(packages) > 1:
        raise DeviceError(
            "several CuPy packages are installed, which overwrite each other",
            expected="one of them",
            found=", ".join(packages),
            hint=f"pip uninstall all of them, then {_INSTALL}",
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise DeviceError(
            "there is no NVIDIA driver on this machine (libcuda.so.1)",
            hint="--device cpu, or install the driver; in a container, start it with access to the GPU",
        ) from None
    cupy = _import_cupy(packages)
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except (ImportError, RuntimeError, OSError) as error:
        raise failure(error, ", ".join(packages)) from error
    if index >= count:
        raise DeviceError(
            "there is no such GPU",
            expected=f"cuda:0 to cuda:{count - 1}" if count else "one that CUDA sees",
            found=f"cuda:{index}",
            hint="see what nvidia-smi lists, and what CUDA_VISIBLE_DEVICES allows; or --device cpu",
        )
    return CupyGpu(index)


def _import_cupy(packages: list[str]) -> Any:
    """Import CuPy, which makes a folder for a cache of its own; nothing of ours goes there."""
    try:
        return importlib.import_module("cupy")
    except OSError as error:
        if error.filename is None:  # a library that does not load
            raise failure(error, ", ".join(packages)) from error
        raise DeviceError(
            "CuPy cannot make its cache folder, and is not imported without it",
            file=error.filename,
            found=error.strerror,
            hint="CUPY_CACHE_DIR=FOLDER in the environment, a folder that can be written to",
        ) from error
    except (ImportError, RuntimeError) as error:
        raise failure(error, ", ".join(packages)) from error
