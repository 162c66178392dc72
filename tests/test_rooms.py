"""Which room of the package imports which: those that measure know nothing of what is printed, stored or run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ckptdiff

PACKAGE = Path(ckptdiff.__file__).parent
GROUND = {"errors", "formats", "jit", "kernel_library", "options"}
MAY_IMPORT = {
    "codes": {"jit", "kernel_cache"},
    "deflate": {"jit"},
    "files": {"errors", "interrupts"},
    "remote": {"errors", "interrupts"},
    "measure": GROUND | {"codes"},
    "checkpoint": GROUND | {"codes", "events", "in_order", "measure", "remote"},
    "figures": GROUND | {"measure"},
}
"""Rooms, and what each may import beside itself."""


def imported_by(module: Path) -> set[str]:
    """Modules of the package that one imports, in full; a type checker's imports too."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"a relative import in {module}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # "from ckptdiff import measure" names a module, "from ckptdiff.formats import Format" what is in one.
            found |= {name if node.module == "ckptdiff" else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "ckptdiff"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_stands_on(room: str) -> None:
    modules = sorted((PACKAGE / room).rglob("*.py"))
    assert modules
    for module in modules:
        rooms = {name.removeprefix("ckptdiff.").split(".")[0] for name in imported_by(module)}
        assert rooms <= MAY_IMPORT[room] | {room}, module


def test_no_two_modules_of_figures_import_each_other() -> None:
    known = {f"ckptdiff.figures.{path.stem}": imported_by(path) for path in (PACKAGE / "figures").glob("*.py")}
    reached = dict(known)
    for _ in known:
        reached = {
            name: found.union(*(reached.get(other, set()) for other in found)) for name, found in reached.items()
        }
    assert [name for name, found in reached.items() if name in found] == []
