"""Run and track files in which a value is of another type than ckptdiff writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import ckptdiff
from ckptdiff.errors import RunFileError
from ckptdiff.track import Track, save_track
from ckptdiff.track.result import COUNTS

Cli = Callable[..., Any]
UTF8 = h5py.string_dtype()
ASCII = h5py.string_dtype("ascii")
LATIN_1 = b"gr\xfcn"

NO_TEXT = {
    "Latin-1": (LATIN_1, UTF8),
    "Latin-1 as ASCII": (LATIN_1, ASCII),
    "Latin-1 of fixed length": (LATIN_1, np.dtype("S4")),
    "number": (7, np.dtype(np.int64)),
    "complex": (1j, np.dtype(np.complex128)),
    "list": (["a", "b"], UTF8),
    "empty": (h5py.Empty("f8"), None),
    "opaque": (np.void(b"abc"), None),
}


def set_attribute(path: Path, owner: str, name: str, value: object, dtype: Any = None) -> None:
    with h5py.File(path, "r+") as file:
        file[owner].attrs.create(name, value, dtype=dtype)


def set_data(path: Path, name: str, change: Callable[[Any], object]) -> None:
    with h5py.File(path, "r+") as file:
        old = file[name][()]
        del file[name]
        file[name] = change(old)


def refused(cli: Cli, path: Path, *command: str | Path) -> str:
    code, out, err = cli(*command)
    assert (code, out) == (2, "")
    assert "is damaged or truncated" in err and str(path) in err and "try:" in err
    assert "unexpected" not in err and "Traceback" not in err
    return str(err)


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_version_that_is_no_text(cli: Cli, run_file: Path, kind: str) -> None:
    set_attribute(run_file, "/", "ckptdiff_version", *NO_TEXT[kind])
    for command in (["show"], ["show", "--format", "json"], ["mask", "list"], ["claims"], ["overlap", run_file]):
        message = refused(cli, run_file, *command, run_file)
        assert "expected: UTF-8 text in the attribute ckptdiff_version of /" in message
        assert "found:" in message


@pytest.mark.parametrize("name", ["format", "format_version", "complete"])
@pytest.mark.parametrize("kind", sorted(NO_TEXT.keys() - {"number"}))
def test_attributes_that_say_what_it_is(cli: Cli, run_file: Path, kind: str, name: str) -> None:
    set_attribute(run_file, "/", name, *NO_TEXT[kind])
    code, out, err = cli("show", run_file)
    assert (code, out) == (2, "") and str(run_file) in err and "unexpected" not in err


@pytest.mark.parametrize("name", ["rule", "compare"])
@pytest.mark.parametrize("kind", NO_TEXT)
def test_attributes_of_masks_that_are_no_text(cli: Cli, run_file: Path, tmp_path: Path, kind: str, name: str) -> None:
    set_attribute(run_file, "/masks", name, *NO_TEXT[kind])
    for command in (["mask", "list"], ["mask", "export", "-o", tmp_path / "out.npz"], ["overlap", run_file]):
        assert f"attribute {name} of /masks" in refused(cli, run_file, *command, run_file)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("value", [["a", "b"], "text", 7, [0.5], h5py.Empty("f8")])
def test_the_shape_of_a_mask(cli: Cli, run_file: Path, tmp_path: Path, value: object) -> None:
    name = "model.embed_tokens.weight"
    set_attribute(run_file, f"/masks/{name}", "shape", value)
    message = refused(cli, run_file, "mask", "export", run_file, "-o", tmp_path / "out.npz")
    assert f"tensor:   {name}" in message and "attribute shape" in message


@pytest.mark.parametrize("name", ["name", "block", "shape", "tuned_name"])
def test_texts_that_are_not_utf8(cli: Cli, run_file: Path, name: str) -> None:
    set_data(run_file, f"tensors/{name}", lambda old: np.full(old.shape, LATIN_1))
    assert f"expected: UTF-8 text in /tensors/{name}" in refused(cli, run_file, "show", run_file)
    set_data(run_file, f"tensors/{name}", lambda old: np.zeros(old.shape))
    assert "found:    float64" in refused(cli, run_file, "show", run_file)


@pytest.mark.parametrize("name", ["numel", "delta_norm", "layer", "same_bytes", "changed"])
def test_numbers_of_another_type(cli: Cli, run_file: Path, name: str) -> None:
    for dtype in (np.complex128, "S4", [("a", "i4")]):
        set_data(run_file, f"tensors/{name}", lambda old, dtype=dtype: np.zeros(old.shape, dtype))
        assert f"in /tensors/{name}" in refused(cli, run_file, "show", run_file)
    with h5py.File(run_file, "r+") as file:
        del file["tensors"][name]
        file["tensors"].create_group(name)
    assert "found:    a group" in refused(cli, run_file, "show", run_file)


@pytest.mark.parametrize(
    ("keys", "value", "place"),
    [
        (["base"], [], "an object in /provenance: base"),
        (["base", "path"], 3, "text in /provenance: base: path"),
        (["tuned", "shards"], {}, "a list in /provenance: tuned: shards"),
        (["tuned", "shards"], [{"file": "x", "size": True}], "a whole number in /provenance: tuned: shards: size"),
        (["warnings"], [None], "text in /provenance: warnings"),
        (["options", "renames"], "a=b", "a list in /provenance: options: renames"),
        (["mask_rule"], None, "text in /provenance: mask_rule"),
    ],
)
def test_provenance_of_another_shape(cli: Cli, run_file: Path, keys: list[str], value: object, place: str) -> None:
    def change(old: bytes) -> str:
        known = found = json.loads(old)
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value
        return json.dumps(known)

    set_data(run_file, "provenance", change)
    for command in ("show", "claims"):
        assert f"expected: {place}" in refused(cli, run_file, command, run_file)


@pytest.mark.parametrize("change", [
    lambda old: old.astype(float),
    lambda old: old[:, :-1],
    lambda old: old[:-1],
    lambda old: old[0],
    lambda old: b"text",
])  # fmt: skip
@pytest.mark.parametrize("name", ["delta_log2", "ulp"])
def test_histograms_of_another_shape(cli: Cli, run_file: Path, name: str, change: Callable[[Any], object]) -> None:
    page = run_file.with_suffix(".html")
    assert cli("report", run_file, "-q") == (0, "", "")
    before = page.read_bytes()
    set_data(run_file, f"histograms/{name}", change)
    refused(cli, run_file, "report", run_file)
    assert page.read_bytes() == before


@pytest.mark.parametrize("value", [LATIN_1, b"[" * 100_000, b"[]", b"{}", b"{", 7, ["{}"]])
@pytest.mark.parametrize("name", ["provenance", "unmatched"])
def test_what_should_be_json(cli: Cli, run_file: Path, name: str, value: object) -> None:
    set_data(run_file, name, lambda _: value)
    message = refused(cli, run_file, "show", run_file)
    assert f"in /{name}" in message and len(message) < 500


def test_singular_values(run_file: Path) -> None:
    with h5py.File(run_file, "r+") as file:
        file["spectra/none/base"] = np.ones(3)
        file["spectra/text/delta"] = "text"
        file["spectra/number"] = 7
        file["spectra/one/delta"] = [2.0, 1.0]
    with ckptdiff.RunFile(run_file) as run:
        for name in ("none", "text", "number"):
            with pytest.raises(RunFileError, match="damaged") as caught:
                run.spectra[name]
            assert (caught.value.file, caught.value.tensor) == (str(run_file), name)
        assert run.spectra["one"]["delta"].tolist() == [2.0, 1.0]


def test_a_target_with_a_format_that_is_no_text(cli: Cli, run_file: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.attrs["format"] = [1, 2]
    code, _, err = cli("mask", "combine", "--union", run_file, run_file, "-o", tmp_path / "other.h5")
    assert code == 2 and "the output exists and is not a ckptdiff run file" in err and "other.h5" in err


@pytest.fixture
def track_file(tmp_path: Path) -> Path:
    counts = {key: np.zeros((3, 2), np.int64) for key in COUNTS}
    counts["support"][:] = counts["touched"][0] = 4
    found = Track("base", ("a", "b", "c"), "bf16", ("v", "w"), ((10,), (2, 5)), counts, np.ones(2), np.ones((3, 2)))
    save_track(found, tmp_path / "track.h5")
    return tmp_path / "track.h5"


def test_an_undamaged_track_file(cli: Cli, track_file: Path) -> None:
    assert cli("track", track_file).code == 0


@pytest.mark.parametrize("name", ["support", "base_norm", "delta_norm", "name", "shape"])
def test_track_files_with_other_types(cli: Cli, track_file: Path, name: str) -> None:
    text = name in ("name", "shape")
    for dtype in (np.complex128, np.float64 if text else "S4", [("a", "i4")]):
        set_data(track_file, f"tensors/{name}", lambda old, dtype=dtype: np.zeros(old.shape, dtype))
        assert f"in /tensors/{name}" in refused(cli, track_file, "track", track_file)


@pytest.mark.parametrize(
    "change",
    [{"base": 3}, {"base": None}, {"steps": "abc"}, {"steps": ["a", "b", 1]}, {"warnings": [[]]}, {"compare": []}],
)
def test_track_provenance_of_another_shape(cli: Cli, track_file: Path, change: dict[str, object]) -> None:
    set_data(track_file, "provenance", lambda old: json.dumps({**json.loads(old), **change}))
    assert "in /provenance" in refused(cli, track_file, "track", track_file)


@pytest.mark.parametrize(
    ("name", "kind"), [("format_version", "list"), ("format_version", "Latin-1"), ("complete", "list")]
)
def test_track_attributes_of_other_types(cli: Cli, track_file: Path, name: str, kind: str) -> None:
    set_attribute(track_file, "/", name, *NO_TEXT[kind])
    code, out, err = cli("track", track_file)
    assert (code, out) == (2, "") and str(track_file) in err and "unexpected" not in err
