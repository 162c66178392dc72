"""Everything can be looked up, and looking up is quick."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from ckptdiff import __version__
from ckptdiff.cli.group import COMMANDS, ckptdiff
from ckptdiff.memory import DEFAULT_MEMORY
from ckptdiff.options import Options

_HEAVY = {"numpy", "numba", "h5py", "rich", "torch", "pyarrow", "safetensors"}


def commands(
    group: click.Group = ckptdiff, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


OPTIONS = [
    pytest.param(command, option, id=f"{' '.join(path)} {option.opts[-1]}")
    for path, command in commands()
    for option in command.params
    if isinstance(option, click.Option)
]


def test_the_table_of_commands_is_right() -> None:
    found = {path[0]: command.get_short_help_str(200) for path, command in commands() if len(path) == 1}
    assert found == COMMANDS


@pytest.mark.parametrize(("path", "command"), [pytest.param(*pair, id=" ".join(pair[0])) for pair in commands()])
def test_every_command_has_help(path: tuple[str, ...], command: click.Command) -> None:
    assert command.help and command.short_help


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_has_help_and_shows_its_default(command: click.Command, option: click.Option) -> None:
    assert option.help and option.help.endswith(".")
    context = click.Context(command, parent=click.Context(ckptdiff, show_default=True))
    record = option.get_help_record(context)
    assert record is not None
    assert "[default: " in record[1] or "[required]" in record[1]


def test_defaults_are_those_of_the_library() -> None:
    options = {option.name: option for _, command in commands() if command.name == "diff" for option in command.params}
    defaults = {name: option.default for name, option in options.items()}
    library = Options()
    assert defaults["mask"] == str(library.mask)
    assert options["max_memory"].show_default.startswith(f"{DEFAULT_MEMORY >> 20}M")
    assert all(defaults[name] == getattr(library, name) for name in ("compare", "device", "threads", "io"))


def test_io_help_tells_of_sigbus(cli) -> None:
    text = " ".join(cli("diff", "--help").out.split())
    assert "SIGBUS" in text and "pread" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["diff", "--help"],
        ["show", "-h"],
        ["inspect", "-h"],
        ["mask", "-h"],
        ["patch", "apply", "-h"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from ckptdiff.cli import main\n"
        f"code = main({arguments!r})\n"
        f"print(code, sorted({_HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "0 []\n"


def test_version(cli) -> None:
    assert cli("--version") == (0, f"ckptdiff {__version__}\n", "")


@pytest.mark.parametrize(("arguments", "message"), [
    (["nonsense"], "No such command 'nonsense'"),
    (["diff"], "Missing argument 'BASE'"),
    (["diff", "a", "b", "--nonsense"], "No such option"),
    (["diff", "a", "b", "--format", "xml"], "'xml' is not one of"),
    (["diff", "a", "b", "--threads", "two"], "not a valid integer"),
    (["mask", "export", "run.h5"], "Missing option '-o'"),
])  # fmt: skip
def test_usage_errors(cli, arguments: list[str], message: str) -> None:
    code, out, err = cli(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("ckptdiff: error: ") and message in err and "--help" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    if shell == "bash":
        pytest.importorskip("shutil").which("bash") or pytest.skip("no bash")
    environment = {**os.environ, "_CKPTDIFF_COMPLETE": f"{shell}_source"}
    done = subprocess.run(
        [sys.executable, "-m", "ckptdiff.cli"], env=environment, capture_output=True, text=True, check=True
    )
    assert "_CKPTDIFF_COMPLETE" in done.stdout and "ckptdiff" in done.stdout


@pytest.mark.parametrize(("words", "expected"), [
    ("ckptdiff ", "plain,show"),
    ("ckptdiff diff ", "file,"),
    ("ckptdiff diff a b --io ", "plain,pread"),
])  # fmt: skip
def test_completion(words: str, expected: str) -> None:
    environment = {
        **os.environ,
        "_CKPTDIFF_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split())),
    }
    done = subprocess.run(
        [sys.executable, "-m", "ckptdiff.cli"], env=environment, capture_output=True, text=True, check=True
    )
    assert expected in done.stdout.splitlines()
