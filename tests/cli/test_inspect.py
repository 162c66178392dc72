"""``ckptdiff inspect`` lists what safetensors wrote."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptdiff
from ckptdiff.errors import ChangedFileError

Cli = Callable[..., Any]
EVIL = "evil\x1b[2J\nname"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    first = {"model.layers.3.mlp.up_proj.weight": np.zeros((4, 6), np.float16), EVIL: np.zeros((), np.int64)}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": np.zeros((10, 4), np.float32)}, folder / "model-00002-of-00002.safetensors")
    return folder


def test_table(cli: Cli, checkpoint: Path) -> None:
    code, out, err = cli("inspect", checkpoint)
    assert (code, err) == (0, "") and "\x1b" not in out
    row = next(line for line in out.splitlines() if "up_proj.weight" in line)
    assert row.split() == [
        *("model.layers.3.mlp.up_proj.weight", "F16", "4x6", "48", "B", "up_proj", "3"),
        "model-00001-of-00002.safetensors",
    ]
    assert out.splitlines()[-1].startswith("3 tensors in 2 shards, 65 values, 216 B (")


def test_json(cli: Cli, checkpoint: Path) -> None:
    listed = json.loads(cli("inspect", checkpoint, "--format", "json").out)
    assert listed["schema"] == "ckptdiff.inspect/1" and listed["bytes"] == 216 and listed["shards"] == 2
    tensors = {row["name"]: row for row in listed["tensors"]}
    assert set(tensors) == {"model.layers.3.mlp.up_proj.weight", EVIL, "lm_head.weight"}
    assert tensors["lm_head.weight"]["shape"] == [10, 4] and tensors["lm_head.weight"]["block"] == "head"
    assert tensors[EVIL]["shape"] == [] and tensors[EVIL]["numel"] == 1


def test_ndjson_and_csv(cli: Cli, checkpoint: Path) -> None:
    rows = [json.loads(line) for line in cli("inspect", checkpoint, "--format", "ndjson").out.splitlines()]
    assert [row["numel"] for row in rows if row["dtype"] == "F32"] == [40]
    table = list(csv.DictReader(io.StringIO(cli("inspect", checkpoint, "--format", "csv").out)))
    assert len(table) == 3 and {row["shape"] for row in table} == {"4x6", "", "10x4"}


def test_globs(cli: Cli, checkpoint: Path) -> None:
    code, out, err = cli("inspect", checkpoint, "--include", "*weight", "--exclude", "lm_head*", "--exclude", "none")
    assert code == 0 and "1 tensor in 1 shard, 24 values" in out
    assert "--exclude none matches no tensor" in err
    assert cli("inspect", checkpoint, "--include", "none").code == 2


def test_to_a_file_but_never_over_a_shard(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "list.txt"
    assert cli("inspect", checkpoint, "-O", target) == (0, "", "")
    assert "up_proj" in target.read_text()
    shard = checkpoint / "model-00001-of-00002.safetensors"
    assert cli("inspect", checkpoint, "-O", shard).code == 2
    assert cli("inspect", checkpoint).code == 0


def test_trouble(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    for path in (tmp_path / "missing", tmp_path / "broken.safetensors"):
        code, out, err = cli("inspect", path)
        assert (code, out) == (2, "") and path.name in err


def test_a_closed_stderr_leaves_the_report_alone(cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    found = cli("inspect", checkpoint, "--include", "nothing", "--include", "*", "--format", "json")
    assert found.code == 0 and len(json.loads(found.out)["tensors"]) == 3


def hash_of(name: str, dtype: str, shape: str, data: bytes) -> str:
    """As the documentation says, of one tensor in memory."""
    xxhash = pytest.importorskip("xxhash", reason="needs xxhash")
    return xxhash.xxh3_128_hexdigest(b"\0".join([name.encode(), dtype.encode(), shape.encode(), data]))


def whole_of(hashes: list[str]) -> str:
    return pytest.importorskip("xxhash").xxh3_128_hexdigest(b"".join(bytes.fromhex(one) for one in sorted(hashes)))


def test_hashes_are_of_names_dtypes_shapes_and_bytes(cli: Cli, checkpoint: Path) -> None:
    expected = {
        "model.layers.3.mlp.up_proj.weight": hash_of("model.layers.3.mlp.up_proj.weight", "F16", "4,6", bytes(48)),
        EVIL: hash_of(EVIL, "I64", "", bytes(8)),
        "lm_head.weight": hash_of("lm_head.weight", "F32", "10,4", bytes(160)),
    }
    found = json.loads(cli("inspect", checkpoint, "--hash", "--format", "json").out)
    assert {row["name"]: row["hash"] for row in found["tensors"]} == expected
    assert found["hash"] == whole_of(list(expected.values()))
    lines = [json.loads(line) for line in cli("inspect", checkpoint, "--hash", "--format", "ndjson").out.splitlines()]
    assert {row["name"]: row["hash"] for row in lines} == expected
    table = csv.DictReader(io.StringIO(cli("inspect", checkpoint, "--hash", "--format", "csv").out))
    assert sorted(row["hash"] for row in table) == sorted(expected.values())
    code, out, err = cli("inspect", checkpoint, "--hash", "--include", "lm_head*")
    assert (code, err) == (0, "") and f"  {expected['lm_head.weight']}" in out
    assert out.splitlines()[-1] == f"xxh3-128 of all that is listed: {whole_of([expected['lm_head.weight']])}"
    plain = json.loads(cli("inspect", checkpoint, "--format", "json").out)
    assert "hash" not in plain and all("hash" not in row for row in plain["tensors"])


def test_the_recipe_of_the_documentation(cli: Cli) -> None:
    pytest.importorskip("xxhash", reason="needs xxhash")
    root = Path(__file__).parents[2]
    (recipe,) = (
        block
        for block in re.findall(r"^```python\n(.*?)^```$", (root / "docs" / "pipelines.md").read_text(), re.M | re.S)
        if "xxh3_128" in block
    )
    for pair in ("llama", "fp8"):
        folder = root / "fixtures" / pair / "base"
        exec(compile(recipe, "pipelines.md", "exec"), made := {"folder": folder})
        listed = json.loads(cli("inspect", folder, "--hash", "--format", "json").out)
        assert {row["name"]: row["hash"] for row in listed["tensors"]} == {
            k: v.hex() for k, v in made["hashes"].items()
        }
        assert listed["hash"] == made["whole"]


def test_hashes_do_not_depend_on_files_or_pieces(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("xxhash", reason="needs xxhash")
    from ckptdiff.checkpoint.content_hash import content_hashes, hash_of_all

    rng = np.random.default_rng(0)
    tensors = {f"w.{at}": rng.standard_normal((at + 1, 300)).astype(np.float32) for at in range(9)}
    tensors |= {"empty": np.zeros((0, 4), np.float32), "größe": np.ones(3, np.int8)}
    sharded, whole = tmp_path / "sharded", tmp_path / "whole.safetensors"
    sharded.mkdir()
    save_file(tensors, whole)
    for part in range(3):
        save_file(dict(list(tensors.items())[part::3]), sharded / f"model-{part}.safetensors")
    kinds = {np.dtype(np.float32): "F32", np.dtype(np.int8): "I8"}
    expected = {
        name: hash_of(name, kinds[side.dtype], ",".join(map(str, side.shape)), side.tobytes())
        for name, side in tensors.items()
    }
    for path in (whole, sharded):
        listed = ckptdiff.open_checkpoint(path).tensors.values()
        for piece in (7, 1 << 20):
            assert content_hashes(listed, piece=piece) == expected
    assert (
        hash_of_all(expected.values()) == hash_of_all(reversed(expected.values())) == whole_of(list(expected.values()))
    )
    changed = {**tensors, "w.3": -tensors["w.3"]}
    save_file(changed, whole)
    found = content_hashes(ckptdiff.open_checkpoint(whole).tensors.values())
    assert {name for name in found if found[name] != expected[name]} == {"w.3"}


def test_hashing_tells_how_far_it_is_and_can_be_stopped(checkpoint: Path) -> None:
    pytest.importorskip("xxhash", reason="needs xxhash")
    from ckptdiff.checkpoint.content_hash import content_hashes
    from ckptdiff.events import StageBegun, StageProgress

    listed, told = ckptdiff.open_checkpoint(checkpoint).tensors.values(), []
    content_hashes(listed, listener=told.append)
    assert told[0] == StageBegun("hashing", 216, "bytes")
    assert isinstance(told[-1], StageProgress) and told[-1].done == 216

    def stop(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        content_hashes(listed, listener=stop)


def test_a_shard_that_changes_has_no_hash(cli: Cli, checkpoint: Path) -> None:
    pytest.importorskip("xxhash", reason="needs xxhash")
    from ckptdiff.checkpoint.content_hash import content_hashes

    listed = ckptdiff.open_checkpoint(checkpoint).tensors.values()
    shard = checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ChangedFileError, match="changed"):
        content_hashes(listed)


def test_missing_xxhash_names_the_extra(cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    code, out, err = cli("inspect", checkpoint, "--hash")
    assert (code, out) == (2, "") and "pip install 'ckptdiff[patch]'" in err
    assert cli("inspect", checkpoint).code == 0
