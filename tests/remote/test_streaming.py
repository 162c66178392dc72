"""Runs over HTTP: every digit and mask is that of the local run, and a run that fails leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from quantised import LAYOUTS, save
from ranged_server import Asked, Handler, Server
from safetensors.numpy import save_file

from ckptdiff import patch as exact
from ckptdiff.checkpoint import open_checkpoint
from ckptdiff.checkpoint.boxes import read_elements
from ckptdiff.checkpoint.encodings import find_encoded
from ckptdiff.checkpoint.open_shards import open_shards
from ckptdiff.cli import main
from ckptdiff.errors import ChangedFileError, CheckpointError, OptionError, RunFileError
from ckptdiff.figures.result import Diff
from ckptdiff.files.unfinished import Saving
from ckptdiff.options import MaskRule, Options, SpectraOptions
from ckptdiff.run.engine import run
from ckptdiff.run.planning import prepare
from ckptdiff.run.tasks import FETCHED, GRAIN, Grain
from ckptdiff.runfile.reader import RunFile
from ckptdiff.track import track

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures"
CASES = ("llama", "wide", "tied", "vlm", "moe", "fp8", "odd")
BLOCK = 1 << 20
SECRET = "c2VjcmV0"


@pytest.fixture
def pair(server: Server) -> tuple[Path, Path]:
    """Two folders of two shards: tensors of several blocks and many small ones."""
    rng = np.random.default_rng(5)
    sides = server.root / "base", server.root / "tuned"
    shards: list[dict[str, Any]] = [
        {"layers.0.up.weight": rng.normal(0, 0.02, (1500, 2000)).astype(np.float32)},
        {f"layers.{layer}.norm.weight": rng.normal(0, 0.02, 301).astype(np.float16) for layer in range(40)},
    ]
    shards[1]["head.weight"] = rng.normal(0, 0.02, (1100, 1000)).astype(np.float16)
    for number, side in enumerate(sides):
        side.mkdir()
        names = {}
        for index, shard in enumerate(shards):
            file = f"model-{index + 1:05d}-of-00002.safetensors"
            moved = {
                name: np.where(rng.random(values.shape) < 0.2 * number, values * values.dtype.type(1.01), values)
                for name, values in shard.items()
            }
            save_file(moved, side / file)
            names |= dict.fromkeys(shard, file)
        (side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return sides


def figures_of(diff: Diff) -> dict[str, Any]:
    held = {name: values.tobytes() for name, values in diff.columns.items()}
    if diff.spectra is not None:
        held |= {f"spectra {name}": values.tobytes() for name, values in diff.spectra.columns.items()}
    return held


def masks_of(file: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not name.startswith("tensors/") and item.dtype.kind in "uif":
            found[name] = item[()].tobytes()

    with h5py.File(file) as opened:
        opened.visititems(take)
    assert found
    return found


VARIANTS = {
    "as it is": (Options(), Grain()),
    "in small tasks": (Options(threads=3), Grain(blocks=1, tensors=3, many=1)),
    "mapped": (Options(threads=2, io="mmap"), Grain(blocks=2)),
    "in two passes": (Options(threads=2, mask=MaskRule("top", 10.0), compare="stored"), Grain(blocks=1)),
    "with spectra": (Options(threads=2, spectra=SpectraOptions(block=16, steps=8), include=("*head*",)), Grain()),
    "with little memory": (Options(threads=2, max_memory=1), Grain(blocks=1)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mixed", [False, True])
def test_every_digit_and_mask_is_that_of_the_local_run(
    server: Server, pair: tuple[Path, Path], tmp_path: Path, variant: str, mixed: bool
) -> None:
    base, tuned = map(str, pair)
    options, grain = VARIANTS[variant]
    if options.max_memory:
        least = prepare(base, f"{server.url}/tuned", options=replace(options, max_memory=0), grain=grain).memory
        options = replace(options, max_memory=least.of(1) + (300 << 20))
    local = run(base, tuned, out=tmp_path / "local.h5", options=options, grain=grain)
    first = base if mixed else f"{server.url}/base"
    remote = run(first, f"{server.url}/tuned", out=tmp_path / "remote.h5", options=options, grain=grain)
    assert figures_of(remote) == figures_of(local)
    assert masks_of(tmp_path / "remote.h5") == masks_of(tmp_path / "local.h5")
    assert len(remote.tensors) == len(local.tensors) > 0
    assert remote.tuned["path"] == f"{server.url}/tuned"


@pytest.mark.parametrize("case", CASES)
def test_every_fixture_gives_what_it_gives_locally(
    server: Server, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FIXTURES / case, server.root / case)
    found = []
    for where in (FIXTURES / case, f"{server.url}/{case}"):
        capsys.readouterr()
        code = main(["diff", f"{where}/base", f"{where}/tuned", "--format", "json"])
        document = json.loads(capsys.readouterr().out)
        found.append((code, document["global"], document["tensors"], document.get("only_in_base")))
    assert found[0] == found[1]


@pytest.mark.parametrize("remote", [(), (0,), (1,), (0, 1)])
def test_tasks_are_smaller_where_they_are_fetched(
    server: Server, pair: tuple[Path, Path], remote: tuple[int, ...]
) -> None:
    sides = [f"{server.url}/{path.name}" if i in remote else str(path) for i, path in enumerate(pair)]
    assert prepare(*sides).grain == (FETCHED if remote else GRAIN)
    assert FETCHED.blocks < GRAIN.blocks and prepare(*sides, grain=Grain(blocks=3)).grain.blocks == 3


def test_each_byte_is_fetched_once_by_few_requests(server: Server, pair: tuple[Path, Path]) -> None:
    for side in pair:
        checkpoint = open_checkpoint(f"{server.url}/{side.name}")
        assert [shard.size for shard in checkpoint.shards] == [
            file.stat().st_size for file in sorted(side.glob("*.safetensors"))
        ]
    server.asked.clear()
    run(*(f"{server.url}/{side.name}" for side in pair), options=Options(threads=2), grain=Grain(blocks=1))
    for side in pair:
        for file in sorted(side.glob("*.safetensors")):
            spans = [
                span
                for asked in server.asked
                if asked.path.endswith(f"{side.name}/{file.name}")
                if (span := asked.range) and span[0]
            ]
            data = sum(tensor.nbytes for tensor in open_checkpoint(file).tensors.values())
            assert sum(stop - start for start, stop in spans) == data
            assert len(spans) <= 4, "forty small tensors are one range"


def test_what_both_names_lead_to_is_fetched_once(server: Server, pair: tuple[Path, Path]) -> None:
    found = run(f"{server.url}/base", f"{server.url}/base", options=Options())
    assert all(tensor.same_bytes for tensor in found.tensors)
    fetched = sum(stop - start for start, stop in server.ranges_of(".safetensors") if start)
    assert fetched == open_checkpoint(pair[0]).nbytes


def test_columns_of_a_matrix_are_read_by_few_requests(server: Server) -> None:
    values = np.arange(3000 * 400, dtype=np.int32).reshape(3000, 400)
    save_file({"w": values}, server.root / "x.safetensors")
    tensor = open_checkpoint(f"{server.url}/x.safetensors").tensors["w"]
    server.asked.clear()
    with open_shards("pread") as shards:
        out = np.empty((2000, 40), np.uint8)
        shards[tensor.shard].read_rows(tensor, tensor.start + 100 * 1600 + 80, 1600, out)
        assert np.array_equal(out.view(np.int32), values[100:2100, 20:30])
        assert len(server.asked) == 1
        # What is read in order is fetched ahead.
        for start in range(tensor.start, tensor.stop, 40_000):
            stop = min(start + 40_000, tensor.stop)
            with shards[tensor.shard].window(tensor, start, stop, out) as view:
                assert view.tobytes() == values.tobytes()[start - tensor.start : stop - tensor.start]
        assert len(server.asked) <= 4


@pytest.mark.parametrize("layout", ["4 bits in words, zero points", "NVFP4 of ModelOpt", "fp8 of fused experts"])
def test_quantised_weights_decode_to_what_they_do_locally(server: Server, layout: str) -> None:
    folder = server.root / "quantised"
    sample = LAYOUTS[layout](np.random.default_rng(1), 256, 512)
    save(folder, sample.tensors, sample.config)
    found = []
    for where in (str(folder), f"{server.url}/quantised"):
        encoded = find_encoded(open_checkpoint(where))
        (weight,) = encoded.weights.values()
        values = np.empty(weight.numel, np.float32)
        with open_shards("pread") as shards:
            read_elements(shards, weight, 0, weight.numel, values.view(np.uint8))
        found.append((weight.shape, weight.encoding, encoded.warnings, values.tobytes()))
    assert found[0][3] == found[1][3] and found[0][:2] == found[1][:2]


def test_long_headers_and_files_of_one_name_are_read(server: Server, tmp_path: Path) -> None:
    many = {f"a_long_name_that_fills_a_header_{n:06d}": np.full(1, n, np.int32) for n in range(9000)}
    save_file(many, server.root / "many.safetensors")
    assert (server.root / "many.safetensors").stat().st_size > 1 << 19
    remote = open_checkpoint(f"{server.url}/many.safetensors")
    local = open_checkpoint(server.root / "many.safetensors")
    assert remote.shards[0].header_sha256 == local.shards[0].header_sha256
    assert [(t.name, t.start, t.stop) for t in remote.tensors.values()] == [
        (t.name, t.start, t.stop) for t in local.tensors.values()
    ]
    assert len(server.ranges_of("many.safetensors")) == 2
    # One path, of which only the query tells which file it is.
    for n in (1, 2):
        save_file({"w": np.full(5, n, np.float32)}, server.root / f"{n}.safetensors")

    def by_query(handler: Handler, asked: Asked) -> bool:
        if not asked.path.startswith("/download"):
            return False
        handler.give(replace(asked, path=f"/{asked.path[-1]}.safetensors"))
        return True

    server.answer = by_query
    found = run(f"{server.url}/download?id=1", f"{server.url}/download?id=2", options=Options())
    assert found.columns["changed"].tolist() == [5]


def test_a_track_and_an_inspection_are_those_of_the_files(
    server: Server, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = pair
    local = track(base, [tuned, base])
    remote = track(f"{server.url}/base", [f"{server.url}/tuned", base])
    assert all(np.array_equal(local.counts[key], remote.counts[key]) for key in local.counts)
    assert np.array_equal(local.delta_norms, remote.delta_norms) and np.array_equal(local.base_norms, remote.base_norms)
    found = []
    for where in (base, f"{server.url}/base"):
        assert main(["inspect", str(where), "--format", "json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["tensors"])
    assert found[0] == found[1]


def test_patches_of_a_run_that_lies_elsewhere_take_each_byte_once(
    server: Server, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    local = track(base, [tuned, base], patches=tmp_path / "local")
    server.asked.clear()
    remote = track(f"{server.url}/base", [f"{server.url}/tuned", base], patches=tmp_path / "remote")
    assert all(np.array_equal(local.counts[key], remote.counts[key]) for key in local.counts)
    for side in pair:
        for file in side.glob("*.safetensors"):
            spans = [span for span in server.ranges_of(f"{side.name}/{file.name}") if span[0]]
            data = sum(tensor.nbytes for tensor in open_checkpoint(file).tensors.values())
            assert sum(stop - start for start, stop in spans) == data
    links = sorted((tmp_path / "remote").iterdir())
    exact.apply(base, links[:1], tmp_path / "made")
    assert all((tmp_path / "made" / file.name).read_bytes() == file.read_bytes() for file in tuned.iterdir())


@pytest.mark.parametrize("kind", ["", "-dir", ".safetensors"])
def test_exact_patches_of_sides_that_lie_elsewhere(
    kind: str, server: Server, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    make = {"": exact.make, "-dir": exact.make_directory, ".safetensors": exact.make_flat}[kind]
    base, tuned = (f"{server.url}/{side.name}" for side in pair)
    link = tmp_path / f"patch{kind}"
    make(base, tuned, link)
    exact.apply(base, [link], tmp_path / "made")
    assert {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()} == {
        file.name: file.read_bytes() for file in pair[1].iterdir()
    }
    assert exact.verify(base, [link], tuned).tensors == 42
    with pytest.raises(OptionError, match="where it lies"):
        exact.apply_in_place(base, [link])
    with pytest.raises(OptionError, match="lies elsewhere"):
        exact.apply(base, [link], tmp_path / "no", with_files=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["made", link.name, "served"])


def test_patches_and_overlaps_take_a_base_that_lies_elsewhere(
    server: Server, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = pair
    url, file = f"{server.url}/base", "model-00001-of-00002.safetensors"

    def call(*arguments: object) -> str:
        capsys.readouterr()
        assert main(list(map(str, arguments))) == 0
        return capsys.readouterr().out

    for inside in ("", f"/{file}"):
        run_file, patch = tmp_path / f"run{len(inside)}.h5", tmp_path / f"patch{len(inside)}.safetensors"
        call("diff", f"{url}{inside}", f"{tuned}{inside}", "--mask", "bitwise", "--compare", "stored", "-o", run_file)
        call("mask", "export", run_file, "--layout", "patch", "-o", patch)
        for number, where in enumerate((base, url)):
            made = tmp_path / f"made{number}{inside and '.safetensors'}"
            call("patch", "apply", f"{where}{inside}", patch, "-o", made)
            files = [(made, tuned / file)] if inside else [(made / each.name, each) for each in tuned.iterdir()]
            assert all(ours.read_bytes() == theirs.read_bytes() for ours, theirs in files)
            if not inside:
                assert len(list(made.iterdir())) == 3
    runs = [tmp_path / "run0.h5"] * 2
    local, remote = (call("overlap", *runs, "--base", where, "--format", "json") for where in (base, url))
    assert json.loads(local) == json.loads(remote)


def hang_up(handler: Handler, asked: Asked) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut_short(handler: Handler, asked: Asked) -> None:
    assert asked.range is not None
    path = handler.served.root / asked.path.partition("?")[0].lstrip("/")
    start, stop = asked.range
    facts = {"Content_Range": f"bytes {start}-{stop - 1}/{path.stat().st_size}", "ETag": f'"{path.stat().st_mtime_ns}"'}
    handler.reply(206, bytes(stop - start), cut=0, **facts)


FAULTS: dict[str, tuple[Callable[[Handler, Asked], object], str, str]] = {
    "403": (lambda handler, asked: handler.reply(403), "HTTP 403 Forbidden", "check that these credentials"),
    "404": (lambda handler, asked: handler.reply(404), "HTTP 404 Not Found", "check the name"),
    "416": (lambda handler, asked: handler.reply(416), "HTTP 416", "look at what the host says"),
    "429": (lambda handler, asked: handler.reply(429), "HTTP 429 Too Many Requests", "CKPTDIFF_RETRY_SECONDS"),
    "500": (lambda handler, asked: handler.reply(500), "HTTP 500 Internal Server Error", "CKPTDIFF_RETRY_SECONDS"),
    "503": (lambda handler, asked: handler.reply(503), "HTTP 503 Service Unavailable", "CKPTDIFF_RETRY_SECONDS"),
    "cut short": (cut_short, "an answer cut short after 0 of", "CKPTDIFF_RETRY_SECONDS"),
    "length": (lambda handler, asked: handler.give(asked, Content_Length="12"), ", 12 bytes", "a copy on disk"),
    "range": (lambda handler, asked: handler.give(asked, Content_Range=""), "no range", "a copy on disk"),
    "200": (lambda handler, asked: handler.reply(200, b"x"), "206 Partial Content", "a copy on disk"),
    "replaced": (lambda handler, asked: handler.give(asked, ETag='"new"'), "replaced", "nothing writes to"),
    "hung up": (hang_up, "the file cannot be fetched", "look at the network"),
}
"""An answer, what is said of it, and what to do."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_host_that_fails_in_between_ends_the_run_and_leaves_nothing(
    server: Server,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    monkeypatch.setenv("CKPTDIFF_RETRY_SECONDS", "0.2")
    answer, said, hint = FAULTS[fault]

    def later(handler: Handler, asked: Asked) -> bool:
        return bool(asked.range and asked.range[0]) and answer(handler, asked) is None

    server.answer = later
    address = server.url.replace("//", f"//me:{SECRET}@")
    out = tmp_path / "out"
    out.mkdir()
    assert main(["diff", f"{address}/base", str(pair[1]), "-o", str(out / "run.h5"), "-v"]) == 2
    told = capsys.readouterr()
    lines = {line.split()[0]: line for line in told.err.splitlines() if line.startswith("  ")}
    assert said in told.err and f"{server.url}/base/model-0000" in lines["file:"] and hint in lines["try:"], told.err
    assert "expected:" in lines and "found:" in lines
    assert SECRET not in told.err + told.out and list(out.iterdir()) == []


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_a_host_that_is_not_there_is_said(
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
) -> None:
    monkeypatch.setenv("CKPTDIFF_RETRY_SECONDS", "0.2")
    url = f"http://me:{SECRET}@{host}/base.safetensors?sig={SECRET}"
    out = tmp_path / "out"
    out.mkdir()
    assert main(["diff", url, str(pair[1]), "-o", str(out / "run.h5"), "-v"]) == 2
    told = capsys.readouterr().err
    assert "tried again for 0.2 seconds" in told and f"http://{host}/base.safetensors?..." in told, told
    assert "look at the network and the host" in told and SECRET not in told and list(out.iterdir()) == []


def test_a_file_that_is_replaced_after_its_last_byte_was_read_is_noticed(
    server: Server, pair: tuple[Path, Path]
) -> None:
    def at_last(handler: Handler, asked: Asked) -> bool:
        return asked.range == (0, 1) and handler.give(asked, ETag='"new"') is None

    server.answer = at_last
    with pytest.raises(ChangedFileError, match="replaced"):
        run(f"{server.url}/base", str(pair[1]), options=Options())


@pytest.mark.parametrize("where", ["nothing", "base/absent.safetensors", "base/absent.index.json"])
def test_what_is_not_there_is_said(server: Server, pair: tuple[Path, Path], where: str) -> None:
    with pytest.raises(CheckpointError, match="no such file") as raised:
        open_checkpoint(f"{server.url}/{where}")
    assert server.url in str(raised.value)


def test_an_index_leads_nowhere_else(server: Server) -> None:
    index = server.root / "model.safetensors.index.json"
    for name, said in (("../x.safetensors", "outside its folder"), ("x.bin", "pickle"), ("https://h/x", "outside")):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(server.url)


def test_a_file_that_is_replaced_is_not_gone_on_with(
    server: Server, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it has the same header, size and time, as the steps of a training have where the host tells no time."""
    out, urls = tmp_path / "run.h5", [f"{server.url}/{side.name}" for side in pair]
    tags = ["one"]
    server.answer = lambda handler, asked: (
        asked.path.endswith(".safetensors") and (handler.give(asked, ETag=f'"{tags[-1]}"') is None)
    )

    def give_up(event: object) -> None:
        if type(event).__name__ == "TensorsDone":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(*urls, out=out, options=Options(), listener=give_up, saving=Saving(0, 0))
    tags.append("two")
    with pytest.raises(RunFileError, match="belongs to another run"):
        run(*urls, out=out, options=Options(), saving=Saving(0, 0))
    tags.append("one")
    run(*urls, out=out, options=Options(), saving=Saving(0, 0))
    local = run(*map(str, pair), out=tmp_path / "local.h5", options=Options())
    with RunFile(out) as file:
        assert figures_of(file.load()) == figures_of(local)
    assert masks_of(out) == masks_of(tmp_path / "local.h5")


def test_secrets_are_in_no_message_and_no_file(
    server: Server, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = server.url.replace("//", f"//me:{SECRET}@")
    file = "model-00001-of-00002.safetensors"
    out = tmp_path / "run.h5"
    sides = [f"{address}/{side}/{file}?X-Amz-Signature={SECRET}" for side in ("base", "tuned")]
    assert main(["diff", *sides, "-o", str(out), "--format", "json", "-v"]) == 0
    told = capsys.readouterr()
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"{server.url}/base/{file}?..." in told.out
    for text in (told.out, told.err, shown.out, out.read_bytes().decode("latin-1")):
        assert SECRET not in text

    def give_up(event: object) -> None:
        if type(event).__name__ == "TensorsDone":
            raise KeyboardInterrupt

    # Nor in what an unfinished run keeps, in its page, or in what other commands say and write of it.
    with pytest.raises(KeyboardInterrupt):
        run(*sides, out=tmp_path / "kept.h5", options=Options(), listener=give_up, saving=Saving(0, 0))
    assert any((tmp_path / "kept.h5.part").iterdir())
    for words in (
        ["report", str(out), "-o", str(tmp_path / "page.html")],
        ["spectra", "add", str(out), "--base", sides[0], "--tuned", sides[1], "-v"],
        ["track", *sides, "-o", str(tmp_path / "track.h5"), "-v"],
        ["lora", *sides, "--rank", "1", "-o", str(tmp_path / "adapter"), "--format", "json"],
        ["patch", "make", *sides, "-o", str(tmp_path / "step.ckptdelta")],
        ["mask", "export", str(out), "--layout", "patch", "--tuned", sides[1], "-o", str(tmp_path / "m.safetensors")],
        ["inspect", sides[0], "--format", "json"],
        ["claims", *sides, "--spectra", "randomized", "--format", "json"],
        ["spectra", "add", str(out), "-v"],
    ):
        main(words)
        told = capsys.readouterr()
        assert SECRET not in told.out + told.err, words
    written = [path for path in tmp_path.rglob("*") if path.is_file() and server.root not in path.parents]
    assert len(written) > 6
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
