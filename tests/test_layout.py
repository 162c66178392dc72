"""Where tests lie: in a folder for each room of the package. Names, theirs and those of the package, mean one thing."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

import ckptdiff

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BY_NAME = (*TESTS.rglob("*.py"), *(ROOT / "bench").glob("*.py"), *(ROOT / "fixtures").glob("*.py"))
"""What tests import by base name alone, and tests themselves, which pytest imports so."""


def test_no_module_hides_another() -> None:
    paths = defaultdict(list)
    for path in BY_NAME:
        if path.name not in ("conftest.py", "__main__.py"):
            paths[path.stem].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in paths.items() if len(found) > 1} == {}
    assert paths.keys() & (sys.stdlib_module_names | {"ckptdiff"}) == set()


def test_a_folder_of_tests_is_about_a_room_of_the_package() -> None:
    package = Path(ckptdiff.__file__).parent
    rooms = {path.parent.name for path in package.rglob("__init__.py")} - {"kernels"}
    folders = {path.parent.name for path in TESTS.rglob("test_*.py")} - {TESTS.name}
    # Those of real models go through all rooms.
    assert len(folders) > 10 and folders - rooms == {"zoo"}


def test_a_name_of_the_package_means_one_thing() -> None:
    """But modules of `kernels/`, `cuda/` and `cli/`, which are called as what they serve, and `result`."""
    modules, classes = defaultdict(list), defaultdict(list)
    for path in Path(ckptdiff.__file__).parent.rglob("*.py"):
        if path.parent.name not in ("kernels", "cuda", "cli") and path.stem not in ("__init__", "__main__", "result"):
            modules[path.stem].append(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(path)
    assert len(modules) > 100 and len(classes) > 100
    assert [found for found in (*modules.values(), *classes.values()) if len(found) > 1] == []
