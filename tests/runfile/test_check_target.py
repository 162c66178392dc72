from __future__ import annotations

import os
from pathlib import Path

import h5py
import pytest
from run_samples import Sample

from ckptdiff.errors import RunFileError
from ckptdiff.runfile.check_target import check_target


def refused(target: Path, words: str, inputs: list[tuple[Path, int, int]] | None = None) -> RunFileError:
    with pytest.raises(RunFileError, match=words) as caught:
        check_target(target, inputs or [])
    return caught.value


def described(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path, status.st_dev, status.st_ino


def test_new_names_and_run_files_are_accepted(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "new.h5", [])
    check_target(sample.path, [described(Path(__file__))])
    monkeypatch.chdir(tmp_path)
    check_target(Path("new.h5"), [])
    assert not list(tmp_path.iterdir())


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "mkdir -p" in str(refused(tmp_path / "gone" / "run.h5", "folder does not exist"))
    refused(tmp_path / "file" / "run.h5", "is not a folder")
    refused(tmp_path, "is a directory")
    assert "-o" in str(refused(Path("-"), "standard output"))


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write everywhere, so the answer of the system is given here.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(tmp_path / "run.h5", "folder is not writable")


def test_files_that_are_not_run_files_are_kept(tmp_path: Path) -> None:
    for name, content in {"empty": b"", "model.safetensors": b"weights", "text": b"\x89HDF\r\n\x1a\n"}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "exists and is not a ckptdiff run file")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.attrs["format"] = "another"
    refused(tmp_path / "other.h5", "exists and is not a ckptdiff run file")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "is not a file")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "cannot look at the output")


def test_inputs_under_any_name_are_refused(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"weights")
    (tmp_path / "soft.h5").symlink_to(shard)
    (tmp_path / "hard.h5").hardlink_to(shard)
    for target in (shard, tmp_path / "soft.h5", tmp_path / "hard.h5", tmp_path / "." / "model.safetensors"):
        assert refused(target, "output is one of the inputs", [described(shard)]).found == str(shard)
