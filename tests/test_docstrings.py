"""The examples of docstrings, run where `fixtures` and a run file of its first pair lie."""

from __future__ import annotations

import doctest
import inspect
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import ckptdiff

ROOT = Path(ckptdiff.__file__).parent
FIXTURES = Path(__file__).parent.parent / "fixtures"
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file of the first pair."""
    made = tmp_path_factory.mktemp("examples")
    (made / "fixtures").symlink_to(FIXTURES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned", out="run.h5")
    return made / "run.h5"


@pytest.fixture
def folder(tmp_path: Path, run_file: Path) -> Path:
    """What the examples of one module are run in: what they write, another module's would find there."""
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    shutil.copy(run_file, tmp_path)
    return tmp_path


def llama() -> Any:
    """A torch module whose parameters are those of the base, by name and shape; it computes nothing."""
    nn = pytest.importorskip("torch.nn")
    from safetensors.torch import load_file

    model = nn.Module()
    for shard in sorted((FIXTURES / "llama" / "base").glob("*.safetensors")):
        for name, values in load_file(shard).items():
            *path, last = name.split(".")
            inner = model
            for part in path:
                if part not in dict(inner.named_children()):
                    inner.add_module(part, nn.Module())
                inner = inner.get_submodule(part)
            inner.register_parameter(last, nn.Parameter(values))
    return model


def examples_of(module: str) -> Iterator[doctest.DocTest]:
    given: dict[str, Any] = {"model": llama()} if module.startswith("ckptdiff.retrain") else {}
    return (test for test in doctest.DocTestFinder().find(import_module(module), extraglobs=given) if test.examples)


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_show(module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    told: list[str] = []
    for test in examples_of(module):
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        runner.run(test, out=told.append)
        assert runner.tries, test.name
    assert not told, "".join(told)


def test_an_example_that_shows_something_else_is_found() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    told: list[str] = []
    assert doctest.DocTestRunner().run(test, out=told.append).failed == 1 and told


RECORDS = {"Applied", "Extracted", "Extraction", "MatchReport", "PairCounts", "ShiraExport", "Verdict"}
RECORDS |= {
    "AppliedDelta",
    "Change",
    "Delta",
    "MadeDelta",
    "PatchContents",
    "Shipped",
    "ShippedContents",
    "TensorDelta",
}
"""What functions with an example return."""


@pytest.mark.parametrize("room", ["", *(f".{room}" for room in ckptdiff._ROOMS)])
def test_what_is_public_has_an_example(room: str) -> None:
    if room == ".retrain":
        pytest.importorskip("torch")
    module = import_module(f"ckptdiff{room}")
    without = set()
    for name in set(module.__all__) - RECORDS:
        found = getattr(module, name)
        error = isinstance(found, type) and issubclass(found, ckptdiff.CkptdiffError)
        if (inspect.isclass(found) or inspect.isfunction(found)) and not error and ">>> " not in (found.__doc__ or ""):
            without.add(name)
    assert without == set()
