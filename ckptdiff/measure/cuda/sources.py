"""Join the kernels' source into one text for NVRTC, and choose the options that it is compiled with."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from ckptdiff.formats import Format

KERNELS = ("harvest", "refine", "scan", "ties")
KERNEL_NAMES = ("scan", "refine", "harvest", "place_ties", "take_ties")
"""What can be launched."""
NAMES = {"bf16": "Bf16", "f16": "F16", "f32": "F32", "f64": "F64", "f8_e4m3": "E4m3", "f8_e5m2": "E5m2"}
"""What the source calls each format."""
THREADS = 512
"""Threads of a block, as the kernels are compiled."""
_EXACT = ("-ftz=false", "-prec-div=true", "-prec-sqrt=true")
"""Subnormal numbers stay what they are: most codes of float8 become subnormal float32 on the way to their values."""

_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def kernel_folder() -> Path:
    """Where the source is: in the installed package, or in the clone that is installed as editable."""
    package = Path(str(files("ckptdiff")))
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
