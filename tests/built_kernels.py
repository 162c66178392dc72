"""Compile the kernels that tests call, once and on all cores, into a library as an installed package has it.

    CKPTDIFF_KERNELS=$(python tests/built_kernels.py FOLDER) pytest

It prints the folder, or "jit" where there is no C compiler, or another system than Linux: there each process of the
tests compiles what it calls, as all do without this. A folder whose library fits the sources is left as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ckptdiff.kernel_compiler import RARE, USES, compile_library, linker
from ckptdiff.kernel_library import fault_of, path_of, processor_level


def built(folder: Path) -> str:
    """What `CKPTDIFF_KERNELS` is to be for the library in a folder, which is built if there is none that fits."""
    level = processor_level()
    path = folder.resolve() / path_of(level).name
    if fault_of(path, level) and sys.platform == "linux":
        try:
            linker()
        except SystemExit as missing:
            print(f"{missing}: tests compile them as they call them", file=sys.stderr)
        else:
            print("Compiling kernels for tests; it takes a minute, and again when one has changed.", file=sys.stderr)
            compile_library(level, path, uses=(*USES, *RARE))
    return "jit" if fault_of(path, level) else str(path.parent)


if __name__ == "__main__":
    print(built(Path(sys.argv[1])))
