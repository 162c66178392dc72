"""Compile the kernels into the wheel: for this machine's processor, or for all with ``CKPTDIFF_BUILD_FOR=all``.

Without a C compiler to link with, or with ``CKPTDIFF_BUILD_FOR=none``, the wheel is pure, and what a run needs is
compiled when it needs it. So it is with an editable install, whose kernels change.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PLACE = Path("build", "kernels")


class CustomBuildHook(BuildHookInterface):
    """Adds libraries of kernels to a wheel, which becomes one for this platform and for any Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the wheel is editable, and name the files for the wheel."""
        asked = os.environ.get("CKPTDIFF_BUILD_FOR", "this")
        if version == "editable" or asked == "none":
            return
        if sys.platform != "linux":  # elsewhere what a processor can do is not known without Numba
            self.app.display_info("kernels are compiled on the spot on this system")
            return
        folder = Path(self.root, _PLACE)
        shutil.rmtree(folder, ignore_errors=True)
        # In a process of its own, whose settings for Numba stay its own.
        code = f"import sys; sys.path.insert(0, {self.root!r}); from ckptdiff.kernel_compiler import main"
        command = [sys.executable, "-c", f"{code}; main({asked!r}, {str(folder)!r})"]
        done = subprocess.run(command, check=False)
        built = sorted(folder.glob("*.so"))
        if done.returncode or not built:
            self.app.display_warning("no kernels were compiled: each run compiles those it needs, and keeps them")
            return
        build_data["force_include"] |= {str(path): f"ckptdiff/_kernels/{path.name}" for path in built}
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
