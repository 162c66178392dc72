"""Every format, read back by somebody else's reader."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ckptdiff.cli.view import REPORT_FORMATS
from ckptdiff.errors import OptionError
from ckptdiff.figures.result import Diff
from ckptdiff.report import as_parquet
from ckptdiff.report.as_json import document
from ckptdiff.report.rows import View


def export(diff: Diff, name: str, view: View | None = None) -> str:
    stream = io.StringIO(newline="")
    import_module(f"ckptdiff.report.as_{name}").write(diff, stream, view or View())
    return stream.getvalue()


def parquet(diff: Diff, view: View | None = None) -> pq.ParquetFile:
    stream = io.TextIOWrapper(io.BytesIO())
    as_parquet.write(diff, stream, view or View())
    return pq.ParquetFile(io.BytesIO(stream.buffer.getvalue()))


def test_every_format_has_an_exporter() -> None:
    written = {path.stem for path in Path(as_parquet.__file__).parent.glob("as_*.py")}
    assert written == {f"as_{name}" for name in REPORT_FORMATS}
    assert all(callable(import_module(f"ckptdiff.report.{name}").write) for name in written)


def test_json_is_one_line_with_the_document(troubled_diff: Diff) -> None:
    text = export(troubled_diff, "json")
    assert text.endswith("}\n") and text.count("\n") == 1
    assert json.loads(text) == document(troubled_diff)


def test_csv_has_every_digit(diff: Diff) -> None:
    table = list(csv.DictReader(io.StringIO(export(diff, "csv"))))
    assert [row["name"] for row in table] == [facts.name for facts in diff.tensors]
    measured = diff.columns["unchanged_abs_1e-05"] / diff.columns["numel"]
    np.testing.assert_array_equal([float(row["unchanged_abs_1e-05"]) for row in table], measured)
    assert table[0]["shape"] == "4096x512"
    assert table[0]["low_coverage_0.1"] == repr(diff.per_tensor[0]["low_coverage"]["0.1"])


def test_csv_leaves_undefined_cells_empty_and_names_harmless(troubled_diff: Diff) -> None:
    text = export(troubled_diff, "csv")
    table = {row["name"]: row for row in csv.DictReader(io.StringIO(text))}
    assert table["empty"]["unchanged_bitwise"] == ""
    assert table["position_ids"]["rel_norm"] == ""
    assert "\x1b" not in text and "evil\\x1b[31m\\x0a\\u202ename[red]" in table


def test_csv_of_groups(diff: Diff) -> None:
    table = list(csv.DictReader(io.StringIO(export(diff, "csv", View("layer")))))
    assert [(row["tower"], row["layer"], row["tensors"]) for row in table] == [
        ("language", "0", "8"),
        ("language", "1", "8"),
    ]


def test_parquet_has_typed_columns(troubled_diff: Diff) -> None:
    table = parquet(troubled_diff).read()
    assert table.column("name").to_pylist() == [facts.name for facts in troubled_diff.tensors]
    assert str(table.schema.field("changed").type) == "int64"
    assert str(table.schema.field("low_coverage_0.1").type) == "double"
    assert table.column("shape").to_pylist()[0] == [64, 32]
    assert table.column("unchanged_bitwise").to_pylist()[3] is None
    assert table.column("changed").to_pylist() == [row["changed"] for row in troubled_diff.per_tensor]


def test_parquet_says_where_it_comes_from(diff: Diff) -> None:
    facts = json.loads(parquet(diff).schema_arrow.metadata[b"ckptdiff"])
    assert facts["base"]["path"] == "models/Llama-small" and facts["mask_rule"] == "abs:1e-05"


def test_parquet_of_no_rows(make_diff) -> None:
    assert parquet(make_diff(), View("group")).read().num_rows == 0


def test_missing_pyarrow_names_the_extra(diff: Diff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(OptionError, match="pyarrow") as caught:
        as_parquet.write(diff, io.TextIOWrapper(io.BytesIO()), View())
    assert "ckptdiff[parquet]" in str(caught.value)


@pytest.mark.parametrize("name", ["json", "ndjson", "csv"])
def test_plain_formats_need_neither_rich_nor_pyarrow(name: str) -> None:
    code = (
        "import sys\n"
        f"import ckptdiff.report.as_{name}\n"
        "assert not {'rich', 'pyarrow', 'h5py', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
