"""Break kernels and pipeline in one place at a time; the tests must notice each (``make mutants``).

`mutants.toml` lists them. A mutant that its tests pass, or whose text is not found exactly once, is an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Mutant:
    """One replacement, and the tests (``pytest -k``) that must fail with it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def survives(mutant: Mutant) -> str | None:
    """Why a mutant is not noticed; None if it is."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        for folder in ("ckptdiff", "cuda", "tests", "fixtures"):
            shutil.copytree(ROOT / folder, Path(scratch, folder), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", scratch)
        path = Path(scratch, mutant.file)
        source = path.read_text()
        if source.count(mutant.old) != 1:
            return f"its text is found {source.count(mutant.old)} times"
        path.write_text(source.replace(mutant.old, mutant.new))
        tests = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/cuda", "-k", mutant.tests]
        environment = {**os.environ, "PYTHONPATH": scratch, "CKPTDIFF_TEST_BUILD_ALL": "0"}
        found = subprocess.run(tests, cwd=scratch, env=environment, capture_output=True, text=True)
        # 1: tests failed; a barrier that hangs, or a wild address, ends the process by a signal.
        return None if found.returncode == 1 or found.returncode < 0 else f"tests ended with {found.returncode}"


def main(names: list[str]) -> int:
    """Try all mutants, or those whose name contains one of the arguments."""
    mutants = [Mutant(**row) for row in tomllib.loads(TABLE.read_text())["mutant"]]
    chosen = [mutant for mutant in mutants if not names or any(name in mutant.name for name in names)]
    alive = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, why in zip(chosen, pool.map(survives, chosen), strict=True):
            print(f"{mutant.name:40} {'noticed' if why is None else 'SURVIVES: ' + why}", flush=True)
            alive += why is not None
    print(f"{len(chosen) - alive} of {len(chosen)} noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
