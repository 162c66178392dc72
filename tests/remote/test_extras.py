"""Without the extras, what needs them says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.cli import main
from ckptdiff.errors import CheckpointError
from ckptdiff.remote.address import Url
from ckptdiff.remote.hub import HubFile, is_hub_name, may_be_hub


def test_what_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="obstore") as raised:
        open_checkpoint("s3://bucket/model.safetensors")
    assert raised.value.hint == "pip install 'ckptdiff[remote]'"
    with pytest.raises(CheckpointError, match="huggingface_hub") as raised:
        open_checkpoint("hf://org/name")
    assert raised.value.hint == "pip install 'ckptdiff[hub]'"
    assert main(["diff", "org/base", "org/tuned"]) == 2
    assert "no such file or directory" in (said := capsys.readouterr().err) and "ckptdiff[hub]" in said


def test_names_of_the_hub_are_told_from_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (tmp_path / "org/here").mkdir(parents=True)
    (tmp_path / "org/link").symlink_to("nowhere")
    for path in ("org/name", "org/name@main", "org/name@refs/pr/3", "hf://org/name/folder"):
        assert may_be_hub(path), path
    for path in ("org/here", "org/link", "name", "a/b/c", "/a/b", "./a/b", "s3://a/b", "https://a/b", "../a"):
        assert not may_be_hub(path), path
    assert is_hub_name("org/here") and not is_hub_name("https://a/b")


def test_files_beside_a_file_are_addressed() -> None:
    assert HubFile("o/n", "c", "a/b/x.json").beside("y").shown == "hf://o/n@c/a/b/y"
    assert HubFile("o/n", "c", "").beside("y").shown == "hf://o/n@c/y"
    assert Url("https://h/a/x?k=1").beside("y z").url == "https://h/a/y%20z?k=1"
    assert Url("https://h").beside("y").url == "https://h/y"
    assert Url("https://h/a b/ü").request(False)[0] == "https://h/a%20b/%C3%BC"
