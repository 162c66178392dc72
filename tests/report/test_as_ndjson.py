"""ndjson lines stream out of a run as the same bytes that a finished diff gives."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from ckptdiff.events import Finished, StageProgress, Started, TensorsDone
from ckptdiff.figures.result import Diff
from ckptdiff.report.as_json import document
from ckptdiff.report.as_ndjson import NdjsonStream, lines, streams
from ckptdiff.report.rows import View


def started(diff: Diff) -> Diff:
    return replace(diff, columns={name: values[:0] for name, values in diff.columns.items()}, warnings=(), run={})


def single(diff: Diff, row: int) -> Diff:
    columns = {name: values[row : row + 1] for name, values in diff.columns.items()}
    return replace(diff, tensors=diff.tensors[row : row + 1], columns=columns)


def test_header_tensors_summary(troubled_diff: Diff) -> None:
    header, *tensors, summary = map(json.loads, lines(troubled_diff, View()))
    whole = document(troubled_diff)
    assert header["type"] == "header" and header["counts"] == whole["counts"]
    assert [line["type"] for line in tensors] == ["tensor"] * 6
    expected = [{"type": "tensor", **row, "delta_energy_share": None} for row in whole["tensors"]]
    assert tensors == expected
    assert summary["type"] == "summary" and summary["global"] == whole["global"]
    assert {**header, **summary, "type": None, "tensors": whole["tensors"]} == {**whole, "type": None}


def test_rows_of_another_grouping(diff: Diff) -> None:
    _, *modules, _ = map(json.loads, lines(diff, View("module", "rel_norm", 3)))
    assert [line["type"] for line in modules] == ["module"] * 3
    assert modules[0]["delta_energy_share"] > 0


@pytest.mark.parametrize("batch", [0.0, 1e9])
@pytest.mark.parametrize("name", ["diff", "troubled_diff"])
def test_a_stream_is_the_same_bytes(name: str, batch: float, request: pytest.FixtureRequest) -> None:
    diff: Diff = request.getfixturevalue(name)
    stream = io.StringIO()
    listener = NdjsonStream(stream, batch)
    listener(Started(len(diff.tensors), 1000, started(diff)))
    for row in range(len(diff.tensors)):
        listener(TensorsDone(row, single(diff, row)))
        listener(StageProgress("comparing", row, "x", 1, 1))
    listener(Finished(diff, 1.0))
    assert stream.getvalue() == "".join(lines(diff, View()))


def test_a_line_does_not_wait_for_the_next_tensor(diff: Diff) -> None:
    stream = io.StringIO()
    listener = NdjsonStream(stream, every=0.0)
    listener(Started(len(diff.tensors), 1000, started(diff)))
    listener(TensorsDone(0, single(diff, 0)))
    assert [json.loads(line)["type"] for line in stream.getvalue().splitlines()] == ["header", "tensor"]


def test_only_plain_tensor_views_stream() -> None:
    assert streams(View()) and streams(View("tensor"))
    assert not any(map(streams, (View("module"), View(sort="rel_norm"), View(top=1))))
