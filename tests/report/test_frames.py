"""Tables of other libraries hold what csv and parquet do."""

from __future__ import annotations

import csv
import io
import sys
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import ckptdiff
from ckptdiff.errors import OptionError
from ckptdiff.figures.members import GROUPINGS, GroupBy
from ckptdiff.figures.result import Diff
from ckptdiff.report.rows import View


@pytest.fixture(scope="module")
def real() -> Diff:
    pair = Path(__file__).parents[2] / "fixtures" / "llama"
    return ckptdiff.diff(pair / "base", pair / "tuned", spectra="exact", groups=["mlp=mlp"])


def exported(diff: Diff, name: str, by: GroupBy) -> bytes:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    import_module(f"ckptdiff.report.as_{name}").write(diff, stream, View(by))
    stream.flush()
    return stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("by", GROUPINGS)
def test_arrow_is_what_parquet_holds(real: Diff, by: GroupBy) -> None:
    table = real.to_arrow(by)
    written = pq.read_table(io.BytesIO(exported(real, "parquet", by)))
    assert table.to_pylist() == written.to_pylist() != []
    assert table.schema.metadata[b"ckptdiff"] == written.schema.metadata[b"ckptdiff"]


@pytest.mark.parametrize("by", GROUPINGS)
def test_pandas_is_what_csv_holds(real: Diff, by: GroupBy) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = real.to_pandas(by)
    written = list(csv.DictReader(io.StringIO(exported(real, "csv", by).decode())))
    assert list(frame.columns) == list(written[0]) and len(frame) == len(written)
    for key in frame.columns:
        for cell, text in zip(frame[key], (row[key] for row in written), strict=True):
            if key in ("shape", "groups"):
                text = [int(n) for n in text.split("x")] if key == "shape" else text.split() or None
                assert cell == text
            elif text == "":
                assert pandas.isna(cell)
            else:
                assert type(cell)(text) == cell
    assert str(frame["numel"].dtype) == "Int64" and str(frame["rel_norm"].dtype) == "float64"


def test_undefined_figures_are_missing(troubled_diff: Diff) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = troubled_diff.to_pandas()
    known = [row["rel_norm"] for row in troubled_diff.per_tensor]
    assert [None if pandas.isna(cell) else cell for cell in frame["rel_norm"]] == known
    assert str(frame["layer"].dtype) == "Int64"


@pytest.mark.parametrize(("library", "hint"), [("pandas", "pip install pandas"), ("pyarrow", "ckptdiff[parquet]")])
def test_a_missing_library_is_named(diff: Diff, library: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.parquet", None)
    with pytest.raises(OptionError, match=f"needs {library}") as caught:
        diff.to_pandas() if library == "pandas" else diff.to_arrow()
    assert hint in str(caught.value)
