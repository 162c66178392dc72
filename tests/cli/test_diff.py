"""``ckptdiff diff`` over a fake engine: options, reports, exit codes."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine

from ckptdiff.errors import HeaderError
from ckptdiff.figures.result import Diff
from ckptdiff.options import MaskRule, Options
from ckptdiff.report.as_json import document
from ckptdiff.report.as_ndjson import lines
from ckptdiff.report.rows import View

Cli = Callable[..., Any]


def identical(diff: Diff) -> Diff:
    columns = {**diff.columns, "unchanged_bitwise": diff.columns["numel"], "unchanged_stored": diff.columns["numel"]}
    return replace(diff, columns=columns)


def test_options_reach_the_engine(cli: Cli, engine: FakeEngine, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    code, _, _ = cli(
        *(
            "diff",
            "base",
            "tuned",
            "-o",
            out,
            "--title",
            "t",
            "--compare",
            "stored",
            "--mask",
            "top:20",
            "--map",
            "a=b",
        ),
        *("--map", "c=d", "--include", "*.weight", "--exclude", "*norm*", "--group", "g=q_proj", "--device", "cpu"),
        *("--threads", "3", "--max-memory", "2G", "--io", "pread"),
    )
    assert code == 0
    options = Options(
        compare="stored",
        mask=MaskRule("top", 20.0),
        renames=("a=b", "c=d"),
        include=("*.weight",),
        exclude=("*norm*",),
        groups=("g=q_proj",),
        device="cpu",
        threads=3,
        max_memory=2 << 30,
        io="pread",
    )
    assert engine.calls == [{"base": "base", "tuned": "tuned", "out": out, "options": options, "title": "t"}]


def test_defaults_are_the_librarys(cli: Cli, engine: FakeEngine) -> None:
    assert cli("diff", "base", "tuned").code == 0
    assert engine.calls[0]["options"] == Options() and engine.calls[0]["out"] is None


def test_the_table_is_the_default(cli: Cli, engine: FakeEngine, tmp_path: Path) -> None:
    code, out, err = cli("diff", "base", "tuned", "-o", tmp_path / "run.h5")
    assert code == 0 and err == ""
    assert (
        out.splitlines()[1].startswith("Llama-small -> Llama-small-OPD") and f"ckptdiff show {tmp_path}/run.h5" in out
    )
    assert "\x1b" not in out


@pytest.mark.parametrize(("form", "read"), [
    ("json", json.loads),
    ("csv", lambda text: list(csv.DictReader(io.StringIO(text)))),
])  # fmt: skip
def test_other_formats(cli: Cli, engine: FakeEngine, form: str, read: Callable[[str], object]) -> None:
    code, out, err = cli("diff", "base", "tuned", "--format", form)
    assert code == 0 and err == ""
    assert read(out)
    if form == "json":
        assert read(out) == document(engine.diff)


def test_ndjson_streams_the_bytes_of_the_finished_diff(cli: Cli, engine: FakeEngine) -> None:
    assert cli("diff", "base", "tuned", "--format", "ndjson").out == "".join(lines(engine.diff, View()))
    sorted_view = View("module", "rel_norm", 2)
    code, out, _ = cli("diff", "a", "b", "--format", "ndjson", "--by", "module", "--sort", "rel_norm", "--top", "2")
    assert (code, out) == (0, "".join(lines(engine.diff, sorted_view)))


@pytest.mark.parametrize("form", ["table", "json", "ndjson", "csv", "parquet"])
def test_reports_go_to_files_whole(cli: Cli, engine: FakeEngine, form: str, tmp_path: Path) -> None:
    target = tmp_path / "report"
    target.write_text("before")
    code, out, _ = cli("diff", "base", "tuned", "--format", form, "-O", target)
    assert code == 0 and out == ""
    assert target.stat().st_size > 1000
    engine.error = RuntimeError("halfway")
    kept = target.read_bytes()
    assert cli("diff", "base", "tuned", "--format", form, "-O", target).code == 2
    assert target.read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_report_with_a_name_as_long_as_can_be(cli: Cli, engine: FakeEngine, tmp_path: Path) -> None:
    name = "\N{SNOWMAN}" * 85
    assert cli("diff", "base", "tuned", "-O", tmp_path / name).code == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_dash_is_stdout(cli: Cli, engine: FakeEngine) -> None:
    assert json.loads(cli("diff", "base", "tuned", "--format", "json", "-O", "-").out)


def test_exit_code_asks_whether_anything_differs(cli: Cli, engine: FakeEngine) -> None:
    assert cli("diff", "a", "b").code == 0
    assert cli("diff", "a", "b", "--exit-code").code == 1
    engine.diff = identical(engine.diff)
    assert cli("diff", "a", "b", "--exit-code").code == 0
    engine.diff = replace(engine.diff, only_in_tuned=("extra",))
    assert cli("diff", "a", "b", "--exit-code").code == 1


def test_quiet_prints_nothing_and_implies_exit_code(cli: Cli, engine: FakeEngine, tmp_path: Path) -> None:
    engine.diff = replace(engine.diff, warnings=("odd",))
    for form in ("table", "json", "ndjson", "csv", "parquet"):
        assert cli("diff", "a", "b", "-q", "--format", form, "--fail-if", "counts.matched>0") == (1, "", "")
    engine.diff = identical(engine.diff)
    assert cli("diff", "a", "b", "-q") == (0, "", "")
    assert cli("diff", "a", "b", "-q", "-o", tmp_path / "run.h5") == (0, "", "")
    assert (tmp_path / "run.h5").exists()


def test_a_failed_check_is_named(cli: Cli, engine: FakeEngine) -> None:
    code, out, err = cli(
        *("diff", "a", "b", "--fail-if", "global.unchanged_abs.1e-05<0.999", "--fail-if", "counts.only_in_base>0"),
        *("--fail-if", "modules.q_proj.rel_norm>0"),
    )
    assert code == 1 and "Llama" in out
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        "ckptdiff: check failed: global.unchanged_abs.1e-05<0.999",
        "ckptdiff: check failed: modules.q_proj.rel_norm>0",
    ]


@pytest.mark.parametrize("arguments", [
    ["--fail-if", "nonsense"],
    ["--fail-if", "global.nonsense<1"],
    ["--sort", "nonsense"],
    ["--top", "0"],
    ["--mask", "sometimes"],
    ["--max-memory", "lots"],
    ["--group", "g=("],
    ["--threads", "-1"],
    ["-O", "/nowhere/report"],
    ["-O", "."],
])  # fmt: skip
def test_bad_options_end_before_the_run(cli: Cli, engine: FakeEngine, arguments: list[str]) -> None:
    code, out, err = cli("diff", "a", "b", *arguments)
    assert code == 2 and out == "" and err.startswith("ckptdiff: error: ")
    assert engine.calls == []


def test_unknown_members_end_before_data_is_read(cli: Cli, engine: FakeEngine) -> None:
    engine.error = AssertionError("data was read")
    code, _, err = cli("diff", "a", "b", "--fail-if", "modules.router.rel_norm>0")
    assert code == 2 and "nothing of that name in modules" in err


def test_an_undefined_figure_is_trouble(cli: Cli, engine: FakeEngine) -> None:
    engine.diff = identical(engine.diff)
    code, out, err = cli("diff", "a", "b", "--fail-if", "global.unchanged_stored<1")
    assert code == 2 and "Llama" in out and "undefined" in err


def test_a_report_never_replaces_inputs(cli: Cli, engine: FakeEngine, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shard = base / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"weights")
    (tmp_path / "link").hardlink_to(shard)
    for target in (shard, tmp_path / "link"):
        code, _, err = cli("diff", base, "tuned", "-O", target)
        assert code == 2 and "would replace" in err and shard.read_bytes() == b"weights"
    run = tmp_path / "run.h5"
    assert cli("diff", base, "tuned", "-o", run, "-O", run).code == 2
    assert engine.calls == []


def test_reports_to_special_files(cli: Cli, engine: FakeEngine) -> None:
    assert cli("diff", "a", "b", "-O", "/dev/null") == (0, "", "")


def test_known_errors_are_shown_safely(cli: Cli, engine: FakeEngine) -> None:
    engine.error = HeaderError(
        "size that disagrees with shape and dtype",
        file="a\x1b[2J.safetensors",
        tensor="evil\nckptdiff: all is well",
        expected=4,
        found="\u202e8",
        hint="download it again\nand again",
    )
    code, out, err = cli("diff", "a", "b")
    assert (code, out) == (2, "")
    assert err == (
        "ckptdiff: error: size that disagrees with shape and dtype\n"
        "  file:     a\\x1b[2J.safetensors\n"
        "  tensor:   evil\\x0ackptdiff: all is well\n"
        "  expected: 4\n"
        "  found:    \\u202e8\n"
        "  try:      download it again\n"
        "            and again\n"
    )


@pytest.mark.parametrize(("error", "code", "message"), [
    (MemoryError(), 2, "out of memory"),
    (PermissionError(13, "Permission denied", "x\x1b"), 2, "Permission denied: x\\x1b"),
    (ZeroDivisionError("oh"), 2, "unexpected ZeroDivisionError: oh"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (BrokenPipeError(), 141, ""),
])  # fmt: skip
def test_every_end_has_its_code(cli: Cli, engine: FakeEngine, error: BaseException, code: int, message: str) -> None:
    engine.error = error
    found, out, err = cli("diff", "a", "b")
    assert (found, out) == (code, "") and message in err
    assert "Traceback" not in err


def test_tracebacks_are_for_those_who_ask(cli: Cli, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.error = ZeroDivisionError("oh")
    assert "Traceback" in cli("diff", "a", "b", "-v").err
    monkeypatch.setenv("CKPTDIFF_DEBUG", "1")
    assert "Traceback" in cli("diff", "a", "b").err


def test_notes(cli: Cli, engine: FakeEngine) -> None:
    engine.diff = replace(engine.diff, warnings=("odd",))
    _, out, err = cli("diff", "a", "b")
    assert "warning: odd" in out and err == ""
    assert cli("diff", "a", "b", "--format", "json").err == "ckptdiff: warning: odd\n"
    assert "reading with mmap" in cli("diff", "a", "b", "-v").err


def test_dry_run(cli: Cli, engine: FakeEngine) -> None:
    code, out, err = cli("diff", "a", "b", "--dry-run")
    assert (code, err) == (0, "")
    assert "read      2 GB by mmap" in out and "300 MiB at most, of 400 MiB allowed" in out
    plan = json.loads(cli("diff", "a", "b", "--dry-run", "--format", "json").out)
    assert plan["schema"] == "ckptdiff.plan/1" and plan["total_bytes"] == 2_000_000_000
    assert cli("diff", "a", "b", "--dry-run", "-v").err.startswith("ckptdiff: compiling kernels")
    assert cli("diff", "a", "b", "--dry-run", "--format", "csv").code == 2
    assert cli("diff", "a", "b", "--dry-run", "--fail-if", "layers.99.rel_norm>0").code == 2
    assert engine.calls == []


def test_parquet_is_not_for_terminals(cli: Cli, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, _, err = cli("diff", "a", "b", "--format", "parquet")
    assert code == 2 and "--output" in err and engine.calls == []
