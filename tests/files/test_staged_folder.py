from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptdiff.errors import RunFileError
from ckptdiff.files.staged import StagedFolder


def test_it_takes_its_name_when_it_is_committed(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with StagedFolder(target) as folder:
        (folder.path / "file").write_text("text")
        assert not target.exists() and folder.path.parent == tmp_path
        folder.commit()
    assert (target / "file").read_text() == "text"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("wrong"), RunFileError("wrong")])
def test_nothing_is_left_when_it_is_not(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, StagedFolder(tmp_path / "made") as folder:
        (folder.path / "inner").mkdir()
        (folder.path / "inner" / "file").write_text("text")
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_file_where_it_was_to_be(tmp_path: Path) -> None:
    for file, expected in (("inner/file", tmp_path / "made/inner/file"), ("/elsewhere", Path("/elsewhere"))):
        with pytest.raises(RunFileError) as caught, StagedFolder(tmp_path / "made") as folder:
            raise RunFileError("wrong", file=folder.path / file)
        assert caught.value.file == str(expected)


def test_a_name_that_is_taken_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="cannot name the output") as caught, StagedFolder(tmp_path / "a") as folder:
        (tmp_path / "a").write_text("precious")
        folder.commit()
    assert caught.value.file == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "precious"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="cannot create the output"), StagedFolder(tmp_path / "no" / "made"):
        pass


def test_a_disk_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(RunFileError, match="Input/output error"), StagedFolder(tmp_path / "made") as folder:
        folder.commit()


@pytest.mark.parametrize("name", ["n" * 255, "\N{SNOWMAN}" * 85])
def test_names_as_long_as_they_can_be(tmp_path: Path, name: str) -> None:
    with StagedFolder(tmp_path / name) as folder:
        folder.commit()
    assert [path.name for path in tmp_path.iterdir()] == [name]
