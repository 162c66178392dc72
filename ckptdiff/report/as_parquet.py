"""The parquet report: one row per tensor, or per member of another grouping, through pyarrow."""

from __future__ import annotations

import io
from typing import Any, TextIO

from ckptdiff.errors import OptionError
from ckptdiff.figures.catalogue import FIGURES, flat_keys
from ckptdiff.figures.result import Diff
from ckptdiff.figures.spectral import SPECTRAL_KEYS
from ckptdiff.report.as_json import facts
from ckptdiff.report.rows import SPECTRAL, View, flat_columns, flatten, rows
from ckptdiff.report.text import dumps

_INTEGERS = {"layer", "tensors", "numel", f"{SPECTRAL}_matrices", f"{SPECTRAL}_rank"}
_COUNTED = {flat for figure in FIGURES if figure.unit == "count" for _, flat in flat_keys(figure)}
_FIGURES = {flat for figure in FIGURES for _, flat in flat_keys(figure)} | {
    f"{SPECTRAL}_{key}" for key in SPECTRAL_KEYS
}


def require_pyarrow() -> None:
    """Raise an OptionError if pyarrow is missing, before a long run rather than after it."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise OptionError(
            "--format parquet needs pyarrow, which is not installed",
            hint="pip install 'ckptdiff[parquet]', or --format csv",
        ) from None


def write(diff: Diff, stream: TextIO, view: View) -> None:
    """Write a Parquet file to the stream's bytes; the facts of the run are JSON in the metadata key "ckptdiff"."""
    require_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    members = [dict(flatten(row)) for row in rows(diff, view)]
    keys = flat_columns(view.rows_by, spectra=diff.spectra is not None)
    fields = [pa.field(key, _type(pa, key)) for key in keys]
    schema = pa.schema(fields, metadata={"ckptdiff": dumps(facts(diff))})
    columns = [pa.array([row.get(field.name) for row in members], field.type) for field in fields]
    # Made in memory, because a pipe cannot tell its position: a row is some 400 bytes.
    whole = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), whole)
    stream.flush()
    stream.buffer.write(whole.getbuffer())


def _type(pa: Any, key: str) -> Any:
    if key in _INTEGERS or key in _COUNTED:
        return pa.int64()
    if key in _FIGURES:
        return pa.float64()
    return {"shape": pa.list_(pa.int64()), "groups": pa.list_(pa.string())}.get(key, pa.string())
