"""The kernels' source, as one text for NVRTC."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from ckptdiff.backends.formats import FORMATS, Format
from ckptdiff.errors import DeviceError

__all__ = ["NAMES", "compile_kernels", "kernel_folder", "kernel_options", "kernel_source"]

KERNELS = ("harvest", "refine", "scan", "ties")
NAMES = {"bf16": "Bf16", "f16": "F16", "f32": "F32", "f64": "F64", "f8_e4m3": "E4m3", "f8_e5m2": "E5m2"}
"""What the source calls each format."""

_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def kernel_folder() -> Path:
    """Where the source is: in the installed package, or in the clone that is installed as editable."""
    package = Path(str(files("ckptdiff")))
    installed = package / "_cuda"
    return installed if installed.is_dir() else package.parent / "cuda"


def kernel_source(folder: Path | None = None) -> str:
    """All kernels in one text: CuPy names its cache after this text, and would not see a change in an included file.

    Raises
    ------
    FileNotFoundError
        If the package lacks its kernels.
    """
    folder = folder or kernel_folder()
    seen: set[str] = set()

    def text_of(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text().replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda include: text_of(include[1]), text)

    return "\n".join(text_of(f"{kernel}.cu") for kernel in KERNELS)


def kernel_options(base: Format, tuned: Format, compare: Format) -> tuple[str, ...]:
    """Compiler options that choose the formats."""
    chosen = (("BASE", base), ("TUNED", tuned), ("COMPARE", compare))
    return ("-std=c++17", *(f"-D{side}={NAMES[format.name]}" for side, format in chosen))


def compile_kernels(architecture: str, names: tuple[str, str, str] = ("bf16", "bf16", "bf16")) -> bytes:
    """Machine code of the kernels for one pair of formats, by NVRTC; needs CuPy, and no GPU.

    Parameters
    ----------
    architecture : str
        Such as "sm_90".
    names : (base, tuned, compare)
        Formats.

    Raises
    ------
    ImportError, RuntimeError
        If CuPy or NVRTC is missing.
    DeviceError
        If the kernels do not compile.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(kernel_source(), "kernels.cu", (), ())
    try:
        options = kernel_options(*(FORMATS[name] for name in names))
        nvrtc.compileProgram(program, (*options, f"-arch={architecture}"))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise DeviceError(f"the kernels do not compile for {architecture}: {error}", found=log) from error
    finally:
        nvrtc.destroyProgram(program)
