import io
import pickle
import zipfile

import h5py
import pytest

from ckptdiff.checkpoint.foreign import foreign_codes, foreign_files, foreign_format


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(protocol):
    assert foreign_format(pickle.dumps({"a": 1}, protocol))[0] == "a pickle"


def test_zip_archives():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    assert "zip archive" in foreign_format(content.getvalue())[0]


def test_hdf5():
    content = io.BytesIO()
    with h5py.File(content, "w"):
        pass
    assert foreign_format(content.getvalue())[0] == "an HDF5 file"


def test_anything_else():
    assert foreign_format(b"\x00" * 64) is None
    assert foreign_format(b"") is None


def test_pickles_come_before_gguf():
    what, found, _ = foreign_files(["b.gguf", "z.bin", "A.PT", "config.json"])
    assert (what, found) == ("pickles", ["A.PT", "z.bin"])
    assert foreign_files(["config.json", "README.md"]) is None


@pytest.mark.parametrize(("parts", "kind"), [
    (("qweight", "qzeros", "scales", "g_idx"), "GPTQ"),
    (("qweight", "qzeros", "scales"), "AWQ"),
    (("weight", "scales"), None),
    (("qweight",), None),
    (("weight_packed", "weight_scale"), None),
])  # fmt: skip
def test_codes_that_are_not_decoded_are_named(parts, kind):
    found = foreign_codes(["model.norm.weight", *(f"model.layers.0.mlp.up_proj.{part}" for part in parts)])
    assert (found is None) if kind is None else found.startswith(f"quantised with {kind}, whose codes")
