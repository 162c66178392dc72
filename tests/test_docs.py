"""The documentation is true: its links and files are there, its commands run, and it names every figure."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import ckptdiff
from ckptdiff.cli import main
from ckptdiff.cli.group import COMMANDS
from ckptdiff.cli.group import ckptdiff as group
from ckptdiff.figures.catalogue import COLUMNS, FIGURES
from ckptdiff.figures.spectral import SPECTRAL_FIGURES
from ckptdiff.overlap.figures import COSINE_FIGURES
from ckptdiff.runfile import schema
from ckptdiff.track import file as track_file
from ckptdiff.track.geometry import GRAM_FIGURES
from ckptdiff.track.result import COUNTS
from ckptdiff.track.subspaces import LOCKING_FIGURES

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "bench/GPU.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
FOLDERS = ("bench", "ckptdiff", "cuda", "docs", "examples", "fixtures", "tests")
FENCE = re.compile(r"^```(\{?\w*\}?)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SOURCE = re.compile(
    r"(?<![\w./-])([\w.*-][\w./*-]*\.(?:py|md|sh|toml|txt|cu|cuh|h|ya?ml))(?!\w)(?::\s*([A-Za-z_][\w.]*))?"
)
FOLDER = re.compile(rf"(?<![\w./~-])((?:{'|'.join(FOLDERS)})/[\w./*-]*\w)")
MADE = ("call-a.md", "bench/results")
"""What is there only after a run on a GPU."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    return FENCE.sub("", text_of(page))


def anchors_of(page: Path) -> set[str]:
    """The headings of a page, as GitHub and MyST spell them in links."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code_of(page: str) -> Iterator[str]:
    """Every piece of code in the text of a page."""
    yield from re.findall(r"`([^`\n]+)`", prose_of(page))


def commands_of(page: str) -> list[str]:
    """The commands of a page that call ckptdiff, in order."""
    shown = re.findall(r"^    (ckptdiff .*)$", prose_of(page), re.MULTILINE)
    return shown + [code for code in code_of(page) if code.startswith("ckptdiff ")]


def in_the_tree(path: str) -> list[Path]:
    """What a path means, from the root or as the end of a longer one."""
    return [*ROOT.glob(path), *(match for folder in FOLDERS for match in (ROOT / folder).rglob(path))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    for code in code_of(page):
        for path, symbol in SOURCE.findall(code):
            found = in_the_tree(path)
            assert found or path.startswith(MADE), path
            if symbol and found:
                assert any(re.search(rf"\b{symbol.split('.')[-1]}\b", file.read_text()) for file in found), code
    for path in FOLDER.findall(text_of(page)):
        assert in_the_tree(path) or path.startswith(MADE), path


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_are_shown(page: str) -> None:
    for line in commands_of(page):
        words = shlex.split(re.split(r" [|&>]", line)[0], comments=True)[1:]
        command: click.Command = group
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(click.Context(command), words[0])
            assert found is not None, line
            command = found
            words.pop(0)
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        known |= {"-h", "--help"}
        assert {word for word in words if re.match("--?[a-z]", word)} <= known, line


def test_every_command_is_shown() -> None:
    shown = {line.split()[1] for page in PAGES for line in commands_of(page)}
    assert COMMANDS.keys() <= shown


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the commands of a clone can be run, and write."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    (tmp_path / "build").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return tmp_path


def test_the_first_screen_and_every_command_of_the_readme(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (demo,) = re.findall(r"^\t\$\(BIN\)/(ckptdiff .*)$", text_of("Makefile"), re.MULTILINE)
    blocks = [body for _, body in FENCE.findall(text_of("README.md"))]
    said = {}
    for line in [demo, *commands_of("README.md")]:
        line, _, then = re.split(r"( \| | && )", f"{line} && ")[:3]
        code = main(shlex.split(line)[1:])
        said[line], complaint = capsys.readouterr()
        assert code == 0, (line, complaint)
        if then.startswith("jq "):
            assert then.removeprefix("jq .").split(".")[-1] in said[line]
    assert said[demo].startswith(blocks[0])
    claims = " ".join(said["ckptdiff claims fixtures/llama/base fixtures/llama/tuned"].split())
    (block,) = (body for body in blocks if "noise of these shapes" in body)
    assert all(" ".join(line.split()) in claims for line in re.split(r"\n(?=\S)", block))


@pytest.mark.parametrize("page", ["README.md", "docs/python.md", "docs/run-file.md"])
def test_the_python_of_a_page_runs(page: str, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [body for kind, body in FENCE.findall(text_of(page)) if kind == "python"]
    ckptdiff.diff("fixtures/llama/base", "fixtures/llama/tuned", out="run.h5")
    for block in blocks:
        if "optimizer" not in block:  # that one needs a model: tests/retrain
            exec(compile(block, page, "exec"), {})
    assert blocks


def rows_of(page: str) -> set[str]:
    """What the first column of the tables of a page names."""
    firsts = re.findall(r"^\| (`.*?) \|", text_of(page), re.MULTILINE)
    return {name for first in firsts for name in re.findall(r"`([\w*]+)`", first)}


def test_every_figure_has_its_row() -> None:
    assert rows_of("docs/figures.md") == {figure.key for figure in (*FIGURES, *SPECTRAL_FIGURES)}


def test_every_figure_of_several_runs_has_its_row() -> None:
    page = text_of("docs/several-runs.md")
    assert [key for key in (*COUNTS, *GRAM_FIGURES, *LOCKING_FIGURES, *COSINE_FIGURES) if f"`{key}`" not in page] == []


def test_every_column_has_its_row() -> None:
    rows = rows_of("docs/run-file.md")
    families = tuple(name.removesuffix("*") for name in rows if name.endswith("_*"))
    stored = {column.name for column in COLUMNS} | {
        "name",
        "layer",
        "same_bytes",
        "unread",
        "compared_base",
        "compared_tuned",
        *schema.TEXT_FACTS,
    }
    assert {name for name in rows if not name.endswith("_*")} == {n for n in stored if not n.startswith(families)}
    assert all(any(name.startswith(family) for name in stored) for family in families)


@pytest.mark.parametrize("module", [schema, track_file])
def test_the_layouts_are_those_of_the_code(module: object) -> None:
    layout = inspect.cleandoc(inspect.getdoc(module).split("::\n\n")[1])
    assert f"```text\n{layout}\n```" in text_of("docs/run-file.md")


def test_every_public_package_is_on_the_page_of_the_interface() -> None:
    documented = re.findall(r"^\.\. automodule:: (\S+)$", text_of("docs/python.md"), re.MULTILINE)
    rooms = ("claims", "errors", "events", "exports", "lora", "overlap", "retrain", "spectra", "track")
    assert {"ckptdiff", *(f"ckptdiff.{room}" for room in rooms)} <= set(documented)


def test_the_first_page_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 180
    assert len(text_of("CONTRIBUTING.md").splitlines()) <= 80
