"""Join the kernels' source into one text, compile it for a GPU by NVRTC, and keep what comes of it.

CuPy would compile them too, but it lets every kernel flush subnormal numbers to zero, whatever options it is given, and
looks for CUDA's headers first, which nothing here includes. So NVRTC is called directly, and CuPy loads the result.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptdiff.errors import DeviceError
from ckptdiff.formats import FORMATS, Format
from ckptdiff.kernel_library import private_folder

KERNELS = ("decode", "harvest", "refine", "scan", "spectra", "ties")
SPECTRA_KERNELS = tuple(
    f"{name}_{real}" for name in ("panel", "magnitudes", "scores", "squares") for real in ("float32", "float64")
)
KERNEL_NAMES = ("decode", "scan", "refine", "harvest", "place_ties", "take_ties", *SPECTRA_KERNELS)
"""What can be launched."""
NAMES = {"bf16": "Bf16", "f16": "F16", "f32": "F32", "f64": "F64", "f8_e4m3": "E4m3", "f8_e5m2": "E5m2"}
"""What the source calls each format."""
THREADS = 512
"""Threads of a block, as the kernels are compiled."""
_EXACT = ("-ftz=false", "-prec-div=true", "-prec-sqrt=true")
"""Subnormal numbers stay what they are: most codes of float8 become subnormal float32 on the way to their values."""

_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
_CHECKSUM = 32
"""Bytes of the checksum that stands before the machine code in a file."""

logger = logging.getLogger("ckptdiff.cuda")


def kernel_folder() -> Path:
    """Where the source is: in the installed package, or in the clone that is installed as editable."""
    package = Path(__file__).parents[2]
    installed = package / "_cuda"
    return installed if installed.is_dir() else package.parent / "cuda"


def kernel_source(folder: Path | None = None) -> str:
    """All kernels in one text, which includes nothing: NVRTC needs no folder of headers, and a hash of it sees all."""
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
    """Options of NVRTC, and of nvcc, but for the architecture."""
    chosen = (("BASE", base), ("TUNED", tuned), ("COMPARE", compare))
    formats = (f"-D{side}={NAMES[format.name]}" for side, format in chosen)
    return ("-std=c++17", *_EXACT, f"-DTHREADS={THREADS}", *formats)


def architecture_for(major: int, minor: int) -> str:
    """What NVRTC compiles for, so that a GPU of this compute capability can run it.

    "sm_90" is machine code of just this architecture. "compute_90" is an intermediate language (PTX) that the driver
    makes machine code of, for a GPU that is newer than NVRTC. Without CuPy or NVRTC this raises ImportError or
    RuntimeError, and DeviceError if the GPU is older than what NVRTC still knows.
    """
    nvrtc, own = _nvrtc(), 10 * major + minor
    known = nvrtc.getSupportedArchs()
    if own in known:
        return f"sm_{own}"
    older = [architecture for architecture in known if architecture < own]
    if not older:
        raise DeviceError(
            f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))} does not compile for a GPU as old as this one",
            expected=f"sm_{min(known)} or newer",
            found=f"sm_{own}",
            hint="ckptdiff[cuda12] in the place of ckptdiff[cuda13], or --device cpu",
        )
    return f"compute_{max(older)}"


def compile_kernels(architecture: str, names: tuple[str, str, str] = ("bf16", "bf16", "bf16")) -> bytes:
    """The kernels for base, tuned and compare format, compiled now; needs CuPy and NVRTC, and no GPU.

    A cubin for "sm_90", PTX for "compute_90". Without CuPy or NVRTC this raises ImportError or RuntimeError, and
    DeviceError if the kernels do not compile.
    """
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(kernel_source(), "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, _options(architecture, names))
        code = nvrtc.getPTX(program) if _is_ptx(architecture) else nvrtc.getCUBIN(program)
        return bytes(code)
    except nvrtc.NVRTCError as error:
        raise DeviceError(
            f"the kernels do not compile for {architecture}: {error}",
            found=nvrtc.getProgramLog(program).strip() or None,
            hint="install NVRTC anew: pip install --force-reinstall 'ckptdiff[cuda13]' (or cuda12); or --device cpu",
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def compiled_kernels(architecture: str, names: tuple[str, str, str]) -> bytes:
    """The same from the cache, or compiled and put there; a damaged file is compiled anew."""
    folder = compiled_folder()
    if folder is None:
        return compile_kernels(architecture, names)
    path = folder / _file_name(architecture, names)
    code = _read(path)
    if code is None:
        code = compile_kernels(architecture, names)
        _write(path, code)
    return code


@functools.cache
def compiled_folder() -> Path | None:
    """Where compiled kernels are kept; None if there is no safe and writable place."""
    return private_folder("cuda")


def _options(architecture: str, names: tuple[str, str, str]) -> tuple[str, ...]:
    return (*kernel_options(*(FORMATS[name] for name in names)), f"-arch={architecture}")


def _is_ptx(architecture: str) -> bool:
    return architecture.startswith("compute_")


def _file_name(architecture: str, names: tuple[str, str, str]) -> str:
    """Hold a hash of all that the machine code depends on."""
    digest = hashlib.sha256()
    for part in (*map(str, _nvrtc().getVersion()), *_options(architecture, names), kernel_source()):
        digest.update(part.encode() + b"\0")
    kind = "ptx" if _is_ptx(architecture) else "cubin"
    return f"{'-'.join(names)}.{architecture}.{digest.hexdigest()[:20]}.{kind}"


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("cannot read a compiled kernel: %s", error)
        return None
    checksum, code = content[:_CHECKSUM], content[_CHECKSUM:]
    if hashlib.sha256(code).digest() != checksum:
        logger.warning("dropped a damaged kernel from %s", path)
        return None
    return code


def _write(path: Path, code: bytes) -> None:
    """Keep machine code under its name once it is complete; a failure is said and survived."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        try:
            unfinished.write_bytes(hashlib.sha256(code).digest() + code)
            unfinished.replace(path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
    except OSError as error:
        logger.warning("could not keep a compiled kernel in %s: %s", path.parent, error)


def _nvrtc() -> Any:
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc
