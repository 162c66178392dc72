"""The rows of a diff as a table of another library: pyarrow or pandas, where they are installed."""

from __future__ import annotations

from typing import Any

from ckptdiff.errors import OptionError
from ckptdiff.figures.catalogue import FIGURES, flat_keys
from ckptdiff.figures.members import GroupBy
from ckptdiff.figures.result import Diff
from ckptdiff.figures.spectral import SPECTRAL_KEYS
from ckptdiff.report.as_json import facts
from ckptdiff.report.rows import SPECTRAL, View, flat_columns, flatten, rows
from ckptdiff.report.text import dumps

_INTEGERS = {"layer", "tensors", "numel", f"{SPECTRAL}_matrices", f"{SPECTRAL}_rank"}
_INTEGERS |= {flat for figure in FIGURES if figure.unit == "count" for _, flat in flat_keys(figure)}
_FLOATS = {flat for figure in FIGURES if figure.unit != "count" for _, flat in flat_keys(figure)}
_FLOATS |= {f"{SPECTRAL}_{key}" for key in SPECTRAL_KEYS}
_LISTS = ("shape", "groups")


def require_pyarrow(wanted: str = "a pyarrow table", instead: str = "") -> None:
    """Raise an OptionError if pyarrow is missing, before a long run rather than after it."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise OptionError(
            f"{wanted} needs pyarrow, which is not installed", hint=f"pip install 'ckptdiff[parquet]'{instead}"
        ) from None


def arrow_table(diff: Diff, by: GroupBy = "tensor", view: View | None = None) -> Any:
    """The rows of a view, or of a grouping, as a pyarrow Table.

    The facts of the run are JSON in the metadata key "ckptdiff".
    """
    require_pyarrow()
    import pyarrow as pa

    def type_of(key: str) -> Any:
        if key in _LISTS:
            return pa.list_(pa.int64() if key == "shape" else pa.string())
        return pa.int64() if key in _INTEGERS else pa.float64() if key in _FLOATS else pa.string()

    columns = _columns(diff, view or View(by))
    fields = [pa.field(key, type_of(key)) for key in columns]
    schema = pa.schema(fields, metadata={"ckptdiff": dumps(facts(diff))})
    return pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in fields], schema=schema)


def pandas_frame(diff: Diff, by: GroupBy = "tensor") -> Any:
    """The rows of a grouping as a pandas DataFrame; counts are Int64, which knows what is missing."""
    try:
        import pandas
    except ImportError:
        raise OptionError(
            "a data frame needs pandas, which is not installed",
            hint="pip install pandas, or to_arrow()",
        ) from None

    def dtype_of(key: str) -> str:
        return "Int64" if key in _INTEGERS else "float64" if key in _FLOATS else "object"

    columns = _columns(diff, View(by))
    return pandas.DataFrame({key: pandas.Series(cells, dtype=dtype_of(key)) for key, cells in columns.items()})


def _columns(diff: Diff, view: View) -> dict[str, list[Any]]:
    """Cells of each column of csv, in its order."""
    members = [dict(flatten(row)) for row in rows(diff, view)]
    return {
        key: [row.get(key) for row in members] for key in flat_columns(view.rows_by, spectra=diff.spectra is not None)
    }
